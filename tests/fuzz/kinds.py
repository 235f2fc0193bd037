"""The kinds of cases: what is copied, damaged and sealed again, and which command then reads it."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from txl_dist.data.preparing.shards import content_fingerprint
from txl_dist.files.atomic import sha256_of_file, sha256_of_json

from . import mutators
from .mutators import Mutator
from .specimens import TOKENIZERS, TRAIN

Command = list[str]  # the module's name, then its arguments
RARELY = 0.03  # training starts in seconds, all else in parts of one


def damage(path: Path, mutator: Mutator, rng: Random) -> None:
    """Put a mutant in the place of a file; one in eight is damaged without regard to what it is."""
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
                    each.name: sha256_of_file(each) for each in (run / "tokenizer").iterdir()
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
        index["fingerprint"] = content_fingerprint(files, index["splits"])
    except (TypeError, KeyError, AttributeError, OSError, ValueError, RecursionError):
        pass  # as it is
    if not isinstance(index, dict):
        return None
    write_sealed(data / "index.json", index)
    return index.get("fingerprint")


def copies(specimens: Path, place: Path, tokenizer: str) -> tuple[Path, Path]:
    """A dataset and the run that was trained on it."""
    data, run = place / "data", place / "run"
    shutil.copytree(specimens / tokenizer, data)
    shutil.copytree(specimens / f"run-{tokenizer}", run)
    return data, run


def asked(run: Path, data: Path, rng: Random) -> Command:
    """A command that reads a run, and perhaps its data."""
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


def index(specimens: Path, place: Path, rng: Random) -> Command:
    data, run = copies(specimens, place, rng.choice(TOKENIZERS))
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


def table(specimens: Path, place: Path, rng: Random) -> Command:
    data, run = copies(specimens, place, "bytes")
    damage(data / "train" / rng.choice(["samples.npy", "documents.npy"]), mutators.npy, rng)
    seal(data, run)
    return read_data(specimens, run, data, rng)


def shard(specimens: Path, place: Path, rng: Random) -> Command:
    data, run = copies(specimens, place, rng.choice(TOKENIZERS))
    damage(rng.choice(sorted((data / "train").glob("*.tar"))), mutators.tar, rng)
    facts = read(data / "index.json")
    for each in facts["splits"]["train"]["shards"]:
        each["bytes"] = (data / each["name"]).stat().st_size
    (data / "index.json").write_text(json.dumps(facts))
    seal(data, run)
    return read_data(specimens, run, data, rng)


def manifest(specimens: Path, place: Path, rng: Random) -> Command:
    data, run = copies(specimens, place, rng.choice(TOKENIZERS))
    damage(next(run.glob("checkpoints/*/checkpoint.json")), mutators.json_text, rng)
    seal(data, run)
    return trained_on(run, data) if rng.random() < RARELY else asked(run, data, rng)


def safetensors(specimens: Path, place: Path, rng: Random) -> Command:
    if rng.random() < 0.4:
        kind = rng.choice(["safe", "parts", "export"])
        folder = Path(shutil.copytree(specimens / kind, place / kind))
        damage(next(folder.glob("*.safetensors")), mutators.safetensors, rng)
        return ["convert", f"from={folder}", f"run={place / 'out'}"]
    data, run = copies(specimens, place, "bytes")
    file = rng.choice(["weights", "weights", "weights", "optimizer", "memory"])
    damage(next(run.glob(f"checkpoints/*/{file}-*.safetensors")), mutators.safetensors, rng)
    seal(data, run)
    if rng.random() < (RARELY if file == "weights" else 0.3):
        return trained_on(run, data)
    return ["inspect", f"run={run}"] if file != "weights" else asked(run, data, rng)


def torch_file(specimens: Path, place: Path, rng: Random) -> Command:
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
        path = Path(shutil.copy(specimens / name, place))
        damage(path, mutators.pickle_stream, rng)
        return ["convert", f"from={specimens / 'safe'}", f"tokenizer_from={path}", f"run={place / 'out'}"]
    if name == "pytorch_model.bin":
        folder = Path(shutil.copytree(specimens / "bin", place / "bin"))
        damage(folder / name, mutators.torch_file, rng)
        return ["convert", f"from={folder}", f"run={place / 'out'}"]
    path = Path(shutil.copy(specimens / name, place))
    damage(path, mutators.torch_file, rng)
    return ["convert", f"from={path}", words, f"run={place / 'out'}", *(lengths if "authors" in name else [])]


def sentencepiece(specimens: Path, place: Path, rng: Random) -> Command:
    if rng.random() < 0.5:
        path = Path(shutil.copy(specimens / "given.model", place))
        damage(path, mutators.any_bytes, rng)
        return prepared(specimens, place, "sentencepiece", f"tokenizer.model={path}")
    return tokenizer_damaged(specimens, place, rng, "sentencepiece.model", mutators.any_bytes)


def words(specimens: Path, place: Path, rng: Random) -> Command:
    chance = rng.random()
    if chance < 0.3:
        path = Path(shutil.copy(specimens / "vocab.txt", place))
        damage(path, mutators.words, rng)
        return prepared(specimens, place, "word", f"tokenizer.vocab={path}")
    if chance < 0.6:
        folder = Path(shutil.copytree(specimens / "safe", place / "safe"))
        damage(folder / "vocab.txt", mutators.words, rng)
        return ["convert", f"from={folder}", f"run={place / 'out'}"]
    name = rng.choice(["vocab.txt", "tokenizer.json"])
    return tokenizer_damaged(specimens, place, rng, name, mutators.words if name == "vocab.txt" else mutators.json_text)


def prepared(specimens: Path, place: Path, tokenizer: str, given: str) -> Command:
    source = ["corpus=text", f"corpus.path={specimens / 'book.txt'}", "workers=1"]
    return ["prepare", *source, f"tokenizer={tokenizer}", given, f"data.dir={place / 'out'}"]


def tokenizer_damaged(specimens: Path, place: Path, rng: Random, name: str, mutator: Mutator) -> Command:
    """Of a dataset and a run alike."""
    data, run = copies(specimens, place, "sentencepiece" if name == "sentencepiece.model" else "word")
    damage(data / "tokenizer" / name, mutator, rng)
    shutil.copy(data / "tokenizer" / name, run / "tokenizer" / name)
    seal(data, run)
    return rng.choice([asked(run, data, rng), read_data(specimens, run, data, rng)])


def foreign_config(specimens: Path, place: Path, rng: Random) -> Command:
    """config.json, an index of parts, or the tokenizer's config of a folder."""
    kind = rng.choice(["safe", "bin", "export", "parts"])
    folder = Path(shutil.copytree(specimens / kind, place / kind))
    names = {"export": ["config.json", "tokenizer_config.json"], "parts": ["model.safetensors.index.json"]}
    damage(folder / rng.choice(names.get(kind, ["config.json"])), mutators.json_text, rng)
    return ["convert", f"from={folder}", f"run={place / 'out'}"]


def command_line(specimens: Path, place: Path, rng: Random, only_values: bool = False) -> Command:
    data, run = copies(specimens, place, "bytes")
    more = ["model.mem_len=4", "checkpoint=null", "average=false"]
    choices = [asked(run, data, rng) for _ in range(3)] + [trained_on(run, data)] * (rng.random() < 0.1)
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
            *prepared(specimens, place, "bytes", "corpus.valid_share=0.1"),
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
    "foreign config": foreign_config,
    "command line": command_line,
}
