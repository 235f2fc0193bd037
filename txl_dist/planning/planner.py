"""Put a plan together: the model is traced, cut into stages, and each stage's memory, messages and time are counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from txl_dist.config.schema import PermutationLMConfig, PlanJob
from txl_dist.data.lanes import LaneSplit
from txl_dist.data.two_way import CLASSIFIER, SEPARATOR
from txl_dist.models.base import DTYPES, Batch, LanguageModel, Runtime
from txl_dist.models.layers.backends import default_backend
from txl_dist.objectives.base import Objective
from txl_dist.objectives.causal_lm import CausalLM
from txl_dist.objectives.permutation_lm import PermutationLM
from txl_dist.planning.communication import sent
from txl_dist.planning.dataset import Dataset
from txl_dist.planning.memory import Memory, Stage, peak_memory
from txl_dist.planning.time import Rates, StepTime, rates, step_time
from txl_dist.planning.trace import PartTrace, build_model, trace


@dataclass(frozen=True)
class Plan:
    """What a run needs under one split.

    Attributes:
        precision: which engine.precision comes to on the device.
        backend: of attention.
        split: of the lanes.
        stages: of the pipeline; a single one without it.
        stage_layers: how many layers each has.
        memory: at the peak, by stage.
        sent: bytes per rank and step, by stage and kind.
        time: of a step.
        num_parameters: of the whole model.
        flops: model FLOPs of a step (Chowdhery et al. 2022).
        rates: of the devices and their network, as assumed.
        slowdown: how much longer a step takes than they say, as a run has shown.
    """

    job: PlanJob
    dataset: Dataset
    precision: str
    backend: str
    split: LaneSplit
    stages: list[Stage]
    stage_layers: list[int]
    memory: list[Memory]
    sent: list[dict[str, float]]
    time: StepTime
    num_parameters: int
    flops: float
    rates: Rates
    slowdown: float

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens that all ranks together read in a second."""
        return self.job.tokens_per_step / self.time.total

    @property
    def fits(self) -> bool:
        """Return whether every rank has enough memory."""
        return max(memory.total for memory in self.memory) <= self.rates.usable_memory

    @property
    def mfu(self) -> float:
        """Return the share of the devices' peak that the model makes use of."""
        return self.flops / self.time.total / (self.split.ranks * self.rates.peak)


class Planner:
    """Plan a model's run on a kind of device, under one split after another; what they share is found once.

    Args:
        slowdown: how much longer a step takes than the assumptions say, as a run has shown.
    """

    def __init__(self, job: PlanJob, dataset: Dataset, slowdown: float = 1.0):
        self.job = job
        self.dataset = dataset
        self.on_gpu = job.device != "cpu"
        self.precision = job.engine.precision
        if self.precision == "auto":
            self.precision = "bf16" if self.on_gpu else "fp32"
        self.objective = build_objective(job, dataset.vocab_size)
        self.targets = self.objective.num_targets(job.model.tgt_len)
        self.backend: str = job.engine.attention
        backends = job.model.attention_backends
        if len(backends) < 2:
            self.backend = backends[0] if backends else "the model's own formula"
        elif self.backend == "auto":
            device = torch.device("cuda" if self.on_gpu else "cpu")
            dropout = getattr(job.model, "dropatt", 0.0)
            self.backend = default_backend(device, DTYPES[self.precision], dropout)
        self.rates = rates(job, self.precision)
        self.slowdown = slowdown
        self.model = lru_cache(self._build)
        self.traces = lru_cache(self._trace)
        self.products = lru_cache(lambda rows: self.model(False).products(rows, self.targets))
        self.cut = lru_cache(self._cut)
        model = self.model(False)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.flops = model.training_flops(job.data.num_lanes, self.targets)

    def _build(self, checkpointing: bool) -> LanguageModel:
        runtime = Runtime(self.backend, checkpointing)
        return build_model(
            self.job.model, self.dataset.vocab_size, runtime, DTYPES[self.precision], self.on_gpu
        ).train()

    def _trace(self, rows: int, checkpointing: bool) -> list[PartTrace]:
        batch = example(self.job, self.objective, rows, self.dataset.vocab_size)
        return trace(self.model(checkpointing), self.objective, batch, self.on_gpu)

    def _cut(self, stages: int, rows: int) -> list[int]:
        if stages == 1:
            return [self.job.model.n_layer]
        from txl_dist.engine.pipeline import balance_layers  # with DeepSpeed: seconds to import

        return balance_layers([sum(product.forward for product in part) for part in self.products(rows)], stages)

    def plan(self, job: PlanJob) -> Plan:
        """Return the plan of a job that has another `engine` than the planner's, at most."""
        engine = job.engine
        ranks = job.nodes * job.gpus
        split = LaneSplit(job.data.num_lanes, ranks, engine.gradient_accumulation, engine.pipeline_stages)
        rows = split.micro_batch
        parts = self.traces(rows, engine.activation_checkpointing)
        products = self.products(rows)
        layers = engine.stage_layers or self.cut(split.stages, rows)
        ends = stage_ends(layers)
        stages = []
        work = []
        for number, (start, end) in enumerate(ends):
            in_flight = min(split.stages - number, split.accumulation)
            stages.append(Stage(parts[start:end], in_flight, split.accumulation, split.data_parallel, split.stages > 1))
            work.append([product for part in products[start:end] for product in part])
        messages = [sent(job, stages, number, self.precision, self.on_gpu) for number in range(split.stages)]
        time = step_time(job, split, stages, work, messages, self.rates, self.precision).slowed(self.slowdown)
        return Plan(
            job=job,
            dataset=self.dataset,
            precision=self.precision,
            backend=self.backend,
            split=split,
            stages=stages,
            stage_layers=layers,
            memory=[peak_memory(job, stage, self.precision, self.on_gpu) for stage in stages],
            sent=messages,
            time=time,
            num_parameters=self.num_parameters,
            flops=self.flops,
            rates=self.rates,
            slowdown=self.slowdown,
        )


def stage_ends(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first part of each stage and the one behind its last, where embedding and head are parts, too."""
    ends = []
    start = 0
    for number, count in enumerate(layers):
        end = start + count + (number == 0) + (number == len(layers) - 1)
        ends.append((start, end))
        start = end
    return ends


def with_engine(job: PlanJob, **changes: object) -> PlanJob:
    """Return the job with other values in its section `engine`."""
    return replace(job, engine=replace(job.engine, **changes))  # type: ignore[arg-type]


@dataclass(frozen=True)
class AnyTokenizer:
    """Stand in for a dataset's tokenizer: every piece begins a word."""

    vocab_size: int
    specials = {SEPARATOR: 0, CLASSIFIER: 0}

    def word_starts(self) -> np.ndarray:
        return np.ones(self.vocab_size, dtype=bool)


def build_objective(job: PlanJob, vocab_size: int) -> Objective:
    """Return what the model is trained for, without a dataset."""
    if isinstance(job.objective, PermutationLMConfig):
        return PermutationLM(job.objective, AnyTokenizer(vocab_size))  # type: ignore[arg-type]
    return CausalLM(job.first_scored)


def example(job: PlanJob, objective: Objective, rows: int, vocab_size: int) -> Batch:
    """Return a micro-batch of tokens as frequent as words are (Zipf's law), int64 [rows, ...], the same every time."""
    length = job.model.tgt_len
    rank = torch.arange(1, rows * length + 1, dtype=torch.float64) / (rows * length)
    tokens = (vocab_size + 1.0) ** rank.view(length, rows).T - 1  # the inverse of the distribution of ranks
    tokens = tokens.long().clamp(0, vocab_size - 1)
    targets = objective.num_targets(length)
    batch = {"inputs": tokens, "targets": tokens[:, :targets], "lookback": torch.full_like(tokens, 10**6)}
    if isinstance(objective, PermutationLM):
        batch["rank"] = batch["segment"] = torch.zeros_like(tokens)
        batch["direction"] = torch.ones(rows, 1, dtype=torch.int64)
        batch["positions"] = torch.arange(targets).expand(rows, -1).contiguous()
    return batch
