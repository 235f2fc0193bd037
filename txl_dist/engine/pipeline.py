"""Pipeline-parallel training by DeepSpeed's PipelineEngine: each rank has some of the layers, and their memories.

    stage 0                       stage 1                       last stage
    embedding, layers 0 ... i     layers i + 1 ... j            layers j + 1 ..., softmax, loss
    (layer, lane) memories        (layer, lane) memories        (layer, lane) memories
          |  carry, rows                |  carry, rows                |
          +---------------------------->+---------------------------->+

Of a micro-batch its carry crosses (for Transformer-XL hidden states and `lookback`), and the numbers of its rows, which
say of whose lanes it is. A memory never leaves its stage.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.utils import partition_balanced
from torch import Tensor, nn

from txl_dist.config.schema import TrainJob
from txl_dist.data.segments import Segment
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.engine.deepspeed_internals import (
    expect_other_lengths,
    first_and_last_ranks,
    mark_as_replica,
    pipeline_group,
)
from txl_dist.engine.engine import Engine, LocalModule, Start, build_model, lane_split, parameter_names
from txl_dist.engine.lane_states import LaneStates
from txl_dist.evaluation.memory_use import ShowLosses
from txl_dist.models.base import Batch, Carry, LanguageModel, detached
from txl_dist.models.layers.dropout import Noise
from txl_dist.objectives.base import Objective, micro_batches

StageInput = tuple[Tensor, ...]  # inputs or carry, and the numbers of the rows


class Stage(nn.Module):
    """The layers of one pipeline stage; the first stage has the embedding as well, the last one the softmax.

    Attributes:
        noise: of the current step, None in evaluation; the engine sets it.
        memory: of these layers; the engine sets it. Activation checkpointing computes rows again within the layers
            only, so `forward` runs once for each micro-batch.
        loss_weight: that of the engine.
        lane_losses: to which the last stage appends the losses of a micro-batch's lanes.
        evaluated: to which the last stage appends, in evaluation, what the model returns for a micro-batch.
    """

    def __init__(self, model: LanguageModel, layers: range, is_first: bool, is_last: bool, objective: Objective):
        super().__init__()
        self.model = model
        self.is_first = is_first
        self.is_last = is_last
        self.objective = objective
        self.noise: Noise | None = None
        self.memory: LaneStates | None = None
        self.loss_weight = 1.0
        self.lane_losses: list[Tensor] = []
        self.evaluated: list[Tensor] = []
        model.keep_stage(layers, is_first, is_last)

    def forward(self, stage_input: StageInput) -> StageInput:
        """Run this stage's layers on a micro-batch, and write the new memory of its rows.

        Args:
            stage_input: the fields of a batch that the model takes or, from the stage before, the carry; and int64
                [rows], the numbers of the rows.

        Returns:
            The input of the next stage, or of `loss`.
        """
        assert self.memory is not None
        *fields, rows = stage_input
        carry: Carry = tuple(fields)
        noise = self.noise and self.noise.of_rows(rows)
        if self.is_first:
            carry = self.model.embed(carry, noise)
        carry, memory = self.model.through_layers(carry, self.memory.read(rows), noise)
        self.memory.write(rows, [detached(state) for state in memory])
        return *carry, rows

    def loss(self, stage_output: StageInput, targets: Tensor) -> Tensor:
        """Return a micro-batch's loss: in training the weighted mean over targets, in evaluation the sum of nats."""
        *carry, rows = stage_output
        result = self.model.predict(tuple(carry), targets, self.noise and self.noise.of_rows(rows))
        if not self.training:
            self.evaluated.append(result)
            return self.objective.losses(result).double().sum()
        loss, lane_losses = self.objective.loss(result, self.loss_weight)
        self.lane_losses.append(lane_losses)
        return loss


class Pipeline(PipelineModule):
    """One Stage per rank, and the parameters that the first and the last stage share.

    DeepSpeed ties whole modules. Embedding and softmax are different ones that share some parameters: those are tied
    here. DeepSpeed adds up the gradients of the parameters that `get_tied_weights_and_groups` returns.
    """

    def __init__(self, stage: Stage, number: int, stages: int):
        modules = [stage if i == number else nn.Identity() for i in range(stages)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its partition
            super().__init__(modules, num_stages=stages, partition_method="uniform", loss_fn=stage.loss)
        assert self.stage_id == number
        self.tied: list[tuple[nn.Parameter, Any]] = []

    def tie(self, parameters: list[nn.Parameter]) -> None:
        """Tie the first stage's parameters to those of the last, given in the same order; all ranks must call it."""
        if not parameters:
            return
        for first, last in first_and_last_ranks(self):
            group = torch.distributed.new_group([first, last])
            if self.global_rank in (first, last):
                self.tied = [(parameter, group) for parameter in parameters]
            if self.global_rank == last:
                for parameter in parameters:
                    mark_as_replica(parameter)

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """Return the tied parameters, each with the process group of the two ranks that hold it."""
        return self.tied


class PipelineEngine(Engine):
    """Train one stage's layers on this rank's lanes.

    Attributes:
        stage_layers: how many layers each stage has.
    """

    def __init__(
        self,
        job: TrainJob,
        objective: Objective,
        vocab_size: int,
        group: ProcessGroup,
        start: Start,
    ):
        split = lane_split(job, group)
        number = split.stage(group.rank)
        model = build_model(job, vocab_size, start, objective.head)
        names = parameter_names(model)
        targets = objective.num_targets(job.model.tgt_len)
        costs = model.flops(split.micro_batch, targets)
        self.stage_layers = job.engine.stage_layers or balance_layers(costs, split.stages)
        tied = model.tied_parameters()
        training_flops = model.training_flops(job.data.num_lanes, targets)
        end = sum(self.stage_layers[: number + 1])
        layers = range(end - self.stage_layers[number], end)
        self.stage = Stage(model, layers, number == 0, number == split.stages - 1, objective)
        deepspeed.init_distributed(dist_init_required=False)  # its own view of the process group
        pipeline = Pipeline(self.stage, number, split.stages)
        pipeline.tie(tied)
        local = LocalModule(model, objective, layers, pipeline, names, training_flops)
        super().__init__(job, group, local, start)
        if not (self.stage.is_first or self.stage.is_last):
            self.lanes = range(0)  # what a middle stage reads comes from the stage before

    def forward_backward_step(self, batch: Batch) -> Tensor:
        """Return the mean loss of the micro-batches, in nats per token."""
        self.stage.memory = self.memory
        self.stage.noise = self.noise()
        self.stage.loss_weight = self.loss_weight
        self.stage.lane_losses = self.guard.lane_losses
        return self.deepspeed.train_batch(self.stage_inputs(batch))

    def score(self, segments: Iterable[Segment], show: ShowLosses | None = None) -> tuple[Tensor, int]:
        """Return the nats and the number of the scored tokens of this rank's lanes on the last stage; 0 on others."""
        memory = self.empty_memory()
        self.stage.memory = memory
        self.stage.noise = None
        nats = torch.zeros((), dtype=torch.float64, device=self.group.device)
        tokens = 0
        expect_other_lengths(self.deepspeed)
        for segment in segments:
            batch = self.objective.batch(segment)
            self.stage.evaluated = []
            losses = self.deepspeed.eval_batch(self.stage_inputs(batch), reduce_output=None, bcast_loss=False)
            memory.commit()
            if self.stage.is_last:
                nats += torch.stack(losses).sum()
                tokens += int(self.objective.is_scored(batch["targets"]).sum())
                if show:
                    show(torch.cat(self.stage.evaluated), batch)
        expect_other_lengths(self.deepspeed)
        return nats, tokens

    def stage_inputs(self, batch: Batch) -> Iterator[tuple[StageInput, Tensor]]:
        """Yield the first stage's input and the last stage's targets of each micro-batch."""
        numbers = torch.arange(len(batch["inputs"]))
        for rows, micro_batch in micro_batches(batch, self.split.accumulation):
            yield (*self.model.inputs_of(micro_batch), numbers[rows]), micro_batch["targets"]

    def global_grad_norm(self, local_norm: Tensor) -> Tensor:
        """Return the norm of the whole model's gradient from those of all stages; all ranks must call it."""
        squares = local_norm.square()
        torch.distributed.all_reduce(squares, group=pipeline_group(self.deepspeed))
        return squares.sqrt()

    def __str__(self) -> str:
        stages = self.split.stages
        micro_batches = self.split.accumulation
        idle = (stages - 1) / (micro_batches + stages - 1)
        return (
            f"{super().__str__()}, {stages} stages of {'+'.join(map(str, self.stage_layers))} layers "
            f"(idle {idle:.0%} of a step of {micro_batches} micro-batches)"
        )


def balance_layers(costs: list[float], stages: int) -> list[int]:
    """Return how many layers each stage gets, so that the costliest stage costs as little as can be.

    Args:
        costs: of the embedding, of each layer and of the softmax.
    """
    borders = [min(max(int(border) - 1, 0), len(costs) - 2) for border in partition_balanced(costs, stages)]
    return [end - start for start, end in pairwise(borders)]
