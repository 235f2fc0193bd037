"""What DeepSpeed has cut among ranks, as checkpoints know it: whole, by the parameter's name, in fp32."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from txl_dist.checkpoint.format import Checkpoint


class ShardedState:
    """The parameters and optimizer states of a DeepSpeed engine, under ZeRO 0 to 3.

    Args:
        parameters: by their names, in the same order on all data-parallel ranks. Those that are marked as the copy of
            another stage's (`ds_pipe_replicated`) are restored like all others, but are not this engine's `own`.
    """

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter]):
        self.engine, self.parameters = engine, parameters
        self.own = {
            name: parameter
            for name, parameter in parameters.items()
            if not getattr(parameter, "ds_pipe_replicated", False)
        }
        self.stage = engine.zero_optimization_stage()
        group = engine.data_parallel_group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def weights(self) -> dict[str, Tensor]:
        """A copy, on the CPU, of this rank's share of the own parameters. All its data-parallel ranks must call it."""
        return dict(self._share(None))

    def optimizer_states(self) -> dict[str, Tensor]:
        """A copy of the optimizer's tensors of the same, as `exp_avg/NAME`. All data-parallel ranks must call it."""
        self._link()
        return {f"{key}/{name}": value for key in self._keys() for name, value in self._share(key)}

    def numbers(self) -> dict[str, dict[str, float]]:
        """What else the optimizer keeps (as Adam's step), which all parameters share."""
        state, group = self._first_state(), self.engine.basic_optimizer.param_groups[0]
        scaler = {key: value for key, value in vars(self._loss_scaler).items() if isinstance(value, int | float)}
        return {
            "state": {key: float(value) for key, value in state.items() if key not in self._keys()},
            "group": {"step": group["step"]} if "step" in group else {},
            "loss_scaler": scaler,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take weights, optimizer states and numbers from a checkpoint, whatever split has written it."""
        numbers = checkpoint.state["optimizer"]
        optimizer = self.engine.basic_optimizer
        for group in optimizer.param_groups:
            group.update(numbers["group"])
        vars(self._loss_scaler).update(numbers["loss_scaler"])
        keys = sorted({name.partition("/")[0] for name in checkpoint.shapes("optimizer")})
        shapes = {name: getattr(each, "ds_shape", each.shape) for name, each in self.parameters.items()}
        weights = checkpoint.fitting("weights", shapes)
        states = checkpoint.fitting("optimizer", {f"{key}/{name}": shapes[name] for key in keys for name in shapes})
        for flat in self._optimized():
            optimizer.state[flat] = {key: torch.zeros_like(flat) for key in keys}
            optimizer.state[flat] |= {key: torch.tensor(value) for key, value in numbers["state"].items()}
        self._link()
        for name, parameter in self.parameters.items():
            for key in keys:
                self._set(parameter, key, states[f"{key}/{name}"])
            self._set(parameter, None, weights[name])  # DeepSpeed made its fp32 copies from rounded weights

    def _link(self) -> None:
        """At stages 1 and 2 let parameters find their states; DeepSpeed does so when the first group has stepped."""
        if self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _first_state(self) -> dict[str, Any]:
        """Return what the optimizer keeps of one parameter; nothing where no step has been done but passed ones."""
        return next(iter(self.engine.basic_optimizer.state.values()), {})

    def _keys(self) -> list[str]:
        """Names of the optimizer's tensors, as exp_avg."""
        return [key for key, value in self._first_state().items() if torch.is_tensor(value) and value.dim() > 0]

    @property
    def _loss_scaler(self) -> object:
        """What fp16 scales the loss by, and when it last changed that; without fp16 nothing."""
        return self.engine.optimizer.loss_scaler if self.engine.fp16_enabled() else SimpleNamespace()

    def _share(self, key: str | None) -> Iterator[tuple[str, Tensor]]:
        """This rank's share of the own parameters in fp32 (key None) or of an optimizer state, whole, by name.

        All data-parallel ranks take part in putting each together.
        """
        for i, (name, parameter) in enumerate(self.own.items()):
            if self.stage == 0:
                value = parameter if key is None else self.engine.basic_optimizer.state[parameter][key]
            elif key is None:
                value = safe_get_full_fp32_param(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, key)
            if i % self.ranks == self.rank:
                yield name, value.detach().to("cpu", copy=True)

    def _set(self, parameter: Any, key: str | None, value: Tensor) -> None:
        """Give a parameter's fp32 copy (key None), or an optimizer state of it, its whole value; `_share` undone."""
        value = value.to(self.engine.device)
        if self.stage == 0:
            (parameter.data if key is None else self.engine.basic_optimizer.state[parameter][key]).copy_(value)
        elif self.stage == 3:
            # DeepSpeed's way to set a whole value fails where it cannot be cut evenly: cut and pad it here.
            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.ranks - value.numel()))
            mine = padded[self.rank * size :][:size]
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
        optimizer = self.engine.optimizer
        if self.stage == 3:
            return optimizer.fp32_partitioned_groups_flat
        return optimizer.single_partition_of_fp32_groups if self.stage else list(self.parameters.values())
