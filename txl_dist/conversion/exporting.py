"""Turn a run into a folder that transformers 5 loads with trust_remote_code=True, the model's code included."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from txl_dist.checkpoint.format import find_checkpoint, save_tensors
from txl_dist.config.schema import ConvertJob
from txl_dist.config.sections import changed_model, parse_model
from txl_dist.data import tokenizers
from txl_dist.data.tokenizers import SentencePieceTokenizer, Tokenizer, WordTokenizer
from txl_dist.errors import ConfigError
from txl_dist.files.atomic import new_folder
from txl_dist.files.lock import Lock
from txl_dist.models.transformer_xl import TransformerXLConfig
from txl_dist.runs.load import load_tokenizer

HUB = Path(__file__).parent / "hub"


def export_checkpoint(job: ConvertJob, target: Path, lock: Lock) -> None:
    """Write the Hugging Face folder of a run's checkpoint.

    Args:
        lock: of `target`.

    Raises:
        UserError: where the checkpoint is damaged, or its model is not one that can be exported.
    """
    checkpoint = find_checkpoint(job.run, job.checkpoint, contents=True)
    config = changed_model(parse_model(checkpoint.config["model"]), job.model)
    if not isinstance(config, TransformerXLConfig):
        raise ConfigError([f"run={job.run}: holds a model of {config.name}, for which there is no exported form"])
    problems = []
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
        write_json(folder / "generation_config.json", generation_config(tokenizer))
        for name in ("configuration_transformer_xl.py", "modeling_transformer_xl.py"):
            shutil.copyfile(HUB / name, folder / name)
        write_tokenizer(folder, tokenizer)
    print(f"{job.to}: step {checkpoint.step:,} of {job.run}, for transformers 5")
    quoted = json.dumps(job.to, ensure_ascii=False)
    print(f"Next: AutoModelForCausalLM.from_pretrained({quoted}, trust_remote_code=True)")


def hub_config(config: TransformerXLConfig, vocab_size: int) -> dict[str, Any]:
    """Return the content of config.json: our hyper-parameters, and where transformers finds the model's code."""
    values = asdict(config) | {"vocab_size": vocab_size, "dtype": "float32", "model_type": "txl_dist"}
    del values["name"]
    return values | {
        "architectures": ["TransformerXLForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_transformer_xl.TransformerXLConfig",
            "AutoModelForCausalLM": "modeling_transformer_xl.TransformerXLForCausalLM",
        },
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of generation_config.json: the tokens at which generation begins and ends.

    For words `<eos>` is the line end, and generation does not end there.
    """
    ends = {"eos_token_id": tokenizer.eos} if tokenizer.decode([tokenizer.eos]) == "" else {}
    return {"bos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos} | ends


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's vocabulary, its code and tokenizer_config.json."""
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
    code = f"tokenization_{tokenizer.kind}.py"
    shutil.copyfile(HUB / code, folder / code)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(values, indent=2) + "\n")
