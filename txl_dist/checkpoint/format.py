"""Checkpoints that know no ranks: parameters by name, memories by (layer, lane), and the step.

    RUN_DIR/checkpoints/step-000000500/
        checkpoint.json              what is here: step, tokens, config, data, each file's bytes and sha256, and its own
        weights-RRRRR.safetensors    fp32 parameters by name            (rank R writes its share of the names)
        optimizer-RRRRR.safetensors  `STATE/parameter` -> tensor, e.g. `exp_avg/...`
        memory-RRRRR.safetensors     `layer.L.lane.N` -> [mem_len, d_model]  (rank R writes its lanes)

How many files there are tells who wrote them, not what they mean: any number of ranks reads them by name. A checkpoint
is written under another name and renamed when all of it is there, so that what bears the name was whole. What has been
damaged since is found by sizes and sha256, named, and passed over for the newest one before it that is whole.
"""

import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from txl_dist.checkpoint.manifest import ImportedManifest, Manifest
from txl_dist.config.schema import CheckpointChoice
from txl_dist.errors import UserError
from txl_dist.files.atomic import remove, rename, sha256_of_file, sha256_of_json, sync
from txl_dist.files.parsing import PARSE_ERRORS, describe, read_json, shown

VERSION = 2  # 1 had no sha256 of the manifest itself

Value = TypeVar("Value")
Files = dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, read as far as its manifest.

    state: {"step", "tokens", "origin": of the lanes, "optimizer": numbers that are no tensors, "written_by": the split
    and the versions, "valid_loss": valid/loss as evaluated at this very step, else None}
    config: the run's whole config. data: {"fingerprint", "vocab_size", "tokenizer": file -> sha256, "place": absolute}
    of what it was trained on.
    Of an imported model (txl_dist.convert): state is {"step": 0, "tokens": 0, "imported": whence}, config has `model`
    and `data` alone, and the fingerprint is None.
    """

    path: Path
    state: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]
    files: Files

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def valid_loss(self) -> float | None:
        """None also where it is no number."""
        loss = self.state.get("valid_loss")
        return loss if loss is not None and isfinite(loss) else None

    def validate(self, contents: bool = True) -> list[str]:
        """What is wrong with the files, each compared with what the manifest tells of it; empty where all is well.

        Without `contents` only their sizes are compared, and nothing is read.
        """

        def damage(name: str) -> str | None:
            path, told = self.path / name, self.files[name]
            try:
                if not path.is_file():
                    return f"{path}: is {'no file' if path.exists() else 'missing'}"
                if (size := path.stat().st_size) != told["bytes"]:
                    return f"{path}: has {size:,} bytes, but checkpoint.json tells {told['bytes']:,}"
                if contents and sha256_of_file(path) != told["sha256"]:
                    return f"{path}: its content is not what checkpoint.json tells"
            except OSError as error:
                return f"{path}: cannot be read: {error.strerror}"
            return None

        with ThreadPoolExecutor(4) as pool:
            return [each for each in pool.map(damage, self.files) if each]

    def contents(self, kind: str) -> "Inventory":
        """How much there is of one kind. Nothing but headers is read."""
        sizes = list(map(prod, self.shapes(kind).values()))
        files = [told["bytes"] for name, told in self.files.items() if name.startswith(f"{kind}-")]
        return Inventory(len(sizes), sum(sizes), len(files), sum(files))

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of one kind (weights, optimizer, memory). Nothing but headers is read."""
        return self._read(kind, lambda file: {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118

    def tensors(self, kind: str, wanted: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors of one kind by name; all of them, or those wanted."""
        chosen = None if wanted is None else set(wanted)

        def take(file: Any) -> dict[str, Tensor]:
            names = file.keys() if chosen is None else chosen.intersection(file.keys())
            return {name: file.get_tensor(name) for name in names}

        found = self._read(kind, take)
        if chosen is not None and (missing := sorted(chosen - found.keys())):
            raise UserError(f"{self.path}: holds no {kind} of {', '.join(missing[:5])} ({len(missing)} missing)")
        return found

    def fitting(self, kind: str, wanted: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
        """The tensors of one kind by name, which must have the shapes that are wanted."""
        found = self.tensors(kind, wanted)
        for name, shape in wanted.items():
            if list(found[name].shape) != list(shape):
                raise UserError(f"{self.path}: its {kind} of {name} are {list(found[name].shape)}, not {list(shape)}")
        return found

    def _read(self, kind: str, take: Callable[[Any], dict[str, Value]]) -> dict[str, Value]:
        """Collect by name what `take` reads in each safetensors file of one kind."""
        found: dict[str, Value] = {}
        for name in self.files:
            if name.startswith(f"{kind}-"):
                try:
                    with safe_open(self.path / name, framework="pt") as file:
                        found |= take(file)
                except (SafetensorError, OSError, *PARSE_ERRORS) as error:
                    raise UserError(f"{self.path / name}: cannot be read: {describe(error)}") from error
        return found

    def load_weights(self, model: nn.Module, average: bool = False) -> None:
        """Put the weights, or their average, into a model, each by its (first) name: a tied one is stored once."""
        kind, prefix = ("optimizer", "average/") if average else ("weights", "")
        parameters = {prefix + name: parameter for name, parameter in model.named_parameters()}
        found = self.fitting(kind, {name: parameter.shape for name, parameter in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(found[name])


class Inventory(NamedTuple):
    """Of one kind of tensors. bytes: of their files."""

    tensors: int
    numbers: int
    files: int
    bytes: int


class CheckpointWriter:
    """Writes one checkpoint: every rank makes one and calls `add` for its tensors, then one rank calls `commit`.

    Attributes:
        files: what this rank has written, for the manifest.
    """

    def __init__(self, run_dir: str, step: int, rank: int):
        self.target = directory(run_dir, step)
        self.partial = self.target.with_name(f".{self.target.name}.partial")
        self.rank = rank
        self.files: Files = {}

    def add(self, kind: str, tensors: dict[str, Tensor]) -> None:
        """Write this rank's file of one kind."""
        path = self.partial / f"{kind}-{self.rank:05d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path)
        sync(path)
        self.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}

    def commit(self, files: Files, state: dict[str, Any], config: dict[str, Any], data: dict[str, Any]) -> None:
        """Make the checkpoint whole with a manifest of all ranks' files, and give it its name.

        Where a checkpoint of this step stands already, it is a damaged one that was passed over: it makes room.
        """
        manifest = {"format": "txl_dist checkpoint", "version": VERSION, "state": state, "data": data, "files": files}
        write_manifest(self.partial, manifest | {"config": config})
        if self.target.exists():
            beside = self.target.with_name(f".{self.target.name}.replaced")
            os.replace(self.target, beside)
            rename(self.partial, self.target)
            remove(beside)
        else:
            rename(self.partial, self.target)

    def give_up(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.partial, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode of any new file; safetensors itself leaves it to its owner alone.

    Raises:
        OSError: with the file's name, where it cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:  # which names no file
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write checkpoint.json, with a sha256 of all else that is in it."""
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    path = folder / "checkpoint.json"
    try:
        path.write_text(json.dumps(manifest | {"sha256": sha256_of_json(manifest)}, indent=2) + "\n")
        sync(path)
    except OSError as error:  # a full disk comes without a name
        raise OSError(error.errno, error.strerror, str(path)) from error


def directory(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:09d}"


def steps(run_dir: str | Path) -> list[int]:
    """The steps of which a run directory holds checkpoints, damaged or not, in order."""
    found = (re.fullmatch(r"step-(\d{9,})", path.name) for path in (Path(run_dir) / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def whole(
    run_dir: str | Path, found: Iterable[int], contents: bool = False, tell: Callable[[str], None] = lambda _: None
) -> Iterator[Checkpoint]:
    """Of the checkpoints of some steps those that are whole, in the same order; each damage of the others is told.

    Without `contents` only manifests and sizes are looked at.
    """
    for step in found:
        try:
            checkpoint = open_checkpoint(directory(run_dir, step))
            errors = checkpoint.validate(contents)
        except UserError as error:
            errors = [str(error)]
        if not errors:
            yield checkpoint
        for damage in errors:
            tell(f"step {step:,} passed over: {damage}")


def latest(
    run_dir: str | Path, contents: bool = False, tell: Callable[[str], None] = lambda _: None
) -> Checkpoint | None:
    """The newest whole checkpoint of a run, None where it has none at all. `contents` and `tell`: as for `whole`.

    Raises:
        UserError: where all that it has are damaged; nothing is begun anew then.
    """
    errors: list[str] = []

    def note(damage: str) -> None:
        errors.append(damage)
        tell(damage)

    found, place = steps(run_dir), Path(run_dir) / "checkpoints"
    if place.exists() and not place.is_dir():
        raise UserError(f"{place}: is no folder; bring back the checkpoints, or remove it to begin anew")
    checkpoint = next(whole(run_dir, reversed(found), contents, note), None)
    if found and not checkpoint:
        remedy = f"{place}: no checkpoint here is whole; bring one back, or remove {place} to begin anew"
        raise UserError("\n".join([*errors, remedy]))
    return checkpoint


def best(
    run_dir: str | Path, contents: bool = False, tell: Callable[[str], None] = lambda _: None
) -> Checkpoint | None:
    """The whole checkpoint of a run with the least valid/loss; None where no checkpoint was evaluated."""
    evaluated = [each for each in whole(run_dir, steps(run_dir), contents, tell) if each.valid_loss is not None]
    return min(evaluated, key=lambda each: (each.valid_loss, each.step), default=None)


def run_dirs(patterns: Iterable[str]) -> list[str]:
    """The run directories that paths and globs stand for; of what a glob matches only those with a checkpoint."""
    found: list[str] = []
    for pattern in patterns:
        literal = not glob.has_magic(pattern) or Path(pattern).is_dir()  # a folder's name may hold [brackets]
        matches = [pattern] if literal else [path for path in sorted(glob.glob(pattern)) if steps(path)]
        found += [path for path in matches if path not in found]
    return found


def find_checkpoint(run_dir: str, which: CheckpointChoice, contents: bool = False) -> Checkpoint:
    """The checkpoint of a run that is asked for; the checks have seen to it that it is there.

    Raises:
        UserError: where the step that is asked for is damaged. Otherwise damaged ones are named, on standard error, and
            passed over.
    """

    def tell(damage: str) -> None:
        print(damage, file=sys.stderr)

    if isinstance(which, int):
        checkpoint = open_checkpoint(directory(run_dir, which))
        if errors := checkpoint.validate(contents):
            raise UserError("\n".join(errors))
        return checkpoint
    found = latest(run_dir, contents, tell) if which is None else best(run_dir, contents, tell)
    assert found, run_dir
    return found


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest.

    Raises:
        UserError: where there is none that this version can read, or it is damaged.
    """
    file = path / "checkpoint.json"
    try:
        told = read_json(file)
        sha256 = told.pop("sha256", None)
        if told["format"] != "txl_dist checkpoint" or told["version"] not in (1, VERSION):
            raise UserError(f"{file}: is of version {shown(told['version'])}; this txl_dist reads version {VERSION}")
        if sha256 != sha256_of_json(told) and (sha256 or told["version"] != 1):
            raise UserError(f"{file}: its content is not what its own sha256 tells")
        schema = ImportedManifest if "imported" in told["state"] else Manifest
        schema.model_validate(told)
        checkpoint = Checkpoint(path, told["state"], told["config"], told["data"], told["files"])
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except PARSE_ERRORS as error:
        raise UserError(f"{file}: is no checkpoint's manifest ({describe(error)})") from error
    if checkpoint.path.name != directory("", checkpoint.step).name:
        raise UserError(f"{file}: is of step {checkpoint.step:,}, and does not belong here")
    return checkpoint
