"""Data-parallel training by DeepSpeed's ZeRO, stages 0 to 3, of a model with memory."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from txl_dist.config import EngineConfig, TrainJob
from txl_dist.data.lanes import LaneSplit
from txl_dist.data.segments import Segment
from txl_dist.engine.checkpoint import Checkpoint, CheckpointWriter
from txl_dist.engine.evaluation import Score, row_slices, score, to_device
from txl_dist.engine.launch import World
from txl_dist.engine.optimization import build_optimizer, learning_rate
from txl_dist.models.memory import Memory
from txl_dist.models.transformer_xl import TransformerXL

# DeepSpeed would compile its shared-memory reduction at start (a minute, and a compiler); gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel("WARNING")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ZeroEngine:
    """Trains a model on the lanes of this rank.

    Attributes:
        lanes: the numbers of this rank's lanes; the rows of each Segment given to it, in this order.
        step: optimizer steps done.
        size: parameters of the model.
    """

    def __init__(self, job: TrainJob, vocab_size: int, world: World, checkpoint: Checkpoint | None):
        self.job, self.world = job, world
        split = LaneSplit(job.data.num_lanes, world.size, job.engine.gradient_accumulation)
        self.lanes, self.step = split.lanes(world.rank), 0
        self.precision = precision(job.engine)

        torch.manual_seed(job.run.seed)  # the same weights on every rank, whatever their number
        self.model = TransformerXL(job.model, vocab_size)
        self.model.activation_checkpointing = job.engine.activation_checkpointing
        if checkpoint:
            checkpoint.load_weights(self.model)
        # Before DeepSpeed cuts them: the parameters under the names that checkpoints know.
        self.parameters = dict(self.model.named_parameters())
        self.size = sum(parameter.numel() for parameter in self.parameters.values())
        self.deepspeed, _, _, _ = deepspeed.initialize(
            model=self.model,
            optimizer=build_optimizer(job.optimizer, self.model.parameters()),
            config=deepspeed_config(job, split.micro_batch, self.precision),
            dist_init_required=False,
        )
        self.memory = self.empty_memory()
        if checkpoint:
            self.step = checkpoint.step
            self._restore(checkpoint)

    def empty_memory(self) -> Memory:
        """A memory of this rank's lanes, as at the beginning of a run."""
        return Memory(self.lanes, self.job.model, self.world.device, DTYPES[self.precision])

    def __str__(self) -> str:
        where = f"{self.world.size} x {self.world.device.type}"
        return f"{self.size:,} parameters, {where}, {self.precision}, ZeRO {self.job.engine.zero_stage}"

    def train_step(self, segment: Segment) -> Tensor:
        """One optimizer step on this rank's rows of a segment; returns this rank's mean loss (nats a token)."""
        random_state(self.job.run.seed, segment.step, self.world.rank)
        self._set_learning_rate()
        losses = []
        for rows in row_slices(len(self.lanes), self.job.engine.gradient_accumulation):
            nats, remembered = self.deepspeed(*to_device(segment, rows, self.world.device), self.memory.read(rows))
            self.memory.write(rows, remembered)
            losses.append(nats.mean())
            self.deepspeed.backward(losses[-1])
            if self.job.engine.zero_stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
                self._grad_norm = nn.utils.clip_grad_norm_(
                    self.model.parameters(), self.job.optimizer.clip or torch.inf
                )
            self.deepspeed.step()
        self.memory.commit()
        self.step = segment.step + 1
        return torch.stack(losses).detach().mean()

    def _set_learning_rate(self) -> None:
        self.learning_rate = learning_rate(
            self.step, self.job.schedule, self.job.optimizer.lr, self.job.train.max_steps
        )
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = self.learning_rate

    @property
    def grad_norm(self) -> float:
        """The norm of the last step's whole gradient, before clipping."""
        return float(self._grad_norm if self.job.engine.zero_stage == 0 else self.deepspeed.get_global_grad_norm())

    def mean(self, loss: Tensor) -> float:
        """The mean over all ranks of what `train_step` returned: that of the global batch."""
        return self.world.sum(loss)[0] / self.world.size

    def evaluate(self, segments: Iterable[Segment]) -> Score:
        """The score of all ranks' segments, with a memory of its own: training's stays untouched."""
        self.deepspeed.eval()
        mine = score(self.deepspeed, segments, self.empty_memory(), self.job.engine.gradient_accumulation)
        self.deepspeed.train()
        nats, tokens = self.world.sum(mine.nats, mine.tokens)
        return Score(nats, int(tokens))

    def save(self, data: dict[str, Any]) -> None:
        """Write the checkpoint of the current step; `data` says what the run is trained on. Every rank must call it."""
        writer = CheckpointWriter(self.job.run.dir, self.step, self.world.rank)
        if self.world.first:
            writer.begin()
        torch.distributed.barrier()
        keys, numbers = self._optimizer_state()
        writer.add("weights", dict(self._full(None)))
        writer.add("optimizer", {f"{key}/{name}": value for key in keys for name, value in self._full(key)})
        writer.add("memory", self.memory.by_name())
        torch.distributed.barrier()
        if self.world.first:
            state = {
                "step": self.step,
                "tokens": self.step * self.job.tokens_per_step,
                "optimizer": numbers,
                "written_by": {"ranks": self.world.size, "zero_stage": self.job.engine.zero_stage},
            }
            writer.finish(state, asdict(self.job), data, self.job.train.keep_checkpoints)
        torch.distributed.barrier()

    def _optimizer_state(self) -> tuple[list[str], dict[str, dict[str, float]]]:
        """Names of the optimizer's tensors (as exp_avg), and its numbers (as the step), which all parameters share."""
        state = next(iter(self.deepspeed.basic_optimizer.state.values()))
        group = self.deepspeed.basic_optimizer.param_groups[0]
        tensors = [key for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0]
        numbers = {key: float(value) for key, value in state.items() if key not in tensors}
        return tensors, {
            "state": numbers,
            "group": {"step": group["step"]} if "step" in group else {},
            "loss_scaler": {
                key: value for key, value in vars(self._loss_scaler).items() if isinstance(value, int | float)
            },
        }

    @property
    def _loss_scaler(self) -> object:
        """What fp16 scales the loss by, and when it last changed that; without fp16 nothing."""
        return self.deepspeed.optimizer.loss_scaler if self.precision == "fp16" else SimpleNamespace()

    def _full(self, key: str | None) -> Iterator[tuple[str, Tensor]]:
        """This rank's share of the parameters in fp32 (key None) or of an optimizer state, whole, by name.

        All ranks take part in putting each together.
        """
        for i, (name, parameter) in enumerate(self.parameters.items()):
            if self.job.engine.zero_stage == 0:
                value = parameter if key is None else self.deepspeed.basic_optimizer.state[parameter][key]
            elif key is None:
                value = safe_get_full_fp32_param(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, key)
            if i % self.world.size == self.world.rank:
                yield name, value.detach().to("cpu", copy=True)

    def _restore(self, checkpoint: Checkpoint) -> None:
        numbers = checkpoint.state["optimizer"]
        optimizer = self.deepspeed.basic_optimizer
        for group in optimizer.param_groups:
            group.update(numbers["group"])
        vars(self._loss_scaler).update(numbers["loss_scaler"])
        tensors = checkpoint.tensors("optimizer")
        keys = sorted({name.partition("/")[0] for name in tensors})
        for flat in self._optimized():
            optimizer.state[flat] = {key: torch.zeros_like(flat) for key in keys}
            optimizer.state[flat] |= {key: torch.tensor(value) for key, value in numbers["state"].items()}
        if self.job.engine.zero_stage in (1, 2):
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()  # else only the first step would do it
        weights = checkpoint.tensors("weights")
        for name, parameter in self.parameters.items():
            for key in keys:
                self._set(parameter, key, tensors[f"{key}/{name}"])
            self._set(parameter, None, weights[name])  # DeepSpeed made its fp32 copies from rounded weights
        mine = self.memory.by_name()
        for name, states in checkpoint.tensors("memory", mine).items():
            mine[name].copy_(states)

    def _set(self, parameter: Any, key: str | None, value: Tensor) -> None:
        """Give a parameter's fp32 copy (key None), or an optimizer state of it, its whole value; `_full` undone."""
        value, stage = value.to(self.world.device), self.job.engine.zero_stage
        if stage == 0:
            (parameter.data if key is None else self.deepspeed.basic_optimizer.state[parameter][key]).copy_(value)
        elif stage == 3:
            # DeepSpeed's way to set a whole value fails where it cannot be cut evenly: cut and pad it here.
            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
            mine = padded[self.world.rank * size :][:size]
            if key is None:
                safe_set_local_fp32_param(parameter, mine)
            else:
                safe_set_local_optimizer_state(parameter, mine, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _optimized(self) -> list[Tensor]:
        """What the optimizer sees: the parameters, or this rank's flat parts of them."""
        optimizer, stage = self.deepspeed.optimizer, self.job.engine.zero_stage
        if stage == 3:
            return optimizer.fp32_partitioned_groups_flat
        return optimizer.single_partition_of_fp32_groups if stage else list(self.model.parameters())


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
        # DeepSpeed clips by default, and at stage 0 without telling the norm: there the engine does it.
        "gradient_clipping": job.optimizer.clip if job.engine.zero_stage else 0.0,
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
