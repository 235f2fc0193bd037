"""What both engines have in common; the training loop knows no more than this.

A rank trains its *part* of the model (all of it, or a pipeline's stage) on its lanes. It keeps the memories of its
layers and lanes, and writes and reads its share of checkpoints.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from txl_dist import __version__
from txl_dist.checkpoint.format import Checkpoint
from txl_dist.checkpoint.writer import AsyncCheckpointer
from txl_dist.config.schema import LANE_KEYS, EngineConfig, ModelConfig, TrainJob
from txl_dist.data.lanes import BEGINNING, LaneSplit, Origin
from txl_dist.data.segments import NOT_SCORED, Segment
from txl_dist.distributed.process_group import ProcessGroup
from txl_dist.engine.anomaly_guard import AnomalyGuard
from txl_dist.engine.optimizers import build_optimizer, keep_average, learning_rate
from txl_dist.engine.sharded_state import ShardedState
from txl_dist.evaluation.likelihood import Score
from txl_dist.models.layers.backends import default_backend
from txl_dist.models.memory import Memory
from txl_dist.models.transformer_xl import TransformerXL
from txl_dist.tracking.gpu_peak import peak_tflops

# DeepSpeed would compile its shared-memory reduction at start (a minute, and a compiler); gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel("WARNING")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine(ABC):
    """Trains a model on the lanes of this rank.

    Attributes:
        lanes: the lanes whose text this rank reads; the rows of each Segment given to it, in this order.
        origin: where these lanes began.
        step: optimizer steps done.
        skipped: tokens of the last step's global batch that are lost (data.on_error=skip_sample).
        weight: of a loss that is the mean over all positions; it makes a mean over the scored ones of the global batch.
        size: parameters of the whole model.
        saver: writes what `save` has copied.
        guard: judges the steps.
    """

    def __init__(self, job: TrainJob, vocab_size: int, group: ProcessGroup, checkpoint: Checkpoint | None):
        self.job, self.group = job, group
        self.split = LaneSplit(
            job.data.num_lanes, group.size, job.engine.gradient_accumulation, job.engine.pipeline_stages
        )
        self.lanes, self.origin, self.step = self.split.lanes(group.rank), BEGINNING, 0
        self.precision = precision(job.engine)
        self.skipped, self.weight = 0, 1.0
        lanes, fp16 = self.lanes, self.precision == "fp16"
        self.guard = AnomalyGuard(job.guard, job.run.dir, group, lanes, job.data.num_lanes, fp16)

        torch.manual_seed(job.run.seed)  # the same weights on every rank, whatever their number
        model = TransformerXL(job.model, vocab_size)
        model.activation_checkpointing = job.engine.activation_checkpointing
        for attention in model.attentions():
            attention.way = job.engine.attention
        if job.engine.compile:
            for layer in model.layers:
                layer.compile()
        if checkpoint:
            checkpoint.load_weights(model)
        # Before it is cut, by stages and then by DeepSpeed: the parameters under the names that checkpoints know.
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.size = sum(parameter.numel() for parameter in names)
        self.model, self.layers, module = self.part(model)
        parameters = {names[parameter]: parameter for parameter in self.model.parameters()}

        optimizer = build_optimizer(job.optimizer, parameters, names.values())
        members = (member for group in optimizer.param_groups for member in group["params"])
        own = set(parameters.values())
        module.stand_ins = nn.ParameterList(each for each in members if each not in own)  # cast and moved with the rest
        if (first := job.optimizer.average_from) is not None:
            keep_average(optimizer, lambda: self.step + 1 - (first - 1))
        self.deepspeed, _, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(job, self.split.micro_batch, self.precision),
            dist_init_required=False,
        )
        if job.engine.zero_stage == 0:
            # Its reduction copies every gradient, also where there is no other rank.
            self.deepspeed.enable_backward_allreduce = group.size > 1
        self._update, optimizer.step = optimizer.step, self._update_unless_bad  # type: ignore
        self.state = ShardedState(self.deepspeed, parameters)
        self.memory = self.empty_memory(job.model)
        if checkpoint:
            self._restore(checkpoint)
        self.checkpointer = AsyncCheckpointer(job.run.dir, job.checkpoint, self.step, group)

    @abstractmethod
    def part(self, model: TransformerXL) -> tuple[TransformerXL, range, nn.Module]:
        """This rank's part of a model, the numbers of its layers, and what DeepSpeed gets to see of it."""

    @abstractmethod
    def forward_backward_step(self, segment: Segment) -> Tensor:
        """Gradients of all micro-batches, the optimizer's step, and the new memory beside the old; returns the loss."""

    @abstractmethod
    def score(self, segments: Iterable[Segment]) -> tuple[float | Tensor, int]:
        """The nats of some segments, read with a memory of their own, as far as this rank counts; and their tokens."""

    def __str__(self) -> str:
        """The model's size and the split, in words."""
        given, device = self.job.engine.attention, self.group.device
        way = default_backend(device, DTYPES[self.precision]) if given == "auto" else given
        return (
            f"{self.size:,} parameters, {self.group.size} x {device.type}, {self.precision}, attention by {way}, "
            f"ZeRO {self.job.engine.zero_stage}"
        )

    def empty_memory(self, config: ModelConfig) -> Memory:
        """A memory of this rank's layers and lanes, as at the beginning of a run."""
        device, dtype = self.group.device, DTYPES[self.precision]
        lanes = self.split.lanes(self.group.rank)
        return Memory(self.layers, lanes, config.mem_len, config.d_model, device, dtype)

    @property
    def tokens(self) -> int:
        """What the run has read."""
        return self.origin.tokens_at(self.step, self.job.tokens_per_step)

    def peak(self) -> float | None:
        """FLOP/s of all ranks' devices together at best; None where one is not known. Every rank must call it."""
        mine, device = self.job.engine.peak_tflops, self.group.device
        if mine is None and device.type == "cuda":
            mine = peak_tflops(torch.cuda.get_device_name(device), self.precision)
        total, unknown = self.group.sum(mine or 0.0, mine is None)
        return None if unknown else total * 1e12

    def train_step(self, segment: Segment) -> Tensor:
        """One optimizer step on this rank's rows of a segment; returns a loss (nats a token) for `mean`."""
        assert segment.step == self.step
        random_state(self.job.run.seed, self.step, self.group.rank)
        self.learning_rate = learning_rate(
            self.step, self.job.schedule, self.job.optimizer.lr, self.job.train.max_steps
        )
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_scale"]
        if self.job.data.on_error == "skip_sample":
            self.count_skipped(segment)
        self.guard.begin(self.step + 1)
        loss = self.forward_backward_step(segment)
        self.guard.end(self._norm)
        if self.guard.refused:
            self._keep_sound_memory()
        self.memory.commit()
        self.step += 1
        return loss

    def count_skipped(self, segment: Segment) -> None:
        """Find `skipped` and `weight`; every rank must call it, with its rows.

        The ranks add up their counts, on the CPU: so every scored token weighs the same, whoever reads it, and the loss
        is the same under every split. It is 0 where a whole step is lost.
        """
        scored = torch.from_numpy(segment.targets != NOT_SCORED)
        counted = scored[:, self.job.first_scored :]
        counts = torch.tensor([scored.numel(), scored.sum(), counted.numel(), counted.sum()])
        torch.distributed.all_reduce(counts)  # with pipeline stages the first and the last count each token: all twice
        tokens, kept, positions, weighed = counts.tolist()
        self.skipped = (tokens - kept) * self.job.tokens_per_step // tokens
        self.weight = positions / max(weighed, 1)

    def _update_unless_bad(self) -> None:
        """The optimizer's step, which DeepSpeed asks for once or, under ZeRO, once for each group of parameters.

        It has told the gradient's norm before, and what it does after is right with weights that have stayed.
        """
        if self.job.engine.zero_stage == 0:
            self._clip()
        if not self.guard.refuses(self._norm):
            self._update()

    def _keep_sound_memory(self) -> None:
        """A lane whose new memory is not finite keeps the one before on all layers; every rank must call it.

        That one is a segment too old. It is the text of the lane all the same, and gone after mem_len tokens.
        """
        lanes, new = self.memory.lanes, self.memory.next
        spoilt = torch.zeros(self.job.data.num_lanes, dtype=torch.int32, device=new.device)
        spoilt[lanes.start : lanes.stop] = ~new.isfinite().all(dim=0).flatten(1).all(dim=1)
        torch.distributed.all_reduce(spoilt)  # a lane's layers may be on several ranks
        rows = spoilt[lanes.start : lanes.stop] > 0
        new[:, rows] = self.memory.current[:, rows]

    def mean(self, loss: Tensor) -> float:
        """The mean over all ranks of what `train_step` returned: that of the global batch."""
        return self.group.sum(loss)[0] / self.group.size

    @property
    def grad_norm(self) -> float:
        """The norm of the last step's whole gradient, before clipping."""
        return float(self._norm)

    @property
    def _norm(self) -> float | Tensor:
        return self._grad_norm if self.job.engine.zero_stage == 0 else self.deepspeed.optimizer._global_grad_norm

    def _clip(self) -> None:
        """What DeepSpeed does itself at the other ZeRO stages; at 0 it tells no norm, and a pipeline's is not right."""
        gradients = [parameter.grad for parameter in self.state.own.values() if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        self._grad_norm = self.global_grad_norm(torch.stack(norms).norm())
        if self.job.optimizer.clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.job.optimizer.clip, self._grad_norm)

    def global_grad_norm(self, norm: Tensor) -> Tensor:
        """The norm of the gradient of the whole model, of which this rank's part has `norm`."""
        return norm

    def evaluate(self, segments: Iterable[Segment]) -> Score:
        """The score of all ranks' segments, with the lengths of job.evaluation.

        The memory is another: training's stays untouched.
        """
        self.deepspeed.eval()
        self.model.config = self.job.evaluation.of(self.job.model)
        with torch.compiler.set_stance("force_eager"):  # its caches grow, and each length would be compiled anew
            nats, tokens = self.group.sum(*self.score(segments))
        self.model.config = self.job.model
        self.deepspeed.train()
        return Score(nats, int(tokens))

    def save(self, data: dict[str, Any], valid_loss: float | None) -> None:
        """Copy what the checkpoint of the current step holds; it is written in the background, until `saver.wait`.

        Every rank must call it, and may train on as soon as it returns. Only a save that is still being written when
        the next is due is waited for.

        Args:
            data: what the run is trained on.
            valid_loss: of this very step, where it was evaluated.

        Raises:
            BadStep: where a step before was bad; then nothing is written.
            RunError: on every rank, where the save before this one has failed.
        """
        self.guard.check()
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
                "txl_dist": __version__,
                "torch": str(torch.__version__),
                "deepspeed": deepspeed.__version__,
            },
            "valid_loss": valid_loss,
        }
        self.checkpointer.save(self.step, tensors, state, asdict(self.job), data)

    def close(self) -> None:
        """Give back the memory. DeepSpeed's hooks keep themselves alive, and under ZeRO 3 it does not take all away."""
        self.deepspeed.destroy()
        for parameter in self.state.parameters.values():
            vars(parameter).clear()
            parameter.data = torch.empty(0)
        for each in (self.deepspeed.optimizer, self.deepspeed):
            vars(each).clear()

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.step
        self.guard.losses.extend(checkpoint.state.get("losses", []))
        self.state.restore(checkpoint)
        now = asdict(self.job)
        if any(checkpoint.config[section][key] != now[section][key] for section, key in LANE_KEYS):
            self.origin = Origin(checkpoint.step, checkpoint.state["tokens"])
            return
        self.origin = Origin(**checkpoint.state.get("origin", {}))
        mine = self.memory.by_name()
        for name, states in checkpoint.fitting("memory", {name: each.shape for name, each in mine.items()}).items():
            mine[name].copy_(states)


def precision(engine: EngineConfig) -> str:
    """What `auto` means here: bf16 on GPUs that have it, else fp32."""
    if engine.precision != "auto":
        return engine.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def deepspeed_config(job: TrainJob, micro_batch: int, precision: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": job.engine.zero_stage}
    if job.engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if job.engine.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": job.engine.gradient_accumulation,
        "gradient_clipping": job.optimizer.clip if job.engine.zero_stage else 0.0,  # DeepSpeed clips by default
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # its own CPU Adam needs a compiler
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 2**62,
    }


def random_state(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank: dropout depends on the step alone, and no random state needs saving."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "little"))
