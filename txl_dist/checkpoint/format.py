"""The format of checkpoints: tensors by name, whatever the number of ranks that wrote or read them.

    RUN_DIR/checkpoints/step-000000500/
        checkpoint.json              manifest: state, config, data; bytes and SHA-256 of each file, and of itself
        weights-RRRRR.safetensors    fp32 parameters by name            (rank R writes its share of the names)
        optimizer-RRRRR.safetensors  `STATE/parameter` -> tensor, e.g. `exp_avg/...`
        memory-RRRRR.safetensors     `layer.L.lane.N` -> [mem_len, d_model]  (rank R writes its lanes)

A checkpoint is written under a temporary name and renamed last, so a directory with a final name was complete when it
was written. Later damage is found by sizes and SHA-256, reported, and the latest valid checkpoint before it is used.
"""

import json
import logging
import os
import re
import shutil
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
from txl_dist.config.types import CheckpointChoice
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.atomic import remove, rename, sha256_of_file, sha256_of_json, sync
from txl_dist.files.globs import expand_globs
from txl_dist.files.parsing import PARSE_ERRORS, describe, read_json, shown

log = logging.getLogger(__name__)

VERSION = 2  # version 1 had no SHA-256 of the manifest itself

Value = TypeVar("Value")
FileEntries = dict[str, dict[str, Any]]  # file name -> {"bytes", "sha256"}
Report = Callable[[str], None]  # takes one line about a damaged checkpoint


def ignore(line: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, whose manifest has been read.

    Attributes:
        path: its directory.
        state: {"step", "tokens", "origin": of the lanes, "optimizer": its numbers, "written_by": the split and
            the versions, "valid_loss": valid/loss if it was evaluated at this very step, else None}.
            For an imported model (txl_dist.convert): {"step": 0, "tokens": 0, "imported": its source}.
        config: the run's complete config; for an imported model `model` and `data` alone.
        data: {"fingerprint", "vocab_size", "tokenizer": file -> SHA-256, "place": absolute path or URL} of the training
            data; for an imported model the fingerprint is None.
        files: size and SHA-256 of each file.
    """

    path: Path
    state: dict[str, Any]
    config: dict[str, Any]
    data: dict[str, Any]
    files: FileEntries

    @property
    def step(self) -> int:
        """Return the number of optimizer steps done."""
        step: int = self.state["step"]
        return step

    @property
    def valid_loss(self) -> float | None:
        """Return valid/loss of this very step, in nats per token; None if not evaluated or not finite."""
        loss: float | None = self.state.get("valid_loss")
        return loss if loss is not None and isfinite(loss) else None

    def validate(self, contents: bool = True) -> list[str]:
        """Compare every file with the manifest and return the errors, a line each; empty if all is well.

        Args:
            contents: compare SHA-256, too, which reads all files; otherwise sizes only.
        """
        with ThreadPoolExecutor(4) as pool:
            errors = pool.map(lambda name: self._file_error(name, contents), self.files)
            return [error for error in errors if error]

    def _file_error(self, name: str, contents: bool) -> str | None:
        path = self.path / name
        entry = self.files[name]
        try:
            if not path.is_file():
                return f"{path}: is {'not a file' if path.exists() else 'missing'}"
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{path}: has {size:,} bytes, but {entry['bytes']:,} in checkpoint.json"
            if contents and sha256_of_file(path) != entry["sha256"]:
                return f"{path}: SHA-256 differs from checkpoint.json"
        except OSError as error:
            return f"{path}: cannot be read: {error.strerror}"
        return None

    def inventory(self, kind: str) -> "Inventory":
        """Count the tensors and files of one kind (weights, optimizer, memory), reading headers only."""
        sizes = [prod(shape) for shape in self.shapes(kind).values()]
        files = [self.files[name]["bytes"] for name in self._files_of(kind)]
        return Inventory(len(sizes), sum(sizes), len(files), sum(files))

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of one kind by name, reading headers only."""

        def read_shapes(file: Any) -> dict[str, tuple[int, ...]]:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

        return self._read(kind, read_shapes)

    def tensors(self, kind: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Read the tensors of one kind by name, on the CPU: all of them, or those named.

        Raises:
            UserError: if a file cannot be read or a name is missing.
        """
        wanted = None if names is None else set(names)

        def read_tensors(file: Any) -> dict[str, Tensor]:
            chosen = file.keys() if wanted is None else wanted.intersection(file.keys())
            return {name: file.get_tensor(name) for name in chosen}

        tensors = self._read(kind, read_tensors)
        missing = sorted(wanted - tensors.keys()) if wanted else []
        if missing:
            raise UserError(f"{self.path}: holds no {kind} of {', '.join(missing[:5])} ({len(missing)} missing)")
        return tensors

    def fitting(self, kind: str, shapes: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
        """Read the tensors of one kind that `shapes` names, and check their shapes.

        Raises:
            UserError: if a file cannot be read, a name is missing or a shape differs.
        """
        tensors = self.tensors(kind, shapes)
        for name, shape in shapes.items():
            if list(tensors[name].shape) != list(shape):
                raise UserError(f"{self.path}: its {kind} of {name} are {list(tensors[name].shape)}, not {list(shape)}")
        return tensors

    def load_weights(self, model: nn.Module, average: bool = False) -> None:
        """Copy the weights, or their running average, into a model.

        A tied parameter is stored once, under the first of its names.

        Raises:
            UserError: if a file cannot be read, a name is missing or a shape differs.
        """
        kind = "optimizer" if average else "weights"
        prefix = "average/" if average else ""
        parameters = {prefix + name: parameter for name, parameter in model.named_parameters()}
        tensors = self.fitting(kind, {name: parameter.shape for name, parameter in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def _files_of(self, kind: str) -> list[str]:
        return [name for name in self.files if name.startswith(f"{kind}-")]

    def _read(self, kind: str, read: Callable[[Any], dict[str, Value]]) -> dict[str, Value]:
        """Merge what `read` returns for each opened safetensors file of one kind."""
        merged: dict[str, Value] = {}
        for name in self._files_of(kind):
            try:
                with safe_open(self.path / name, framework="pt") as file:
                    merged |= read(file)
            except (SafetensorError, OSError, *PARSE_ERRORS) as error:
                raise UserError(f"{self.path / name}: cannot be read: {describe(error)}") from error
        return merged


class Inventory(NamedTuple):
    """Number of tensors of one kind, of their elements, of their files and of the files' bytes."""

    tensors: int
    numbers: int
    files: int
    bytes: int


class CheckpointWriter:
    """Writes one checkpoint: every rank makes one and calls `add` for its tensors, then one rank calls `commit`.

    Attributes:
        files: size and SHA-256 of the files that this rank has written, for the manifest.
    """

    def __init__(self, run_dir: str, step: int, rank: int):
        self.target = directory(run_dir, step)
        self.partial = self.target.with_name(f".{self.target.name}.partial")
        self.rank = rank
        self.files: FileEntries = {}

    def add(self, kind: str, tensors: dict[str, Tensor]) -> None:
        """Write this rank's file of one kind and flush it to disk."""
        path = self.partial / f"{kind}-{self.rank:05d}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path)
        sync(path)
        self.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}

    def commit(self, files: FileEntries, state: dict[str, Any], config: dict[str, Any], data: dict[str, Any]) -> None:
        """Write the manifest and give the checkpoint its final name.

        A checkpoint of this step that is already there is damaged, because the run resumed before it: it is replaced.

        Args:
            files: the entries of all ranks' files.
        """
        manifest = {"format": "txl_dist checkpoint", "version": VERSION, "state": state, "data": data, "files": files}
        write_manifest(self.partial, manifest | {"config": config})
        if self.target.exists():
            replaced = self.target.with_name(f".{self.target.name}.replaced")
            os.replace(self.target, replaced)
            rename(self.partial, self.target)
            remove(replaced)
        else:
            rename(self.partial, self.target)

    def discard(self) -> None:
        """Remove what has been written so far."""
        shutil.rmtree(self.partial, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode of any new file; safetensors itself makes it private to its owner.

    Raises:
        OSError: if it cannot be written; the message names the file.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it does not name the file
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write checkpoint.json with the SHA-256 of everything else in it, and flush it to disk.

    Raises:
        OSError: if it cannot be written; the message names the file.
    """
    manifest = json.loads(json.dumps(manifest))  # as a reader will see it: tuples are lists, keys are strings
    path = folder / "checkpoint.json"
    try:
        path.write_text(json.dumps(manifest | {"sha256": sha256_of_json(manifest)}, indent=2) + "\n")
        sync(path)
    except OSError as error:  # the error of a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error


def directory(run_dir: str | Path, step: int) -> Path:
    """Return the directory of the checkpoint of a step."""
    return Path(run_dir) / "checkpoints" / f"step-{step:09d}"


def steps(run_dir: str | Path) -> list[int]:
    """Return the steps of all checkpoints in a run directory, valid or not, in ascending order."""
    folders = (Path(run_dir) / "checkpoints").glob("step-*")
    matches = [re.fullmatch(r"step-(\d{9,})", folder.name) for folder in folders]
    return sorted(int(match[1]) for match in matches if match)


def valid_checkpoints(
    run_dir: str | Path, steps: Iterable[int], contents: bool = False, report: Report = ignore
) -> Iterator[Checkpoint]:
    """Open the checkpoints of some steps, in the order given, and skip those that are not valid.

    Args:
        contents: compare SHA-256, too, which reads all files; otherwise manifests and sizes only.
        report: called with a line for each error of a checkpoint that is skipped.
    """
    for step in steps:
        try:
            checkpoint = open_checkpoint(directory(run_dir, step))
            errors = checkpoint.validate(contents)
        except UserError as error:
            errors = [str(error)]
        if not errors:
            yield checkpoint
        for error_line in errors:
            report(f"checkpoint of step {step:,} skipped: {error_line}")


def latest(run_dir: str | Path, contents: bool = False, report: Report = ignore) -> Checkpoint | None:
    """Open the latest valid checkpoint of a run; None if the run has no checkpoints at all.

    Args:
        contents: as for `valid_checkpoints`.
        report: as for `valid_checkpoints`.

    Raises:
        UserError: if the run has checkpoints and none is valid; it must not start from scratch unnoticed.
    """
    errors: list[str] = []

    def collect(line: str) -> None:
        errors.append(line)
        report(line)

    folder = Path(run_dir) / "checkpoints"
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"{folder}: is not a directory; restore the checkpoints, or remove it to start from the beginning"
        )
    existing = steps(run_dir)
    checkpoint = next(valid_checkpoints(run_dir, reversed(existing), contents, collect), None)
    if existing and not checkpoint:
        remedy = f"{folder}: holds no valid checkpoint; restore one, or remove {folder} to start from the beginning"
        raise UserError("\n".join([*errors, remedy]))
    return checkpoint


def best(run_dir: str | Path, contents: bool = False, report: Report = ignore) -> Checkpoint | None:
    """Open the valid checkpoint with the lowest valid/loss, the earliest of equals; None if none was evaluated.

    Args:
        contents: as for `valid_checkpoints`.
        report: as for `valid_checkpoints`.
    """
    valid = valid_checkpoints(run_dir, steps(run_dir), contents, report)
    evaluated = [checkpoint for checkpoint in valid if checkpoint.valid_loss is not None]
    return min(evaluated, key=lambda checkpoint: (checkpoint.valid_loss, checkpoint.step), default=None)


def run_dirs(patterns: Iterable[str]) -> list[str]:
    """Expand paths and globs to run directories, without repetitions; a glob matches those with checkpoints only."""
    return expand_globs(patterns, accepts=steps)


def find_checkpoint(run_dir: str, which: CheckpointChoice, contents: bool = False) -> Checkpoint:
    """Open the checkpoint that a user has chosen: of a step, the best, or by default (None) the latest valid one.

    The checks of the config have found it already; damaged ones that are skipped are logged as warnings.

    Raises:
        UserError: if the checkpoint of the chosen step, or every one, is damaged.
    """
    if isinstance(which, int):
        checkpoint = open_checkpoint(directory(run_dir, which))
        errors = checkpoint.validate(contents)
        if errors:
            raise UserError("\n".join(errors))
        return checkpoint
    choose = latest if which is None else best
    chosen = choose(run_dir, contents, log.warning)
    assert chosen, run_dir
    return chosen


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check the manifest of a checkpoint.

    Raises:
        UserError: if it is missing, damaged, of a version that cannot be read, or of another step.
    """
    file = path / "checkpoint.json"
    try:
        manifest = read_json(file)
        sha256 = manifest.pop("sha256", None)
        version = manifest["version"]
        if manifest["format"] != "txl_dist checkpoint" or version not in (1, VERSION):
            raise UserError(f"{file}: has version {shown(version)}; this txl_dist reads versions 1 and {VERSION}")
        if sha256 != sha256_of_json(manifest) and (sha256 or version != 1):
            raise UserError(f"{file}: its content differs from the sha256 in it")
        schema = ImportedManifest if "imported" in manifest["state"] else Manifest
        schema.model_validate(manifest)
        checkpoint = Checkpoint(path, manifest["state"], manifest["config"], manifest["data"], manifest["files"])
    except ConfigError as error:
        raise UserError(f"{file}: holds a config that cannot be read: {error.problems[0]}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except PARSE_ERRORS as error:
        raise UserError(f"{file}: is not a checkpoint's manifest ({describe(error)})") from error
    if path.name != directory("", checkpoint.step).name:
        raise UserError(f"{file}: is of step {checkpoint.step:,}, and does not belong in {path.name}")
    return checkpoint
