"""A run that is asked: the model of its checkpoint, and the data that it was trained on."""

from pathlib import Path

import torch
from pydantic import TypeAdapter

from txl_dist.checkpoint.format import Checkpoint, find_checkpoint
from txl_dist.config.checks import model_fits_together
from txl_dist.config.schema import CheckpointChoice, LengthsConfig, ModelConfig
from txl_dist.data import tokenizers
from txl_dist.data.index import Index
from txl_dist.errors import ConfigError, UserError
from txl_dist.files.atomic import sha256_of_file
from txl_dist.models.transformer_xl import TransformerXL, parameter_shapes


def load_model(
    run: str, which: CheckpointChoice, lengths: LengthsConfig, average: bool = False
) -> tuple[TransformerXL, Checkpoint]:
    """The model of a run's checkpoint, ready to be asked, with the lengths that are given.

    Raises:
        ConfigError: where those do not fit together, or an average is wanted that was not kept.
    """
    checkpoint = find_checkpoint(run, which)
    config = lengths.of(TypeAdapter(ModelConfig).validate_python(checkpoint.config["model"]))
    vocab_size = checkpoint.data["vocab_size"]
    problems = list(model_fits_together(config))
    lacking = no_average(checkpoint) if average else None
    if lacking:
        problems.append(f"average=true: {run} {lacking}; leave it out")
    if problems:
        raise ConfigError(problems)
    found = checkpoint.shapes("weights")  # compared first: a damaged config may ask for a model of any size
    if wrong := [
        f"{checkpoint.path}: its weights of {name} are {list(found.get(name, []))}, not {list(shape)}"
        for name, shape in parameter_shapes(config, vocab_size, len(found)).items()
        if found.get(name) != shape
    ]:
        raise UserError(wrong[0])
    model = TransformerXL(config, vocab_size)
    checkpoint.load_weights(model, average)
    if torch.cuda.is_available():
        model.cuda()
    else:
        model.store_long_rows()
    return model.eval(), checkpoint


def no_average(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint holds no averaged weights, if it does not."""
    if "imported" in checkpoint.state:
        return "is an imported model, which has none"
    since = checkpoint.config["optimizer"].get("average_from")
    if since is None:
        return "has kept none, which only a run that was started with optimizer.average_from=STEP does"
    if checkpoint.step < since:
        return f"has none at step {checkpoint.step:,}: it keeps them from step {since:,} on"
    return None


def encode_text(tokenizer: tokenizers.Tokenizer, text: str | bytes, key: str) -> list[int]:
    """Tokens of a text that a user has given: of bytes as they are, also those of an argument that is not UTF-8.

    Raises:
        UserError: where the tokenizer needs UTF-8, and the text is not.
    """
    try:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        return tokenizer.encode(data, end=False).tolist()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: byte {error.start + 1:,} (0x{error.object[error.start]:02X}) is not UTF-8, and the tokenizer of "
            f"this run ({tokenizer.kind}) reads nothing else; convert the text first: iconv -f LATIN1 -t UTF-8"
        ) from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key}: character {error.start + 1:,} is half of a surrogate pair, which is no text"
        ) from error


def load_tokenizer(run: str, checkpoint: Checkpoint) -> tokenizers.Tokenizer:
    """The tokenizer in the run's directory.

    Raises:
        UserError: where it cannot be read, or is not the one that the checkpoint tells.
    """
    folder = Path(run) / "tokenizer"
    tokenizer = tokenizers.load(folder)
    for name, sha256 in checkpoint.data.get("tokenizer", {}).items():
        if not (folder / name).is_file() or sha256_of_file(folder / name) != sha256:
            raise UserError(f"{folder / name}: is damaged; copy it from the dataset's tokenizer/")
    return tokenizer


def place_of_data(run: str, checkpoint: Checkpoint) -> str | None:
    """Where a run has read its data, None where an imported model names none: their absolute place if something is
    there, else as it was given.

    Raises:
        ConfigError: where nothing is there either.
    """
    given, absolute = checkpoint.config["data"]["dir"], checkpoint.data.get("place")
    places = [place for place in (absolute, given) if place is not None]
    for place in places:
        if "://" in place or Path(place).expanduser().exists():
            return place
    if not places:
        return None
    raise ConfigError([f"data_dir: is missing; the data of {run} are no longer at {places[0]}; give their place now"])


def open_data(run: str, data_dir: str | None, split: str, checkpoint: Checkpoint) -> Index:
    """The data that a run was trained on; of an imported model any that have its tokenizer.

    Raises:
        ConfigError: where they are gone, are others, or have no such split.
    """
    imported, tokenizer = "imported" in checkpoint.state, Path(run) / "tokenizer"
    place = data_dir or place_of_data(run, checkpoint)
    if place is None:
        raise ConfigError(
            [f"data_dir: is missing; give data prepared with the tokenizer of the imported model, {tokenizer}"]
        )
    index = Index.open(place)
    problems = []
    if imported:
        if index.tokenizer_files != {path.name: sha256_of_file(path) for path in tokenizer.iterdir()}:
            problems.append(f"data_dir={place}: its tokenizer is another than that of the imported model, {tokenizer}")
    elif index.fingerprint != checkpoint.data["fingerprint"]:
        problems.append(
            f"data_dir={place}: is not what the run {Path(run)} was trained on; give the place of that data"
        )
    if index.vocab_size != (vocab_size := checkpoint.data["vocab_size"]):
        problems.append(
            f"data_dir={place}: its vocabulary is of {index.vocab_size:,} tokens, the run's of {vocab_size:,}"
        )
    if split not in index.splits:
        problems.append(f"split={split}: {place} has {', '.join(index.splits)}")
    if problems:
        raise ConfigError(problems)
    return index
