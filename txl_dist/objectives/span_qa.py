"""Question answering: the answer is a span of a passage, or there is none.

The input is that of XLNet's run_squad.py, the passage first: passage <sep> question <sep> <cls>. A causal model needs
the question first (objective.passage_first=false). A passage that does not fit beside its question is read in windows
of one segment each, all with the question; the lane remembers the windows before.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from txl_dist.config.schema import SpanQAConfig
from txl_dist.data.examples import ExampleSource, Place
from txl_dist.data.index import Index
from txl_dist.data.segments import NOT_SCORED
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.models.base import LanguageModel
from txl_dist.models.heads import BeamSpanHead, SpanHead, SpanPredictions, TaskHead
from txl_dist.objectives.answers import Answer, find_answer
from txl_dist.objectives.base import Prediction
from txl_dist.objectives.examples import SECOND, ExampleObjective
from txl_dist.objectives.squad import AnswerScores

NO_ANSWER_FROM = 0.0  # above it, what a head says of no answer is that this is likelier than any


def span_head(config: SpanQAConfig, model: LanguageModel) -> TaskHead:
    """Build the head of a model."""
    if config.head == "beam":
        return BeamSpanHead(model.output_width, getattr(model.config, "layer_norm_eps", 1e-5))
    return SpanHead(model.output_width)


class Windows(NamedTuple):
    """How a passage is cut: every window but the first is full, and the last one ends with the passage.

    Attributes:
        passage: its length, in tokens.
        room: how many of them a window holds.
        stride: how many tokens from the end of a window to that of the next one.
    """

    passage: int
    room: int
    stride: int

    @property
    def number(self) -> int:
        """How many windows there are."""
        return 1 + max(0, -(-(self.passage - self.room) // self.stride))

    def span(self, number: int) -> tuple[int, int]:
        """Return the passage's tokens, from which to before which, that a window has."""
        end = self.passage - (self.number - 1 - number) * self.stride
        return max(0, end - self.room), end


class SpanQA(ExampleObjective):
    """The cross-entropy of where an answer starts and ends, and of whether there is one, in nats.

    Args:
        config: of the objective.
        tokenizer: of the data.
    """

    def __init__(self, config: SpanQAConfig, tokenizer: Tokenizer):
        super().__init__(tokenizer, partial(span_head, config))
        self.config = config
        self.tokenizer = tokenizer

    @property
    def input_keys(self) -> tuple[str, ...]:
        """Return context, the passage, and question."""
        return "context", "question"

    def windows(self, passage: int, question: int, tgt_len: int) -> Windows:
        """Return how a passage is cut that is read beside a question of so many tokens."""
        room = tgt_len - self.marks.count(2) - min(question, self.config.max_question_tokens)
        return Windows(passage, room, min(self.config.doc_stride or room, room))

    def windows_of(self, source: ExampleSource, example: int, tgt_len: int) -> Windows:
        """Return how the passage of an example is cut."""
        return self.windows(int(source.first[example]), int(source.second[example]), tgt_len)

    def count_segments(self, source: ExampleSource, tgt_len: int) -> np.ndarray:
        """Return how many windows each example has: int64 [examples]."""
        return np.array([self.windows_of(source, example, tgt_len).number for example in range(len(source))])

    def tokens_of(self, source: ExampleSource, example: int, tgt_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Return all windows of an example, one after the other, and their kinds: int64 [n] both."""
        tokens = source.tokens(example)
        passage = tokens[: source.first[example]]
        question = tokens[source.first[example] :][: self.config.max_question_tokens]
        windows = self.windows_of(source, example, tgt_len)
        pieces = []
        for number in range(windows.number):
            begin, end = windows.span(number)
            if self.config.passage_first:
                pieces.append(self.marks.around(passage[begin:end], question))
            else:
                pieces.append(self.marks.around(question, passage[begin:end], first=SECOND))
        return np.concatenate([tokens for tokens, _ in pieces]), np.concatenate([kinds for _, kinds in pieces])

    def passage_positions(self, source: ExampleSource, place: Place, tgt_len: int) -> tuple[range, int]:
        """Return the positions of a segment that have tokens of the passage, and the number of the first of these."""
        windows = self.windows_of(source, place.example, tgt_len)
        begin, end = windows.span(place.segment)
        padding = windows.room - (end - begin)
        before = len(self.marks.before)
        if not self.config.passage_first:
            before += tgt_len - self.marks.count(2) - windows.room + 1  # the question, and its <sep>
        return range(padding + before, padding + before + end - begin), begin

    def target(self, source: ExampleSource, place: Place, tgt_len: int, is_last: bool) -> np.ndarray | None:
        """Return start and end of the answer in a window, and then for each position whether it can be there.

        Where it is not in the window, both are the last position; so they are where it is not known.
        """
        no_answer = tgt_len - 1
        positions, first = self.passage_positions(source, place, tgt_len)
        allowed = np.zeros(tgt_len, np.int64)
        allowed[[*positions, no_answer]] = 1
        start, end = (-1, -1) if source.table is None else source.table[["start", "end"]][place.example]
        if first <= start and end < first + len(positions):  # -1: there is none
            span = (positions[start - first], positions[end - first])
        else:
            span = (no_answer, no_answer)
        return np.concatenate([span, allowed])

    def no_target(self, tgt_len: int) -> np.ndarray:
        """Return that nothing is scored; an answer could be anywhere."""
        return np.array([NOT_SCORED, NOT_SCORED] + [1] * tgt_len)

    def find_answers(self, predictions: Iterable[Prediction], source: ExampleSource) -> dict[int, Answer]:
        """Return the answer to each question, by the number of the example."""
        windows: defaultdict[int, list[Prediction]] = defaultdict(list)
        for prediction in sorted(predictions, key=lambda prediction: prediction.place):
            windows[prediction.place.example].append(prediction)
        return {example: self.find_answer(of_example, source) for example, of_example in sorted(windows.items())}

    def find_answer(self, windows: list[Prediction], source: ExampleSource) -> Answer:
        """Return the answer to a question from what is predicted of all windows on its passage."""
        tokens = np.full((len(windows), windows[0].tgt_len), -1)
        for row, window in zip(tokens, windows, strict=True):
            positions, first = self.passage_positions(source, window.place, window.tgt_len)
            row[positions.start : positions.stop] = np.arange(first, first + len(positions))
        outputs = torch.from_numpy(np.stack([window.outputs for window in windows]))
        return find_answer(SpanPredictions.unpack(outputs), tokens, self.config.max_answer_tokens)

    def measure(
        self, predictions: list[Prediction], source: ExampleSource, index: Index, split: str
    ) -> dict[str, float]:
        """Return exact match and F1, in percent, of answers that are withheld where no answer is likelier.

        Where some questions have no answer, also those with the thresholds that are best for this split.
        """
        answers = self.find_answers(predictions, source)
        texts, no_answer, true = {}, {}, {}
        numbers = iter(range(len(source)))
        for paragraph in index.paragraphs(split):
            _, offsets = self.tokenizer.encode_with_offsets(paragraph.context)
            for question in paragraph.questions:
                answer = answers[next(numbers)]
                texts[question.id] = text_of(answer, paragraph.context, offsets)
                no_answer[question.id] = answer.no_answer
                true[question.id] = question.answers
        scores = AnswerScores.of(texts, no_answer, true)
        if scores.has_answer.all():
            return renamed(scores.metrics())
        _, best_exact_match = scores.best_threshold("exact_match")
        threshold, best_f1 = scores.best_threshold("f1")
        best = {"best_exact_match": best_exact_match, "best_answer_f1": best_f1, "best_threshold": threshold}
        return renamed(scores.metrics(NO_ANSWER_FROM)) | best


def text_of(answer: Answer, context: str, offsets: np.ndarray) -> str:
    """Return the text of an answer in its passage; "" where there is none.

    Args:
        offsets: int64 [tokens, 2], as `Tokenizer.encode_with_offsets` returns them.
    """
    if not answer.spans:
        return ""
    best = answer.spans[0]
    return context[offsets[best.start, 0] : offsets[best.end, 1]]


def renamed(metrics: dict[str, float]) -> dict[str, float]:
    """Return metrics of answers, in percent, with a name for F1 that is not that of classes."""
    return {("answer_f1" if name == "f1" else name): value for name, value in metrics.items()}
