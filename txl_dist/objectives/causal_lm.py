"""Causal language modelling: predict each token from those before it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from txl_dist.config.schema import TrainJob
from txl_dist.data.index import Index
from txl_dist.data.lanes import LanePlan, Origin
from txl_dist.data.samples import SampleReader
from txl_dist.data.segments import NOT_SCORED, Segment, Segments, whole_split
from txl_dist.data.text_size import number_of_dimensions
from txl_dist.models.base import Batch
from txl_dist.objectives.base import Objective, Score


@dataclass(frozen=True)
class CausalLM(Objective):
    """The mean negative log-likelihood of the tokens of a segment.

    Attributes:
        first_scored: the first position of a segment that counts in training (train.loss).
    """

    first_scored: int = 0

    def segments(
        self, job: TrainJob, index: Index, lanes: Sequence[int], origin: Origin, start: int, stop: int
    ) -> Segments:
        """Return what `lanes` read of the training split, from step `start` up to `stop`."""
        plan = LanePlan(
            index.splits["train"].document_starts,
            job.data.num_lanes,
            job.stride,
            seed=job.run.seed,
            order=job.data.order,
            reset_memory=job.data.reset_memory,
            origin=origin,
            unit=index.aligned_length("train"),
        )
        reader = SampleReader(index, "train", fill_value=NOT_SCORED if job.data.on_error == "skip_sample" else None)
        return Segments(plan, reader, lanes, index.eos, start, stop, job.data.workers, job.model.lookback)

    def evaluation_segments(self, job: TrainJob, index: Index, split: str, lanes: Sequence[int]) -> Segments:
        """Return what `lanes` read of a split, of which all lanes together read every token once."""
        data = job.data
        tgt_len = job.evaluated_model.tgt_len
        return whole_split(index, split, data.num_lanes, tgt_len, data.reset_memory, lanes, data.workers)

    def num_targets(self, tgt_len: int) -> int:
        """Return tgt_len: every token is predicted."""
        return tgt_len

    def batch(self, segment: Segment) -> Batch:
        """Return inputs, targets and lookback of a segment, int64 [lanes, length]."""
        return {
            "inputs": torch.from_numpy(segment.inputs),
            "targets": torch.from_numpy(segment.targets),
            "lookback": torch.from_numpy(segment.lookback),
        }

    def counted(self, targets: Tensor) -> Tensor:
        """Return the positions that count in training, of [lanes, length]."""
        return targets[:, self.first_scored :]

    def metrics(self, score: Score, index: Index, split: str) -> dict[str, float]:
        """Return loss (nats per token), perplexity, and bits per byte of the text or per number of the sequences."""
        metrics = super().metrics(score, index, split)
        num_bytes = index.splits[split].bytes
        num_dimensions = number_of_dimensions(index, split, index.splits[split].tokens)
        if num_bytes:
            metrics["bits_per_byte"] = score.bits / num_bytes
        if num_dimensions:
            metrics["bits_per_dimension"] = score.bits / num_dimensions
        return metrics
