"""Data-parallel training by DeepSpeed's ZeRO, stages 0 to 3: every rank has the whole model, or its shards of it."""

from collections.abc import Iterable

import torch
from deepspeed.utils import groups
from torch import Tensor, nn

from txl_dist.data.segments import Segment
from txl_dist.engine.engine import Engine
from txl_dist.evaluation.likelihood import row_slices, score, tensors
from txl_dist.models.transformer_xl import TransformerXL


class ZeroEngine(Engine):
    def part(self, model: TransformerXL) -> tuple[TransformerXL, range, nn.Module]:
        groups.mpu = None  # DeepSpeed would keep the grid of a pipeline that this process has trained before
        return model, range(len(model.layers)), model

    def forward_backward_step(self, segment: Segment) -> Tensor:
        losses = []
        for rows in row_slices(len(self.lanes), self.split.accumulation):
            nats, remembered = self.deepspeed(*tensors(segment, rows), self.memory.read(rows))
            self.memory.write(rows, remembered)
            counted = nats[:, self.job.first_scored :] * self.weight
            losses.append(counted.mean())
            self.guard.lane_losses.append(counted.detach().mean(dim=1))
            self.deepspeed.backward(losses[-1])
            self.deepspeed.step()
        return torch.stack(losses).detach().mean()

    def score(self, segments: Iterable[Segment]) -> tuple[float, int]:
        micro_batches = self.split.accumulation
        mine = score(self.model, segments, self.group.device, len(self.lanes), micro_batches, forward=self.deepspeed)
        return mine.nats, mine.tokens
