"""Checkpoints in and out: `python -m txl_dist.convert from=PATH run=RUN_DIR`, `... run=RUN_DIR to=FOLDER`.

In: a model of Hugging Face, the authors or NVIDIA becomes a run of step 0, with weights and tokenizer and nothing else.
Out: a run becomes a folder that transformers 5 loads with trust_remote_code=True, its model's code included.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from txl_dist import __version__
from txl_dist.checkpoint.format import CheckpointWriter, find_checkpoint, save_tensors
from txl_dist.cli import command
from txl_dist.config.checks import model_fits_together
from txl_dist.config.quoting import command_to_paste
from txl_dist.config.schema import ConvertJob, ModelConfig
from txl_dist.conversion import vocabularies
from txl_dist.conversion.sources import Source, open_source
from txl_dist.conversion.weights import ours
from txl_dist.data import tokenizers
from txl_dist.data.index import Index
from txl_dist.data.tokenizers import SentencePieceTokenizer, Tokenizer, WordTokenizer
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.atomic import lock_of_new_folder, new_folder
from txl_dist.files.lock import Lock
from txl_dist.files.parsing import shown
from txl_dist.runs.load import load_tokenizer

HUB = Path(__file__).parent / "conversion" / "hub"


def convert(job: ConvertJob) -> None:
    """Import or export; nothing is there under its name before all of it is."""
    key = "run" if job.from_ is not None else "to"
    folder = Path(getattr(job, key))
    with lock_of_new_folder(key, folder, "converting a checkpoint") as lock:
        if job.from_ is not None:
            bring_in(job, Path(job.from_), folder, lock)
        else:
            send_out(job, folder, lock)


# ---------------------------------------------------------------------------------------------------------- in


def bring_in(job: ConvertJob, path: Path, target: Path, lock: Lock) -> None:
    """Write the run directory of an imported model.

    Raises:
        ConfigError: with everything that is wrong with it.
    """
    source = open_source(path)
    problems: list[str] = []
    with noted(problems):
        tokenizer = find_tokenizer(job, source)
    with noted(problems):
        config = model_config(job, source)
        weights = ours(source.tensors, source.spelling, config, source.vocab_size)
    if problems:
        raise ConfigError(problems)
    with new_folder(target, lock) as run_dir:
        tokenizer.save(run_dir / "tokenizer")
        write_checkpoint(run_dir, job, source, config, weights)
    parameters = sum(map(Tensor.numel, weights.values()))
    print(f"{job.run}: {source.title}, {parameters:,} parameters, tokenizer of {tokenizer.kind}")
    print(f"Next: {command_to_paste('python -m txl_dist.generate', run=job.run)}")


@contextmanager
def noted(problems: list[str]) -> Iterator[None]:
    """Keep a user's mistakes for later, so that all are told at once."""
    try:
        yield
    except UserError as error:
        problems += str(error).splitlines()


def model_config(job: ConvertJob, source: Source) -> ModelConfig:
    """What the source tells, and what the job gives.

    Raises:
        ConfigError: with what neither tells and what does not fit together.
    """
    given = {key: value for key, value in asdict(job.model).items() if value is not None}
    values = {"name": "transformer_xl"} | source.told | given
    missing = [each.name for each in fields(ModelConfig) if each.name not in values and each.default is MISSING]
    if missing:
        raise ConfigError(
            [f"model.{key}: is missing; {job.from_} does not tell it: give model.{key}=..." for key in missing]
        )
    try:
        config = TypeAdapter(ModelConfig).validate_python(values)
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, each['loc']))}={shown(each['input'])}: {each['msg']}" for each in error.errors()[:5]
        ]
        raise ConfigError([f"{job.from_}: tells {line}" for line in wrong]) from error
    problems = list(model_fits_together(config))
    if config.cutoffs and config.cutoffs[-1] >= source.vocab_size:
        problems.append(
            f"model.cutoffs={shown(config.cutoffs)}: must stay below the vocabulary of {source.vocab_size:,}"
        )
    if problems:
        raise ConfigError(problems)
    return config


def find_tokenizer(job: ConvertJob, source: Source) -> Tokenizer:
    """That of tokenizer_from, or the source's own.

    Raises:
        UserError: where there is none, or its vocabulary has another size.
    """
    if job.tokenizer_from is not None:
        path, key = Path(job.tokenizer_from), f"tokenizer_from={job.tokenizer_from}"
        tokenizer = vocabularies.read(path) if path.is_file() else Index.open(job.tokenizer_from).tokenizer()
    elif source.tokenizer is not None:
        tokenizer, key = source.tokenizer(), f"from={job.from_}"
    else:
        raise UserError(
            f"tokenizer_from: is missing, for no vocabulary lies beside {job.from_}; give a prepared dataset with the "
            f"same vocabulary of {source.vocab_size:,} tokens, or a vocabulary file"
        )
    if tokenizer.vocab_size != source.vocab_size:
        raise UserError(
            f"{key}: the vocabulary has {tokenizer.vocab_size:,} tokens, but the model {source.vocab_size:,}; "
            "give tokenizer_from=... with the vocabulary that it was trained with"
        )
    return tokenizer


def write_checkpoint(
    run_dir: Path, job: ConvertJob, source: Source, config: ModelConfig, weights: dict[str, Tensor]
) -> None:
    """A checkpoint of step 0 that holds weights alone; no data are known that it was trained on."""
    dataset = job.tokenizer_from if job.tokenizer_from and Path(job.tokenizer_from).is_dir() else None
    place = {"place": os.path.abspath(dataset)} if dataset else {}
    writer = CheckpointWriter(str(run_dir), step=0, rank=0)
    writer.add("weights", weights)
    writer.commit(
        writer.files,
        state={
            "step": 0,
            "tokens": 0,
            "imported": {"from": str(job.from_), "title": source.title},
            "written_by": {"txl_dist": __version__, "torch": str(torch.__version__)},
        },
        config={"model": asdict(config), "data": {"dir": dataset, "reset_memory": "never"}},
        data={"fingerprint": None, "vocab_size": source.vocab_size} | place,
    )


# --------------------------------------------------------------------------------------------------------- out


def send_out(job: ConvertJob, target: Path, lock: Lock) -> None:
    """Write the Hugging Face folder of a run's checkpoint.

    Raises:
        UserError: where the checkpoint is damaged, or its model is none that can go out.
    """
    checkpoint = find_checkpoint(job.run, job.checkpoint, contents=True)
    config = job.model.of(TypeAdapter(ModelConfig).validate_python(checkpoint.config["model"]))
    problems = list(model_fits_together(config))
    if config.attention != "relative":
        problems.append(f"model.attention={config.attention}: a folder is exported with relative attention only")
    if config.mem_len == 0:
        problems.append("model.mem_len=0: a folder generates with memory; give model.mem_len=...")
    if problems:
        raise ConfigError(problems)
    tokenizer = load_tokenizer(job.run, checkpoint)
    with new_folder(target, lock) as folder:
        save_tensors(checkpoint.tensors("weights"), folder / "model.safetensors")
        write_json(folder / "config.json", hub_config(config, checkpoint.data["vocab_size"]))
        write_json(folder / "generation_config.json", hub_tokens(tokenizer))
        for name in ("configuration_transformer_xl.py", "modeling_transformer_xl.py"):
            shutil.copyfile(HUB / name, folder / name)
        write_tokenizer(folder, tokenizer)
    print(f"{job.to}: step {checkpoint.step:,} of {job.run}, for transformers 5")
    folder_in_quotes = json.dumps(job.to, ensure_ascii=False)
    print(f"Next: AutoModelForCausalLM.from_pretrained({folder_in_quotes}, trust_remote_code=True)")


def hub_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    values = asdict(config) | {"vocab_size": vocab_size, "dtype": "float32", "model_type": "txl_dist"}
    del values["name"]
    return values | {
        "architectures": ["TransformerXLForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_transformer_xl.TransformerXLConfig",
            "AutoModelForCausalLM": "modeling_transformer_xl.TransformerXLForCausalLM",
        },
    }


def hub_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Where generation begins and ends. With words `<eos>` is the line end: there it does not end at it."""
    ends = {"eos_token_id": tokenizer.eos} if tokenizer.decode([tokenizer.eos]) == "" else {}
    return {"bos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos} | ends


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    name = type(tokenizer).__name__
    values: dict[str, Any] = {
        "tokenizer_class": name,
        "auto_map": {"AutoTokenizer": [f"tokenization_{tokenizer.kind}.{name}", None]},
        "split_special_tokens": True,  # "<eos>" written in a text is text
        "special_tokens_pattern": "bos",  # a text begins as a document does in training
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    eos = tokenizers.EOS
    if isinstance(tokenizer, WordTokenizer):
        (folder / "vocab.txt").write_bytes("".join(f"{word}\n" for word in tokenizer.words).encode())
        values["unk_token"] = tokenizers.UNK
    elif isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "sentencepiece.model").write_bytes(tokenizer.model)
        eos = tokenizer.pieces.id_to_piece(tokenizer.eos)
    write_json(folder / "tokenizer_config.json", values | {"bos_token": eos, "eos_token": eos, "pad_token": eos})
    shutil.copyfile(HUB / f"tokenization_{tokenizer.kind}.py", folder / f"tokenization_{tokenizer.kind}.py")


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    command("convert", ConvertJob, convert)


if __name__ == "__main__":
    main()
