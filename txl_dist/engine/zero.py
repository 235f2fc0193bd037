"""Data-parallel training by DeepSpeed's ZeRO, stages 0 to 3: every rank has the whole model, or its shards of it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from txl_dist.config.schema import TrainJob
from txl_dist.data.segments import Segment
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.engine.deepspeed_internals import forget_pipeline_grid
from txl_dist.engine.engine import Engine, LocalModule, Start, build_model, parameter_names
from txl_dist.evaluation.likelihood import read_segments
from txl_dist.evaluation.memory_use import ShowLosses
from txl_dist.models.base import Batch
from txl_dist.objectives.base import Objective, micro_batches


class ZeroEngine(Engine):
    """Train all layers on this rank's lanes."""

    def __init__(
        self,
        job: TrainJob,
        objective: Objective,
        vocab_size: int,
        group: ProcessGroup,
        start: Start,
    ):
        forget_pipeline_grid()
        model = build_model(job, vocab_size, start, objective.head)
        targets = objective.num_targets(job.model.tgt_len)
        training_flops = model.training_flops(job.data.num_lanes, targets) * job.train.tbptt
        layers = range(len(model.layers))
        local = LocalModule(model, objective, layers, model, parameter_names(model), training_flops)
        super().__init__(job, group, local, start)

    def forward_backward_step(self, batch: Batch) -> Tensor:
        """Return the mean loss of this rank's scored targets, in nats per token."""
        noise = self.noise()
        losses = []
        for rows, micro_batch in micro_batches(batch, self.split.accumulation):
            nats, memory = self.deepspeed(micro_batch, self.memory.read(rows), noise.of_rows(rows))
            self.memory.write(rows, memory)
            loss, lane_losses = self.objective.loss(nats, self.loss_weight)
            losses.append(loss)
            self.guard.lane_losses.append(lane_losses)
            self.deepspeed.backward(loss)
            self.deepspeed.step()
        return torch.stack(losses).detach().mean()

    def score(self, segments: Iterable[Segment], show: ShowLosses | None = None) -> tuple[Tensor, int]:
        """Return the nats and the number of the scored tokens of this rank's lanes."""
        device = self.group.device
        empty = self.model.empty_memory if show else self.model.empty_cache  # states are to be seen as they are
        memories = [empty(self.split.micro_batch, device) for _ in range(self.split.accumulation)]
        return read_segments(self.deepspeed, self.objective, memories, segments, device, show)
