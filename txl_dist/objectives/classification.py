"""Classification of texts, or of pairs of them, and their scores: said at the end of what is read.

The input is that of XLNet's run_classifier.py: a <sep> b <sep> <cls>. A causal model whose tokenizer has no such pieces
reads <eos> a <eos> b <eos>, and its last state is what the head reads.
"""

from functools import partial
from typing import Any

import numpy as np

from txl_dist.config.schema import ClassificationConfig
from txl_dist.data.examples import ExampleSource, Place
from txl_dist.data.format import Examples
from txl_dist.data.index import Index
from txl_dist.data.segments import NOT_SCORED
from txl_dist.data.tokenizers import Tokenizer
from txl_dist.models.base import LanguageModel
from txl_dist.models.heads import ClassificationHead, ScoreHead, TaskHead
from txl_dist.objectives.base import Prediction
from txl_dist.objectives.example_metrics import classification_metrics, count_confusions, score_metrics
from txl_dist.objectives.examples import ExampleObjective


def classification_head(config: ClassificationConfig, examples: Examples, model: LanguageModel) -> TaskHead:
    """Build the head of a model: with an output for each class, or a single one for the score."""
    dropout = getattr(model.config, "dropout", 0.0) if config.dropout is None else config.dropout
    if examples.kind == "scores":
        return ScoreHead(model.output_width, dropout)
    return ClassificationHead(model.output_width, len(examples.labels), dropout)


class Classification(ExampleObjective):
    """The cross-entropy of an example's class, in nats, or the squared error of its score.

    Args:
        config: of the objective.
        examples: what kind of examples they are.
        tokenizer: of the data.
    """

    def __init__(self, config: ClassificationConfig, examples: Examples, tokenizer: Tokenizer):
        super().__init__(tokenizer, partial(classification_head, config, examples))
        self.max_tokens = config.max_tokens
        self.examples = examples
        self.is_score = examples.kind == "scores"

    @property
    def input_keys(self) -> tuple[str, ...]:
        """Return text, and for pairs text_pair."""
        return ("text", "text_pair") if self.examples.pairs else ("text",)

    def cut_pairs(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many tokens are left of both texts of some examples, int64 [examples] each.

        What is too long loses its last tokens: of a pair the longer text, until both are as long (the authors'
        `_truncate_seq_pair`).
        """
        if self.max_tokens is None:
            return first, second
        room = self.max_tokens - self.marks.count(1 + self.examples.pairs)
        kept = np.minimum(second, np.maximum(room // 2, room - first)) if self.examples.pairs else second
        return np.minimum(first, room - kept), kept

    def count_segments(self, source: ExampleSource, tgt_len: int) -> np.ndarray:
        """Return how many segments each example has: int64 [examples]."""
        first, second = self.cut_pairs(source.first, source.second)
        segments: np.ndarray = -(-(first + second + self.marks.count(1 + self.examples.pairs)) // tgt_len)
        return segments

    def tokens_of(self, source: ExampleSource, example: int, tgt_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of an example with their marks, and their kinds: int64 [n] both."""
        tokens = source.tokens(example)
        border = source.first[example]
        first, second = self.cut_pairs(source.first[example], source.second[example])
        texts = [tokens[:first], tokens[border : border + second]]
        return self.marks.around(*texts[: 1 + self.examples.pairs])

    def target(self, source: ExampleSource, place: Place, tgt_len: int, is_last: bool) -> np.ndarray | None:
        """Return the class or the score of an example at its last segment; where it is not known, something."""
        if not is_last:
            return None
        value = 0.0 if source.table is None else source.table["value"][place.example]
        return np.array([value], self.no_target(0).dtype)

    def no_target(self, tgt_len: int) -> np.ndarray:
        """Return what is no class, or no score."""
        return np.array([np.nan], np.float32) if self.is_score else np.array([NOT_SCORED])

    def measure(
        self, predictions: list[Prediction], source: ExampleSource, index: Index, split: str
    ) -> dict[str, float]:
        """Return accuracy, F1 and Matthews correlation; of scores the Pearson and the Spearman correlation."""
        outputs, true = self.outputs_and_truth(predictions, source)
        if self.is_score:
            return score_metrics(outputs[:, 0], true)
        return classification_metrics(outputs.argmax(axis=1), true.astype(np.int64), len(self.examples.labels))

    def confusions(self, predictions: list[Prediction], source: ExampleSource) -> dict[str, Any]:
        """Return the labels, and how often each (row) is taken for which (column); nothing of scores."""
        if self.is_score:
            return {}
        labels = self.examples.labels
        outputs, true = self.outputs_and_truth(predictions, source)
        counts = count_confusions(outputs.argmax(axis=1), true.astype(np.int64), len(labels))
        return {"labels": labels, "confusions": counts.tolist()}

    def outputs_and_truth(self, predictions: list[Prediction], source: ExampleSource) -> tuple[np.ndarray, np.ndarray]:
        """Return the outputs of the head [examples, width], and the class or score of each: float64 [examples]."""
        assert source.table is not None
        outputs = np.stack([prediction.outputs for prediction in predictions])
        return outputs, source.table["value"][[prediction.place.example for prediction in predictions]]
