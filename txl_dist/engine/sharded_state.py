"""Parameters and optimizer states as checkpoints know them: in full, by the parameter's name, in fp32.

DeepSpeed's ZeRO cuts them into shards, a different way at each stage.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from txl_dist.checkpoint.format import Checkpoint
from txl_dist.engine.deepspeed_internals import (
    Shard,
    full_shape,
    is_replica,
    link_optimizer_states,
    local_shard,
    loss_scaler_state,
    optimized_tensors,
    set_full_value_zero3,
)


class ShardedState:
    """Read and restore the parameters and optimizer states of a DeepSpeed engine, under ZeRO 0 to 3.

    Args:
        optimizer: the one that the engine was given.
        parameters: by name, in the same order on all data-parallel ranks.

    Attributes:
        own: the parameters without those that another stage of a pipeline saves; all are restored.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]):
        self.engine = engine
        self.optimizer = optimizer
        self.parameters = parameters
        self.own = {name: parameter for name, parameter in parameters.items() if not is_replica(parameter)}
        self.stage = engine.zero_optimization_stage()
        self.rank = dist.get_rank(engine.data_parallel_group)
        self.ranks = dist.get_world_size(engine.data_parallel_group)

    def weights(self) -> dict[str, Tensor]:
        """Return a CPU copy of this rank's share of the own parameters; all data-parallel ranks must call it."""
        return dict(self._share(None))

    def optimizer_states(self) -> dict[str, Tensor]:
        """Return a CPU copy of this rank's share of the optimizer's tensors, named as `exp_avg/NAME`.

        All data-parallel ranks must call it.
        """
        link_optimizer_states(self.engine)
        return {f"{key}/{name}": value for key in self._tensor_keys() for name, value in self._share(key)}

    def shards(self) -> dict[str, Shard]:
        """Return what this rank is to look at where every number of the own parameters is to be looked at once."""
        shards = {}
        for number, (name, parameter) in enumerate(self.own.items()):
            shard = local_shard(self.engine, parameter, self.rank)
            is_other_ranks = self.stage == 0 and number % self.ranks != self.rank  # all have it
            if shard is not None and not is_other_ranks:
                shards[name] = shard
        return shards

    def numbers(self) -> dict[str, dict[str, float]]:
        """Return the optimizer's numbers, which all parameters share (as Adam's step), and those of the loss scaler."""
        tensor_keys = self._tensor_keys()
        group = self.optimizer.param_groups[0]
        scaler = loss_scaler_state(self.engine)
        return {
            "state": {key: float(value) for key, value in self._first_state().items() if key not in tensor_keys},
            "group": {"step": group["step"]} if "step" in group else {},
            "loss_scaler": {key: value for key, value in scaler.items() if isinstance(value, int | float)},
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore weights, optimizer states and numbers from a checkpoint that any split has written."""
        keys = sorted({name.partition("/")[0] for name in checkpoint.shapes("optimizer")})
        shapes = {name: full_shape(parameter) for name, parameter in self.parameters.items()}
        weights = checkpoint.fitting("weights", shapes)
        states = checkpoint.fitting("optimizer", {f"{key}/{name}": shapes[name] for key in keys for name in shapes})
        self._restore_numbers(checkpoint.state["optimizer"], keys)
        link_optimizer_states(self.engine)
        for name, parameter in self.parameters.items():
            for key in keys:
                self._set(parameter, key, states[f"{key}/{name}"])
            self._set(parameter, None, weights[name])  # DeepSpeed made its fp32 copies from rounded weights

    def restore_weights(self, read: Callable[[Iterable[str]], Mapping[str, Tensor]]) -> None:
        """Set the weights alone, to those that a function returns for their names; others stay."""
        weights = read(self.parameters)
        for name, parameter in self.parameters.items():
            if name in weights:
                self._set(parameter, None, weights[name])  # as in `restore`

    def _restore_numbers(self, numbers: dict[str, dict[str, float]], keys: list[str]) -> None:
        """Restore what `numbers` returned, and make room for the optimizer's tensors of these names."""
        loss_scaler_state(self.engine).update(numbers["loss_scaler"])
        for group in self.optimizer.param_groups:
            group.update(numbers["group"])
        for tensor in optimized_tensors(self.engine, self.parameters):
            state = {key: torch.zeros_like(tensor) for key in keys}
            state |= {key: torch.tensor(value) for key, value in numbers["state"].items()}
            self.optimizer.state[tensor] = state

    def _first_state(self) -> dict[str, Any]:
        """Return the optimizer's state of one parameter; empty while all steps so far were skipped."""
        return next(iter(self.optimizer.state.values()), {})

    def _tensor_keys(self) -> list[str]:
        """Return the names of the optimizer's tensors, as exp_avg."""
        return [key for key, value in self._first_state().items() if torch.is_tensor(value) and value.dim() > 0]

    def _share(self, key: str | None) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and full fp32 value of every `ranks`-th own parameter (key None) or of its optimizer state.

        All data-parallel ranks take part in putting each value together; one keeps it.
        """
        for number, (name, parameter) in enumerate(self.own.items()):
            if self.stage == 0:
                value = parameter if key is None else self.optimizer.state[parameter][key]
            elif key is None:
                value = safe_get_full_fp32_param(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, key)
            if number % self.ranks == self.rank:
                yield name, value.detach().to("cpu", copy=True)

    def _set(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """Set a parameter's fp32 copy (key None), or an optimizer state of it, from its full value."""
        value = value.to(self.engine.device)
        if self.stage == 0:
            target = parameter.data if key is None else self.optimizer.state[parameter][key]
            target.copy_(value)
        elif self.stage == 3:
            set_full_value_zero3(parameter, key, value, self.rank, self.ranks)
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
