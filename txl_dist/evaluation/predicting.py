"""What a model that has learnt a task says of examples.

from txl_dist.evaluation.predicting import Predictor
Predictor.open("runs/sst2").classify(["a gripping film"])
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from txl_dist.config.schema import ModelChanges
from txl_dist.config.types import CheckpointChoice
from txl_dist.data.examples import ExampleSource
from txl_dist.data.segments import Segment
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.errors import UserError
from txl_dist.evaluation.likelihood import read_segments
from txl_dist.models.base import Batch, LanguageModel
from txl_dist.objectives.base import Prediction, Score
from txl_dist.objectives.classification import Classification
from txl_dist.objectives.examples import ExampleObjective
from txl_dist.objectives.span_qa import SpanQA, text_of
from txl_dist.runs.load import load_task, load_tokenizer

Watch = Callable[[Iterable[Segment], int], Iterable[Segment]]  # shows how far a loop over so many segments is


def score_examples(
    model: LanguageModel,
    objective: ExampleObjective,
    source: ExampleSource,
    num_lanes: int,
    watch: Watch = lambda segments, total: segments,
) -> Score:
    """Read each example once; return the losses, and what is predicted.

    Args:
        num_lanes: examples that are read at once.
    """
    predictions: list[Prediction] = []

    def collect(result: Tensor, batch: Batch) -> None:
        predictions.extend(objective.predictions(result, batch))

    lanes = range(min(num_lanes, len(source)))
    device = next(model.parameters()).device
    segments = objective.one_pass(source, len(lanes), model.config.tgt_len, lanes)
    cache = model.empty_cache(len(lanes), device)
    loss, targets = read_segments(model, objective, [cache], watch(segments, len(segments)), device, collect)
    return Score(loss.item(), targets, predictions)


@dataclass(frozen=True)
class Predictor:
    """A model that has learnt a task, with its tokenizer.

    Attributes:
        num_lanes: examples that are read at once.
    """

    model: LanguageModel
    objective: ExampleObjective
    tokenizer: Tokenizer
    num_lanes: int = 16

    @classmethod
    def open(
        cls,
        run: str,
        which: CheckpointChoice = None,
        changes: ModelChanges | None = None,
        average: bool = False,
        num_lanes: int = 16,
    ) -> "Predictor":
        """Load the checkpoint of a run; arguments and errors are those of `runs.load.load_task`."""
        model, objective, checkpoint = load_task(run, which, changes, average)
        return cls(model, objective, load_tokenizer(run, checkpoint), num_lanes)

    def classify(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, Any]]:
        """Return of each text, or pair of texts, its label and the probability of each; or its score.

        Raises:
            UserError: where a text has no token, or the model answers questions.
        """
        if not isinstance(self.objective, Classification):
            raise UserError("the model answers questions; give passages and questions to `answer`")
        pairs = [(text,) if isinstance(text, str) else text for text in texts]
        source = self.source(pairs)
        outputs = torch.from_numpy(np.stack([row.outputs for row in self.predict(source)]))
        if self.objective.is_score:
            return [{"score": score} for score in outputs[:, 0].tolist()]
        labels = self.objective.examples.labels
        rows = outputs.softmax(dim=1).tolist()
        best = outputs.argmax(dim=1).tolist()
        return [
            {"label": labels[number], "probabilities": dict(zip(labels, row, strict=True))}
            for number, row in zip(best, rows, strict=True)
        ]

    def answer(self, questions: Sequence[tuple[str, str]], threshold: float | None = None) -> list[dict[str, Any]]:
        """Return the answer to each question, given as passage and question.

        That is the text, "" where none is given, and where it begins in the passage, in characters; its log-probability
        in nats, and no_answer, which is higher where it is likelier that there is none.

        Args:
            threshold: no answer is given where no_answer is above it; None: always one.

        Raises:
            UserError: where a text has no token, or the model does not answer questions.
        """
        if not isinstance(self.objective, SpanQA):
            raise UserError("the model answers no questions; give texts to `classify`")
        source = self.source(questions)
        answers = self.objective.find_answers(self.predict(source), source)
        found = []
        for (passage, _), answer in zip(questions, answers.values(), strict=True):
            _, offsets = self.tokenizer.encode_with_offsets(passage)
            text = text_of(answer, passage, offsets)
            if threshold is not None and answer.no_answer > threshold:
                text = ""
            best = answer.spans[0] if text else None
            found.append(
                {
                    "answer": text,
                    "start": None if best is None else int(offsets[best.start, 0]),
                    "log_prob": None if best is None else best.log_prob,
                    "no_answer": answer.no_answer,
                }
            )
        return found

    def source(self, texts: Sequence[tuple[str, ...]]) -> ExampleSource:
        """Encode examples of one or two texts each.

        Raises:
            UserError: where a text has no token.
        """
        encoded = []
        for number, pair in enumerate(texts):
            first, *second = [self.tokenizer.encode(text.encode(), end=False) for text in pair]
            if not len(first) or any(not len(tokens) for tokens in second):
                raise UserError(f"example {number:,}: has a text without a token, {pair}")
            encoded.append((first, second[0] if second else first[:0]))
        return ExampleSource.of_texts(encoded)

    def predict(self, source: ExampleSource) -> list[Prediction]:
        """Return the predictions of all segments that have one, in the order of the examples."""
        score = score_examples(self.model, self.objective, source, self.num_lanes)
        return sorted(score.predictions, key=lambda prediction: prediction.place)
