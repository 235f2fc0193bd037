"""The engine that both kinds of distribution share; the training loop knows no more than this.

A rank trains a part of the model (all of it, or one stage of a pipeline) on its lanes. It keeps the memories of its
layers and lanes, and writes and reads its share of checkpoints.
"""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from txl_dist import __version__
from txl_dist.checkpoint.format import Checkpoint
from txl_dist.checkpoint.initial_weights import InitialWeights
from txl_dist.checkpoint.writer import AsyncCheckpointer
from txl_dist.config.identity import lanes_changed
from txl_dist.config.schema import EngineConfig, TrainJob
from txl_dist.data.lanes import BEGINNING, LaneSplit, Origin
from txl_dist.data.segments import NOT_SCORED, Segment
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.engine import deepspeed_internals
from txl_dist.engine.anomaly_guard import AnomalyGuard
from txl_dist.engine.lane_states import LaneStates
from txl_dist.engine.optimizers import build_optimizer, keep_average, learning_rate
from txl_dist.engine.sharded_state import ShardedState
from txl_dist.engine.watch import LayerWatch
from txl_dist.evaluation.memory_use import ShowAttention, ShowLosses
from txl_dist.models import registry
from txl_dist.models.base import DTYPES, Batch, HeadBuilder, LanguageModel, Runtime
from txl_dist.models.layers.dropout import HAS_TRITON, Noise
from txl_dist.objectives.base import Objective, Prediction, Score

Start = Checkpoint | InitialWeights | None  # what a run resumes from or begins with; None: with random weights

VERSIONS = {"txl_dist": __version__, "torch": str(torch.__version__), "deepspeed": deepspeed.__version__}


@dataclass(frozen=True)
class LocalModule:
    """The part of a model that one rank trains: all of it, or one stage of a pipeline.

    Attributes:
        model: with the layers of this rank alone.
        objective: what it is trained for.
        layers: their numbers in the whole model.
        module: what DeepSpeed wraps to run the model.
        names: of all parameters of the whole model, which checkpoints know them by.
        training_flops: of a step of the whole model, on all lanes.
    """

    model: LanguageModel
    objective: Objective
    layers: range
    module: nn.Module
    names: dict[nn.Parameter, str]
    training_flops: float


class Engine(ABC):
    """Train a model on the lanes of this rank.

    Attributes:
        lanes: the lanes whose text this rank reads; the rows of each Segment given to it, in this order.
        origin: where these lanes began.
        step: optimizer steps done.
        learning_rate: of the last step.
        dropped_tokens: of the last step's global batch, lost with damaged samples (data.on_error=skip_sample).
        objective: what the model is trained for.
        memory: the states of this rank's layers and lanes.
        loss_weight: turns a mean over all targets into a mean over the scored ones of the global batch.
        num_parameters: of the whole model.
        training_flops: that the whole model needs in a step.
        checkpointer: writes what `save` has copied.
        guard: judges the steps.
        watch: measures what goes on inside a step.
        precision: fp32, bf16 or fp16.
    """

    def __init__(self, job: TrainJob, group: ProcessGroup, local: LocalModule, start: Start):
        self.job = job
        self.group = group
        self.split = lane_split(job, group)
        self.lanes = self.split.lanes(group.rank)
        self.origin = BEGINNING
        self.step = 0
        self.learning_rate = 0.0
        self.dropped_tokens = 0
        self.loss_weight = 1.0
        self.objective = local.objective
        self.precision = resolve_precision(job.engine)
        self.guard = AnomalyGuard(
            job.guard, job.run.dir, group, self.lanes, job.data.num_lanes, fp16=self.precision == "fp16"
        )
        self.num_parameters = sum(parameter.numel() for parameter in local.names)
        self.training_flops = local.training_flops
        self.model = local.model
        self.layers = local.layers
        parameters = {local.names[parameter]: parameter for parameter in self.model.parameters()}
        self.optimizer = self._build_optimizer(local, parameters)
        self.deepspeed = self._initialize_deepspeed(local.module)
        self.state = ShardedState(self.deepspeed, self.optimizer, parameters)
        self.watch = LayerWatch(
            job.tracking.watch_every, self.model, self.layers, local.names.values(), self.state, group
        )
        self._own_grad_norm: float | Tensor = 0.0  # of ZeRO 0, where DeepSpeed has none
        self.memory = self.empty_memory()
        if isinstance(start, Checkpoint):
            self._restore(start)
        elif start:
            self.state.restore_weights(start.read)
        self.checkpointer = AsyncCheckpointer(job.run.dir, job.checkpoint, self.step, group)

    def _build_optimizer(self, local: LocalModule, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.job.optimizer, parameters, local.names.values())
        own = set(parameters.values())
        optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Those that stand in for groups without a parameter here are to be cast and moved with the rest.
        local.module.stand_ins = nn.ParameterList(parameter for parameter in optimized if parameter not in own)
        first_averaged = self.job.optimizer.average_from
        if first_averaged is not None:
            keep_average(optimizer, lambda: self.step + 1 - (first_averaged - 1))
        return optimizer

    def _initialize_deepspeed(self, module: nn.Module) -> Any:
        engine, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config=deepspeed_config(self.job, self.split.micro_batch, self.precision),
            dist_init_required=False,
        )
        if self.job.engine.zero_stage == 0:
            deepspeed_internals.avoid_reduction_on_one_rank(engine, self.group.size)
        deepspeed_internals.intercept_update(self.optimizer, self._prepare_update)
        return engine

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.step
        self.guard.losses.extend(checkpoint.state.get("losses", []))
        self.state.restore(checkpoint)
        if lanes_changed(checkpoint.config, self.job):
            self.origin = Origin(checkpoint.step, checkpoint.state["tokens"])
            return  # other lanes begin with empty memories
        self.origin = Origin(**checkpoint.state.get("origin", {}))
        memories = self.memory.by_name()
        shapes = {name: memory.shape for name, memory in memories.items()}
        for name, states in checkpoint.fitting("memory", shapes).items():
            memories[name].copy_(states)

    @abstractmethod
    def forward_backward_step(self, batch: Batch) -> Tensor:
        """Run forward, backward and the optimizer's step on all micro-batches of a batch.

        The new memory is written beside the old one. Return the loss for `global_losses`, in nats per token.
        """

    @abstractmethod
    def score(self, segments: Iterable[Segment], show: ShowLosses | None = None) -> tuple[float | Tensor, int]:
        """Read segments with memories of their own; return this rank's share of the nats, and of their targets.

        Args:
            show: is called, where the losses are computed, with what the model returns for some lanes, as the losses
                [lanes, targets], and with their batch.
        """

    def __str__(self) -> str:
        """Return the model's size and the split, for people to read."""
        runtime = self.model.describe_runtime(self.group.device, DTYPES[self.precision])
        if self.model.runtime.compile:
            runtime += "compiled layers, "
        return (
            f"{self.num_parameters:,} parameters, {self.group.size} x {self.group.device.type}, {self.precision}, "
            f"{runtime}ZeRO {self.job.engine.zero_stage}"
        )

    def empty_memory(self) -> LaneStates:
        """Return the states of this rank's layers and lanes before the first token."""
        lanes = self.split.lanes(self.group.rank)
        dtype = DTYPES[self.precision]
        return LaneStates(self.layers, lanes, self.model.state_shapes(), self.group.device, dtype)

    @property
    def tokens(self) -> int:
        """Return how many tokens the run has read."""
        return self.origin.tokens_at(self.step, self.job.tokens_per_step)

    # -------------------------------------------------------------------------------------------------- training

    def train_step(self, segment: Segment) -> Tensor:
        """Make one optimizer step on this rank's rows of a segment.

        Return the loss for `global_losses`, in nats per token.

        Raises:
            AnomalyDetected: on every rank, where the step is bad and guard.max_bad_steps is exceeded.
        """
        assert segment.step == self.step
        seed_step(self.job.run.seed, self.step, self.group.rank)
        self._set_learning_rate()
        batch = self.objective.batch(segment)
        if self.job.data.on_error == "skip_sample" or self.objective.reads_examples:
            self._count_targets(segment, batch["targets"])
        self.guard.start_step(self.step + 1)
        with self.watch.step(self.step + 1):
            loss = self.forward_backward_step(batch)
        self.guard.finish_step(self._last_grad_norm)
        if self.guard.vetoed:
            self._keep_finite_memory()
        self.memory.commit()
        self.step += 1
        return loss

    def noise(self) -> Noise:
        """Return the randomness of the current step for this rank's lanes."""
        return Noise.of_step(self.job.run.seed, self.step, self.memory.lanes, self.group.device)

    def global_losses(self, losses: Sequence[Tensor]) -> list[float]:
        """Return the losses of the global batches: the means over all ranks of what `train_step` returned."""
        if not losses:
            return []
        return [total / self.group.size for total in self.group.sum(*losses)]

    @property
    def grad_norm(self) -> float:
        """Return the norm of the last step's whole gradient, before clipping."""
        return float(self._last_grad_norm)

    @property
    def _last_grad_norm(self) -> float | Tensor:
        """Return that norm without waiting for the device."""
        if self.job.engine.zero_stage == 0:
            return self._own_grad_norm
        return deepspeed_internals.zero_grad_norm(self.deepspeed)

    def _set_learning_rate(self) -> None:
        job = self.job
        self.learning_rate = learning_rate(self.step, job.schedule, job.optimizer.lr, job.train.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_scale"]

    def _count_targets(self, segment: Segment, targets: Tensor) -> None:
        """Set `dropped_tokens` and `loss_weight`; every rank must call it, with its rows and their targets.

        The ranks add up their counts, on the CPU: so every target weighs the same, whoever reads it, and the loss is
        the same under every split. It is 0 where a step has no target at all.
        """
        scored = torch.from_numpy(segment.targets != NOT_SCORED)
        in_loss = self.objective.is_scored(self.objective.counted(targets))
        counts = torch.tensor([scored.numel(), scored.sum(), in_loss.numel(), in_loss.sum()])
        torch.distributed.all_reduce(counts)  # a pipeline's first and last stage count each token: all are doubled
        tokens, tokens_kept, positions, positions_kept = counts.tolist()
        if not self.objective.reads_examples:  # there a lane that has no target has lost nothing
            self.dropped_tokens = (tokens - tokens_kept) * self.job.tokens_per_step // tokens
        self.loss_weight = positions / max(positions_kept, 1)

    def _prepare_update(self) -> bool:
        """Clip the gradient, and return whether the optimizer is to make its update."""
        if self.job.engine.zero_stage == 0:
            self._own_grad_norm = self._measure_grad_norm()
        self._clip_gradient()
        self.watch.read_gradients(self.optimizer, self._last_grad_norm, self.job.optimizer.clip)
        return not self.guard.vetoes_update(self._last_grad_norm)

    def _measure_grad_norm(self) -> Tensor:
        """Return the norm of the whole gradient at ZeRO 0: DeepSpeed has none there, or in a pipeline a wrong one."""
        gradients = [parameter.grad for parameter in self.state.own.values() if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        return self.global_grad_norm(torch.stack(norms).norm())

    def _clip_gradient(self) -> None:
        """Clip to optimizer.clip the gradient of what the optimizer updates now: under ZeRO one group of parameters.

        DeepSpeed's own clipping would wait for the device to see whether the norm is finite.
        """
        if self.job.optimizer.clip and not self.deepspeed.gradient_clipping():
            updated = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
            grad_norm = torch.as_tensor(self._last_grad_norm)
            nn.utils.clip_grads_with_norm_(updated, self.job.optimizer.clip, grad_norm)

    def global_grad_norm(self, local_norm: Tensor) -> Tensor:
        """Return the norm of the whole model's gradient from that of this rank's part; all ranks must call it."""
        return local_norm

    def _keep_finite_memory(self) -> None:
        """Have lanes whose new memory is not finite keep the one before, on all layers; every rank must call it.

        That one is a segment too old. It is the text of the lane all the same, and gone after mem_len tokens.
        """
        lanes = slice(self.memory.lanes.start, self.memory.lanes.stop)
        spoilt = torch.zeros(self.job.data.num_lanes, dtype=torch.int32, device=self.group.device)
        spoilt[lanes] = self.memory.spoilt_lanes().int()
        torch.distributed.all_reduce(spoilt)  # a lane's layers may be on several ranks
        self.memory.keep(spoilt[lanes] > 0)

    # --------------------------------------------------------------------------------- evaluation and checkpoints

    def evaluate(self, segments: Iterable[Segment]) -> Score:
        """Return the score of all ranks' segments, read with the lengths of job.evaluation.

        Memories are new ones: those of training stay as they are.
        """
        predictions: list[Prediction] = []

        def collect(result: Tensor, batch: Batch) -> None:
            predictions.extend(self.objective.predictions(result, batch))

        reads_examples = self.objective.reads_examples
        with self._evaluating():
            nats, tokens = self.group.sum(*self.score(segments, collect if reads_examples else None))
        of_ranks = self.group.all_gather(predictions) if reads_examples else []
        return Score(nats, int(tokens), list(chain.from_iterable(of_ranks)))

    def show(self, segments: Iterable[Segment], losses: ShowLosses, attention: ShowAttention | None) -> None:
        """Read segments as `evaluate` does, and show losses and attention of this rank's lanes and layers."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._evaluating())
            if attention:
                stack.enter_context(self.model.observed(lambda number, seen: attention(self.layers[number], seen)))
            self.score(segments, losses)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Have the model read with the lengths of job.evaluated_model, without dropout."""
        self.deepspeed.eval()
        try:
            # Compiled layers would be compiled anew for each length, as their caches grow.
            with self.model.reading_as(self.job.evaluated_model), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.deepspeed.train()

    def memory_drift(self) -> dict[str, float]:
        """Return by layer the cosine of what lanes remember and remembered a step before; every rank must call it."""
        sums: Counter[int] = Counter()
        for of_rank in self.group.all_gather(self.memory.drift()):
            sums.update(of_rank)
        return {f"memory/drift/layer.{layer}": sums[layer] / self.job.data.num_lanes for layer in sorted(sums)}

    def save(self, data: dict[str, Any], valid_loss: float | None) -> None:
        """Copy the state of the current step; a checkpoint of it is written in the background.

        Every rank must call it, and may train on as soon as it returns. It waits only for a save that is still being
        written.

        Args:
            data: what the run is trained on.
            valid_loss: of this very step, where it was evaluated.

        Raises:
            AnomalyDetected: where a step before was bad; then nothing is written.
            RunError: on every rank, where the save before this one has failed.
        """
        self.guard.raise_pending()
        self.checkpointer.wait()  # before the copy: there is room for one
        tensors = {
            "weights": self.state.weights(),
            "optimizer": self.state.optimizer_states(),
            "memory": {name: states.to("cpu", copy=True) for name, states in self.memory.by_name().items()},
        }
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "origin": asdict(self.origin),
            "optimizer": self.state.numbers(),
            "losses": list(self.guard.losses),
            "written_by": {
                "ranks": self.group.size,
                "precision": self.precision,
                **VERSIONS,
            },
            "valid_loss": valid_loss,
        }
        self.checkpointer.save(self.step, tensors, state, asdict(self.job), data)

    def full_weights(self) -> dict[str, Tensor]:
        """Return a CPU copy of all weights, by name, on rank zero, and nothing elsewhere; every rank must call it."""
        shares = self.group.gather_on_rank_zero(self.state.weights())
        return {name: weight for share in shares for name, weight in share.items()}

    def close(self) -> None:
        """Free the memory of model and optimizer; the engine cannot be used any more."""
        deepspeed_internals.release(self.deepspeed, self.state.parameters)


def lane_split(job: TrainJob, group: ProcessGroup) -> LaneSplit:
    """Return how a run's lanes are divided among the ranks of a process group."""
    return LaneSplit(job.data.num_lanes, group.size, job.engine.gradient_accumulation, job.engine.pipeline_stages)


def build_model(job: TrainJob, vocab_size: int, start: Start, head: HeadBuilder | None = None) -> LanguageModel:
    """Build the whole model on the CPU, with given weights or those that run.seed draws.

    Args:
        head: as of `registry.build`.
    """
    torch.manual_seed(job.run.seed)  # the same weights on every rank, whatever their number
    engine = job.engine
    runtime = Runtime(engine.attention, engine.activation_checkpointing, resolve_compile(engine), job.train.tbptt)
    model = registry.build(job.model, vocab_size, runtime, head)
    if start:
        start.load_weights(model)
    return model


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the name of each parameter; to be called before a model is cut, by stages and then by DeepSpeed."""
    return {parameter: name for name, parameter in model.named_parameters()}


def resolve_precision(engine: EngineConfig) -> str:
    """Return engine.precision; `auto` is bf16 on GPUs that have it, else fp32."""
    if engine.precision != "auto":
        return engine.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def resolve_compile(engine: EngineConfig) -> bool:
    """Return engine.compile; `auto` is true on GPUs with triton, but at ZeRO 3: there weights come and go."""
    if engine.compile != "auto":
        return engine.compile
    return torch.cuda.is_available() and HAS_TRITON and engine.zero_stage < 3


def deepspeed_config(job: TrainJob, micro_batch: int, precision: str) -> dict[str, Any]:
    """Return the DeepSpeed config of a run, whose micro-batches have `micro_batch` rows."""
    zero: dict[str, Any] = {"stage": job.engine.zero_stage}
    if job.engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if job.engine.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    # fp16's loss scale may change between the norm and the clipping: only ZeRO knows what the gradient is scaled by.
    zero_clips = precision == "fp16" and job.engine.zero_stage > 0
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": job.engine.gradient_accumulation,
        "gradient_clipping": job.optimizer.clip if zero_clips else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # its own CPU Adam needs a compiler
        "zero_allow_untested_optimizer": True,
        # The guard judges the gradient. DeepSpeed would look for numbers that are not finite parameter by parameter.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": precision == "fp16"},
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a step
        "steps_per_print": 2**62,
    }


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators, from which torch's own attention draws its dropout: no random state needs saving."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
