"""Say the class or the score of texts, or answer questions: txl-predict run=RUN_DIR < FILE."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from txl_dist.cli import command, read_standard_input
from txl_dist.config.schema import PredictJob
from txl_dist.errors import UserError, describe_os_error

if TYPE_CHECKING:
    from txl_dist.evaluation.example_inputs import Input
    from txl_dist.evaluation.predicting import Predictor

AT_ONCE = 1024  # examples, between two prints


def predict(job: PredictJob) -> None:
    """Print a JSON line for each example, or with output=squad one object.

    Raises:
        UserError: where the checkpoint or the examples cannot be read.
    """
    from txl_dist.evaluation.example_inputs import read_inputs  # with torch: not for --help
    from txl_dist.evaluation.predicting import Predictor

    predictor = Predictor.open(job.run, job.checkpoint, job.model, job.average, job.num_lanes)
    keys = predictor.objective.input_keys
    if job.output == "squad" and "question" not in keys:
        raise UserError("output=squad: is for questions; leave it out")
    inputs = read_inputs(read_data(job.file), job.file or "standard input", job.input, keys)
    said = said_of(predictor, inputs, job.threshold)
    if job.output == "squad":
        print(json.dumps({one["id"]: one["answer"] for one in said}))
        return
    for one in said:
        print(json.dumps(one), flush=True)


def read_data(file: str | None) -> bytes:
    """Read a file, or standard input."""
    if file is None:
        return read_standard_input("file")
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"file={file}: cannot be read: {describe_os_error(error)}") from error


def said_of(predictor: "Predictor", inputs: "Sequence[Input]", threshold: float | None) -> Iterator[dict[str, Any]]:
    """Yield what is said of each example, with its id or its texts."""
    for start in range(0, len(inputs), AT_ONCE):
        part = inputs[start : start + AT_ONCE]
        texts = [example.texts for example in part]
        if "question" in predictor.objective.input_keys:
            answers = predictor.answer(texts, threshold)  # type: ignore[arg-type]
            yield from ({"id": example.id, **answer} for example, answer in zip(part, answers, strict=True))
        else:
            said = predictor.classify(texts)  # type: ignore[arg-type]
            for example, one in zip(part, said, strict=True):
                yield dict(zip(predictor.objective.input_keys, example.texts, strict=True)) | one


def main() -> None:
    command("predict", PredictJob, predict)


if __name__ == "__main__":
    main()
