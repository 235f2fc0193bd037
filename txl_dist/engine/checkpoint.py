"""Checkpoints that know no ranks: parameters by name, memories by (layer, lane), and the step.

    RUN_DIR/checkpoints/step-000000500/
        checkpoint.json              what is here: step, tokens, config, data, each file's bytes and sha256
        weights-RRRRR.safetensors    fp32 parameters by name            (rank R writes its share of the names)
        optimizer-RRRRR.safetensors  `STATE/parameter` -> tensor, e.g. `exp_avg/...`
        memory-RRRRR.safetensors     `layer.L.lane.N` -> [mem_len, d_model]  (rank R writes its lanes)

How many files there are tells who wrote them, not what they mean: any number of ranks reads them by name. A checkpoint
is written under another name and renamed when all of it is there, so that what bears the name is whole.
"""

import glob
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from txl_dist.data.shards import sha256_of_file
from txl_dist.errors import UserError

VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, read as far as its manifest.

    state: {"step", "tokens", "origin": of the lanes, "optimizer": numbers that are no tensors, "written_by": the split}
    config: the run's whole config. data: {"fingerprint", "vocab_size"} of what it was trained on.
    Of an imported model (txl_dist.convert): state is {"step": 0, "tokens": 0, "imported": whence}, config has `model`
    and `data` alone, and the fingerprint is None.
    """

    path: Path
    state: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def step(self) -> int:
        return self.state["step"]

    def damages(self, contents: bool = True) -> list[str]:
        """What is wrong with the files, each compared with what the manifest tells of it; empty where all is well.

        Without `contents` only their sizes are compared, and nothing is read.
        """

        def damage(name: str) -> str | None:
            path, told = self.path / name, self.files[name]
            if not path.is_file():
                return f"{path}: is missing"
            if path.stat().st_size != told["bytes"]:
                return f"{path}: has {path.stat().st_size:,} bytes, but checkpoint.json tells {told['bytes']:,}"
            if contents and sha256_of_file(path) != told["sha256"]:
                return f"{path}: its content is not what checkpoint.json tells"
            return None

        with ThreadPoolExecutor(4) as pool:
            found = [each for each in pool.map(damage, self.files) if each]
        return [*found, f"remove {self.path} to go on from an older checkpoint or, with none, anew"] if found else []

    def contents(self, kind: str) -> "Contents":
        """How much there is of one kind. Nothing but headers is read."""
        sizes = [prod(part.get_slice(name).get_shape()) for part in self._open(kind) for name in part.keys()]  # noqa: SIM118
        files = [told["bytes"] for name, told in self.files.items() if name.startswith(f"{kind}-")]
        return Contents(len(sizes), sum(sizes), len(files), sum(files))

    def names(self, kind: str) -> set[str]:
        """Of all tensors of one kind (weights, optimizer, memory)."""
        return {name for part in self._open(kind) for name in part.keys()}  # noqa: SIM118 - it is no dict

    def tensors(self, kind: str, wanted: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors of one kind by name; all of them, or those wanted."""
        chosen = None if wanted is None else set(wanted)
        found: dict[str, Tensor] = {}
        for part in self._open(kind):
            names = part.keys() if chosen is None else chosen.intersection(part.keys())
            found |= {name: part.get_tensor(name) for name in names}
        if chosen is not None and (missing := sorted(chosen - found.keys())):
            raise UserError(f"{self.path}: holds no {kind} of {', '.join(missing[:5])} ({len(missing)} missing)")
        return found

    def _open(self, kind: str) -> Iterator[Any]:
        """The files of one kind, one after the other."""
        for name in self.files:
            if name.startswith(f"{kind}-"):
                try:
                    with safe_open(self.path / name, framework="pt") as file:
                        yield file
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{self.path / name}: cannot be read: {error}") from error

    def load_weights(self, model: nn.Module, average: bool = False) -> None:
        """Put the weights, or their average, into a model, each by its (first) name: a tied one is stored once."""
        parameters = dict(model.named_parameters())
        names = {name: f"average/{name}" if average else name for name in parameters}
        found = self.tensors("optimizer" if average else "weights", names.values())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(found[names[name]])


class Contents(NamedTuple):
    """Of one kind of tensors. bytes: of their files."""

    tensors: int
    numbers: int
    files: int
    bytes: int


class CheckpointWriter:
    """Writes one checkpoint; every rank makes one and calls `add` for its tensors."""

    def __init__(self, run_dir: str, step: int, rank: int):
        self.target = directory(run_dir, step)
        self.partial = self.target.with_name(f".{self.target.name}.partial")
        self.rank = rank

    def begin(self) -> None:
        """Make room, without what an interrupted write may have left. One rank calls it, before any adds."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def add(self, kind: str, tensors: dict[str, Tensor]) -> None:
        """Write this rank's file of one kind, and beside it what the manifest will say of it."""
        path = self.partial / f"{kind}-{self.rank:05d}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        told = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        path.with_suffix(".told").write_text(json.dumps(told))

    def finish(self, state: dict[str, Any], config: dict[str, Any], data: dict[str, Any], keep: int) -> None:
        """Make the checkpoint whole, give it its name, and remove all but the newest `keep`. One rank calls it."""
        files = {}
        for note in sorted(self.partial.glob("*.told")):
            files[note.with_suffix(".safetensors").name] = json.loads(note.read_text())
            note.unlink()
        manifest = {"format": "txl_dist checkpoint", "version": VERSION, "state": state, "data": data, "files": files}
        (self.partial / "checkpoint.json").write_text(json.dumps(manifest | {"config": config}, indent=2) + "\n")
        for path in self.partial.iterdir():
            flush(path)
        os.replace(self.partial, self.target)
        flush(self.target.parent)
        for old in steps(self.target.parents[1])[:-keep]:
            shutil.rmtree(directory(self.target.parents[1], old))


def directory(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:09d}"


def steps(run_dir: str | Path) -> list[int]:
    """The steps of which a run directory holds whole checkpoints, in order."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in (Path(run_dir) / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def newest(run_dir: str | Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None where it has none."""
    return open_checkpoint(directory(run_dir, found[-1])) if (found := steps(run_dir)) else None


def run_dirs(patterns: Iterable[str]) -> list[str]:
    """The run directories that paths and globs stand for; of what a glob matches only those with a checkpoint."""
    found: list[str] = []
    for pattern in patterns:
        matches = [path for path in sorted(glob.glob(pattern)) if steps(path)] if glob.has_magic(pattern) else [pattern]
        found += [path for path in matches if path not in found]
    return found


def find_checkpoint(run_dir: str, step: int | None) -> Checkpoint:
    """A run's checkpoint of a step, or its newest. The checks have seen to it that it is there."""
    checkpoint = newest(run_dir) if step is None else open_checkpoint(directory(run_dir, step))
    assert checkpoint, run_dir
    return checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest.

    Raises:
        UserError: where there is none that this version can read.
    """
    try:
        told = json.loads((path / "checkpoint.json").read_text())
        if told["format"] != "txl_dist checkpoint" or told["version"] != VERSION:
            raise UserError(f"{path}: is of version {told['version']}; this txl_dist reads version {VERSION}")
        return Checkpoint(path, told["state"], told["config"], told["data"], told["files"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: holds no readable checkpoint.json ({error})") from error


def flush(path: Path) -> None:
    """Have what was written reach the disk: a name must not outlive its content when power fails."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
