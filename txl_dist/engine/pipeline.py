"""Pipeline-parallel training by DeepSpeed's PipelineEngine: each rank has some of the layers, and their memories.

    stage 0                       stage 1                       last stage
    embedding, layers 0 ... i     layers i + 1 ... j            layers j + 1 ..., softmax, loss
    (layer, lane) memories        (layer, lane) memories        (layer, lane) memories
          |  hidden, reach, rows        |  hidden, reach, rows        |
          +---------------------------->+---------------------------->+

Of a micro-batch its hidden states cross, and two kinds of small integers: `reach` and the rows, which say of whose
lanes the states are. A memory never leaves its stage.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.utils import partition_balanced
from torch import Tensor, nn

from txl_dist.data.segments import NOT_SCORED, Segment
from txl_dist.engine.anomaly_guard import AnomalyGuard
from txl_dist.engine.engine import Engine
from txl_dist.evaluation.likelihood import row_slices, tensors
from txl_dist.models.flops import flops
from txl_dist.models.memory import Memory
from txl_dist.models.transformer_xl import TransformerXL

Arriving = tuple[Tensor, Tensor, Tensor]  # tokens or hidden states, reach, rows


class Stage(nn.Module):
    """A part of a model: the layers of one stage; the first stage has the embedding as well, the last the softmax.

    Attributes:
        memory: what these layers read and write. Rows are computed again by activation checkpointing only within the
            layers, so `forward` runs once for each micro-batch.
        weight: the engine's.
        guard: is told the losses of the lanes.
    """

    memory: Memory
    weight: float
    guard: AnomalyGuard

    def __init__(self, model: TransformerXL, layers: range, first: bool, last: bool, first_scored: int):
        super().__init__()
        self.model, self.first, self.last, self.first_scored = model, first, last, first_scored
        model.layers = model.layers[layers.start : layers.stop]
        if not first:
            del model.embedding
        if not last:
            del model.softmax

    def forward(self, arriving: Arriving) -> Tensor | Arriving:
        """What the stage before sends -> what the stage after gets: hidden [rows, length, d_model], reach, rows."""
        hidden, lookback, rows = arriving
        if self.first:
            hidden = self.model.embed(hidden)
        hidden, remembered = self.model.through_layers(hidden, lookback, self.memory.read(rows))
        self.memory.write(rows, remembered)
        return hidden if self.last else (hidden, lookback, rows)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """In training the weighted mean of a micro-batch's counted positions; in evaluation the sum of all."""
        nats = self.model.predict(hidden, targets)
        if not self.training:
            return nats.double().sum()
        counted = nats[:, self.first_scored :] * self.weight
        self.guard.lane_losses.append(counted.detach().mean(dim=1))
        return counted.mean()


class Pipeline(PipelineModule):
    """One Stage a rank, and the parameters that the first and the last stage share.

    DeepSpeed ties whole modules. Embedding and softmax are different ones that share some parameters: those are tied
    here. DeepSpeed adds up the gradients of what `get_tied_weights_and_groups` tells.
    """

    def __init__(self, stage: Stage, number: int, stages: int):
        modules = [stage if i == number else nn.Identity() for i in range(stages)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its partition
            super().__init__(modules, num_stages=stages, partition_method="uniform", loss_fn=stage.loss)
        assert self.stage_id == number
        self.tied: list[Any] = []

    def tie(self, parameters: list[Any]) -> None:
        """Tie the first stage's parameters to those of the last, given in the same order; all ranks must call it."""
        if not parameters:
            return
        stage_ranks = [self._topo.filter_match(pipe=stage) for stage in (0, self.num_stages - 1)]
        for first, last in zip(*stage_ranks, strict=True):
            group = torch.distributed.new_group([first, last])
            if self.global_rank in (first, last):
                self.tied, self.tied_group = parameters, group
            if self.global_rank == last:
                for parameter in parameters:
                    parameter.ds_pipe_replicated = True  # counts once in the gradient's norm

    def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
        return [(parameter, self.tied_group) for parameter in self.tied]


class PipelineEngine(Engine):
    def part(self, model: TransformerXL) -> tuple[TransformerXL, range, nn.Module]:
        number, stages = self.split.stage(self.group.rank), self.split.stages
        costs = flops(model.config, sum(model.softmax.sizes), self.split.micro_batch)
        self.cut = self.job.engine.stage_layers or balanced(costs, stages)
        ends = list(accumulate(self.cut))
        layers = range(ends[number] - self.cut[number], ends[number])
        embedding = set(model.embedding.parameters())
        tied = [parameter for parameter in model.softmax.parameters() if parameter in embedding]
        self.stage = Stage(model, layers, number == 0, number == stages - 1, self.job.first_scored)
        self.stage.guard = self.guard
        if not (self.stage.first or self.stage.last):
            self.lanes = range(0)  # what a middle stage reads comes from the stage before
        deepspeed.init_distributed(dist_init_required=False)  # its own view of the process group
        pipeline = Pipeline(self.stage, number, stages)
        pipeline.tie(tied)
        return model, layers, pipeline

    def forward_backward_step(self, segment: Segment) -> Tensor:
        self.stage.memory, self.stage.weight = self.memory, self.weight
        return self.deepspeed.train_batch(self.micro_batches(segment))

    def score(self, segments: Iterable[Segment]) -> tuple[float | Tensor, int]:
        self.stage.memory = memory = self.empty_memory(self.model.config)
        nats, tokens = torch.zeros((), dtype=torch.float64, device=self.group.device), 0
        self.deepspeed.reset_activation_shape()  # lengths may differ from training's
        for segment in segments:
            losses = self.deepspeed.eval_batch(self.micro_batches(segment), reduce_output=None, bcast_loss=False)
            memory.commit()
            if self.stage.last:
                nats += torch.stack(losses).sum()
                tokens += int((segment.targets != NOT_SCORED).sum())
        self.deepspeed.reset_activation_shape()
        return nats, tokens

    def micro_batches(self, segment: Segment) -> Iterator[tuple[Arriving, Tensor]]:
        """What the first stage reads, and the last stage's targets."""
        numbers = torch.arange(len(segment.inputs))
        for rows in row_slices(len(numbers), self.split.accumulation):
            inputs, targets, lookback = tensors(segment, rows)
            yield (inputs, lookback, numbers[rows]), targets

    def global_grad_norm(self, norm: Tensor) -> Tensor:
        squares = norm.square()
        torch.distributed.all_reduce(squares, group=self.deepspeed.grid.get_pipe_parallel_group())
        return squares.sqrt()

    def __str__(self) -> str:
        stages, micro_batches = self.split.stages, self.split.accumulation
        idle = (stages - 1) / (micro_batches + stages - 1)
        return (
            f"{super().__str__()}, {stages} stages of {'+'.join(map(str, self.cut))} layers "
            f"(idle {idle:.0%} of a step of {micro_batches} micro-batches)"
        )


def balanced(costs: list[float], stages: int) -> list[int]:
    """How many layers each stage gets, so that the costliest one costs as little as can be.

    Args:
        costs: of the embedding, of each layer and of the softmax.
    """
    borders = [min(max(int(border) - 1, 0), len(costs) - 2) for border in partition_balanced(costs, stages)]
    return [end - start for start, end in pairwise(borders)]
