"""The kinds of cases: each copies and damages a file, seals it again, and chooses the command that reads it."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from txl_dist.data.format import content_fingerprint
from txl_dist.files.atomic import sha256_of_file, sha256_of_json

from . import mutators
from .mutators import Mutator
from .specimens import LABELLED, TOKENIZERS, TRAIN

Command = list[str]  # the module's name, then its arguments
RARELY = 0.03  # training takes seconds to start, everything else less than one


def damage(path: Path, mutator: Mutator, rng: Random) -> None:
    """Put a mutant in the place of a file; one in eight is damaged without regard to its format."""
    chosen = mutators.any_bytes if rng.random() < 0.125 else mutator
    path.write_bytes(chosen(path.read_bytes(), rng))


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    value.pop("sha256", None)
    with suppress(RecursionError):
        path.write_text(json.dumps(value | {"sha256": sha256_of_json(value)}))


def seal(data: Path, run: Path) -> None:
    """Make all checksums of a dataset and a run right again, as far as their JSON can still be understood."""
    fingerprint = seal_data(data)
    for path in run.glob("checkpoints/*/checkpoint.json"):
        manifest = read(path)
        try:
            for name, facts in manifest["files"].items():
                file = path.parent / name
                facts |= {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
        except (TypeError, KeyError, AttributeError, OSError, ValueError, RecursionError):
            pass  # as it is
        if isinstance(manifest, dict):
            if fingerprint and isinstance(manifest.get("data"), dict) and "fingerprint" in manifest["data"]:
                manifest["data"]["fingerprint"] = fingerprint
                manifest["data"]["tokenizer"] = {
                    path.name: sha256_of_file(path) for path in (run / "tokenizer").iterdir()
                }
            write_sealed(path, manifest)


def seal_data(data: Path) -> str | None:
    index = read(data / "index.json")
    try:
        files = index["tokenizer"]["files"]
        files |= {name: sha256_of_file(data / "tokenizer" / name) for name in files}
        for name, split in index["splits"].items():
            split["files"] |= {file: sha256_of_file(data / name / file) for file in split["files"]}
            for shard in split["shards"]:
                shard["sha256"] = sha256_of_file(data / shard["name"])
        index["fingerprint"] = content_fingerprint(files, index["splits"], index.get("examples"))
    except (TypeError, KeyError, AttributeError, OSError, ValueError, RecursionError):
        pass  # as it is
    if not isinstance(index, dict):
        return None
    write_sealed(data / "index.json", index)
    return index.get("fingerprint")


def copies(specimens: Path, folder: Path, tokenizer: str) -> tuple[Path, Path]:
    """Copy a dataset and the run that was trained on it."""
    data = folder / "data"
    run = folder / "run"
    shutil.copytree(specimens / tokenizer, data)
    shutil.copytree(specimens / f"run-{tokenizer}", run)
    return data, run


def read_run(run: Path, data: Path, rng: Random) -> Command:
    """Choose a command that reads a run, and perhaps its data."""
    given = f"data_dir={data}"
    return rng.choice([
        ["evaluate", f"run={run}", given, "split=train", "num_lanes=2"],
        ["evaluate", f"run={run}", given, "split=train", "sliding_window=true", "max_tokens=20"],
        ["evaluate", f"run={run}", given, "split=test", "format=json"],
        ["generate", f"run={run}", "prompt=w1 w2", "max_tokens=3"],
        ["score", f"run={run}", "text=w1 w2 w3"],
        ["recl", f"run={run}", given, "split=test", "step=4", "max_context=8", "positions=4"],
        ["inspect", f"run={run}", *rng.choice([[], ["verify=true"], ["format=json"]])],
        ["convert", f"run={run}", f"to={run.parent / 'out'}"],
    ])  # fmt: skip


def trained_on(run: Path, data: Path) -> Command:
    return [
        "train",
        *TRAIN[:-5],
        "checkpoint.every=2",
        "tracking.mode=disabled",
        f"data.dir={data}",
        f"run.dir={run}",
        "train.stop_at=3",
    ]


# ------------------------------------------------------------------------------------------------------- the kinds


def index(specimens: Path, folder: Path, rng: Random) -> Command:
    data, run = copies(specimens, folder, rng.choice(TOKENIZERS))
    damage(data / "index.json", mutators.json_text, rng)
    seal(data, run)
    return read_data(specimens, run, data, rng)


def read_data(specimens: Path, run: Path, data: Path, rng: Random) -> Command:
    chance = rng.random()
    if chance < RARELY:
        return trained_on(run, data)
    if chance < 0.2:
        return ["prepare", "corpus=text", f"corpus.path={specimens / 'book.txt'}", f"data.dir={data}", "workers=1"]
    if chance < 0.35:
        return ["convert", f"from={specimens / 'safe'}", f"tokenizer_from={data}", f"run={run.parent / 'out'}"]
    return [
        "evaluate",
        f"run={run}",
        f"data_dir={data}",
        f"split={rng.choice(['train', 'train', 'test'])}",
        "num_lanes=2",
    ]


def table(specimens: Path, folder: Path, rng: Random) -> Command:
    data, run = copies(specimens, folder, "bytes")
    damage(data / "train" / rng.choice(["samples.npy", "documents.npy"]), mutators.npy, rng)
    seal(data, run)
    return read_data(specimens, run, data, rng)


def shard(specimens: Path, folder: Path, rng: Random) -> Command:
    data, run = copies(specimens, folder, rng.choice(TOKENIZERS))
    damage(rng.choice(sorted((data / "train").glob("*.tar"))), mutators.tar, rng)
    facts = read(data / "index.json")
    for entry in facts["splits"]["train"]["shards"]:
        entry["bytes"] = (data / entry["name"]).stat().st_size
    (data / "index.json").write_text(json.dumps(facts))
    seal(data, run)
    return read_data(specimens, run, data, rng)


def manifest(specimens: Path, folder: Path, rng: Random) -> Command:
    data, run = copies(specimens, folder, rng.choice(TOKENIZERS))
    damage(next(run.glob("checkpoints/*/checkpoint.json")), mutators.json_text, rng)
    seal(data, run)
    return trained_on(run, data) if rng.random() < RARELY else read_run(run, data, rng)


def safetensors(specimens: Path, folder: Path, rng: Random) -> Command:
    if rng.random() < 0.4:
        kind = rng.choice(["safe", "parts", "export"])
        source = Path(shutil.copytree(specimens / kind, folder / kind))
        damage(next(source.glob("*.safetensors")), mutators.safetensors, rng)
        return ["convert", f"from={source}", f"run={folder / 'out'}"]
    data, run = copies(specimens, folder, "bytes")
    file = rng.choice(["weights", "weights", "weights", "optimizer", "memory"])
    damage(next(run.glob(f"checkpoints/*/{file}-*.safetensors")), mutators.safetensors, rng)
    seal(data, run)
    if rng.random() < (RARELY if file == "weights" else 0.3):
        return trained_on(run, data)
    return ["inspect", f"run={run}"] if file != "weights" else read_run(run, data, rng)


def torch_file(specimens: Path, folder: Path, rng: Random) -> Command:
    name = rng.choice(
        ["authors-zip.pt", "authors-old.pt", "nvidia-zip.pt", "nvidia-old.pt", "pytorch_model.bin", "vocab.pkl"]
    )
    lengths = [
        "model.tgt_len=5",
        "model.mem_len=7",
        "model.clamp_len=-1",
        "model.same_length=false",
        "model.pre_lnorm=false",
    ]
    words = f"tokenizer_from={specimens / 'vocab.txt'}"
    if name == "vocab.pkl":
        path = Path(shutil.copy(specimens / name, folder))
        damage(path, mutators.pickle_stream, rng)
        return ["convert", f"from={specimens / 'safe'}", f"tokenizer_from={path}", f"run={folder / 'out'}"]
    if name == "pytorch_model.bin":
        source = Path(shutil.copytree(specimens / "bin", folder / "bin"))
        damage(source / name, mutators.torch_file, rng)
        return ["convert", f"from={source}", f"run={folder / 'out'}"]
    path = Path(shutil.copy(specimens / name, folder))
    damage(path, mutators.torch_file, rng)
    return ["convert", f"from={path}", words, f"run={folder / 'out'}", *(lengths if "authors" in name else [])]


def sentencepiece(specimens: Path, folder: Path, rng: Random) -> Command:
    if rng.random() < 0.5:
        path = Path(shutil.copy(specimens / "given.model", folder))
        damage(path, mutators.any_bytes, rng)
        return prepared(specimens, folder, "sentencepiece", f"tokenizer.model={path}")
    return tokenizer_damaged(specimens, folder, rng, "sentencepiece.model", mutators.any_bytes)


def words(specimens: Path, folder: Path, rng: Random) -> Command:
    chance = rng.random()
    if chance < 0.3:
        path = Path(shutil.copy(specimens / "vocab.txt", folder))
        damage(path, mutators.words, rng)
        return prepared(specimens, folder, "word", f"tokenizer.vocab={path}")
    if chance < 0.6:
        source = Path(shutil.copytree(specimens / "safe", folder / "safe"))
        damage(source / "vocab.txt", mutators.words, rng)
        return ["convert", f"from={source}", f"run={folder / 'out'}"]
    if rng.random() < 0.5:
        return tokenizer_damaged(specimens, folder, rng, "vocab.txt", mutators.words)
    return tokenizer_damaged(specimens, folder, rng, "tokenizer.json", mutators.json_text)


def prepared(specimens: Path, folder: Path, tokenizer: str, given: str) -> Command:
    source = ["corpus=text", f"corpus.path={specimens / 'book.txt'}", "workers=1"]
    return ["prepare", *source, f"tokenizer={tokenizer}", given, f"data.dir={folder / 'out'}"]


def tokenizer_damaged(specimens: Path, folder: Path, rng: Random, name: str, mutator: Mutator) -> Command:
    """Damage a file of the tokenizer in a dataset and in its run alike."""
    data, run = copies(specimens, folder, "sentencepiece" if name == "sentencepiece.model" else "word")
    damage(data / "tokenizer" / name, mutator, rng)
    shutil.copy(data / "tokenizer" / name, run / "tokenizer" / name)
    seal(data, run)
    return rng.choice([read_run(run, data, rng), read_data(specimens, run, data, rng)])


def labelled(specimens: Path, folder: Path, rng: Random) -> Command:
    """Damage a file of examples, or the dataset that was made of it."""
    name = rng.choice(sorted(LABELLED))
    data = folder / "out"
    source = Path(shutil.copy(specimens / name, folder))
    if rng.random() < 0.6:
        damage(source, mutators.json_text if name.endswith(".json") else mutators.any_bytes, rng)
    else:
        shutil.copytree(specimens / f"data-{name}", data)
        if rng.random() < 0.5:
            damage(data / "index.json", mutators.json_text, rng)
        else:
            damage(data / "train" / "examples.npy", mutators.npy, rng)
        seal_data(data)
    return ["prepare", *LABELLED[name], f"corpus.path={source}", "tokenizer=word", "workers=1", f"data.dir={data}"]


def foreign_config(specimens: Path, folder: Path, rng: Random) -> Command:
    """Damage config.json, an index of parts, or the tokenizer's config of a third-party checkpoint."""
    kind = rng.choice(["safe", "bin", "export", "parts"])
    source = Path(shutil.copytree(specimens / kind, folder / kind))
    names = {"export": ["config.json", "tokenizer_config.json"], "parts": ["model.safetensors.index.json"]}
    damage(source / rng.choice(names.get(kind, ["config.json"])), mutators.json_text, rng)
    return ["convert", f"from={source}", f"run={folder / 'out'}"]


def command_line(specimens: Path, folder: Path, rng: Random, only_values: bool = False) -> Command:
    data, run = copies(specimens, folder, "bytes")
    more = ["model.mem_len=4", "checkpoint=null", "average=false"]
    choices = [read_run(run, data, rng) for _ in range(3)] + [trained_on(run, data)] * (rng.random() < 0.1)
    choices += [
        [
            "generate",
            f"run={run}",
            "prompt=x",
            "max_tokens=2",
            "temperature=1.0",
            "top_k=3",
            "top_p=0.9",
            "seed=1",
            *more,
        ]
    ]
    choices += [["score", f"run={run}", "text=x", "next=3", "model.tgt_len=4", *more]]
    choices += [["evaluate", f"run={run}", f"data_dir={data}", "split=test", "num_lanes=2", "max_tokens=9", *more]]
    choices += [
        [
            *prepared(specimens, folder, "bytes", "corpus.valid_share=0.1"),
            "data.sample_tokens=64",
            "data.shard_samples=2",
        ]
    ]
    module, *given = rng.choice(choices)
    return [module, *mutators.arguments(given, rng)]


KINDS: dict[str, Callable[[Path, Path, Random], Command]] = {
    "index": index,
    "table": table,
    "shard": shard,
    "manifest": manifest,
    "safetensors": safetensors,
    "torch file": torch_file,
    "sentencepiece": sentencepiece,
    "words": words,
    "labelled": labelled,
    "foreign config": foreign_config,
    "command line": command_line,
}
