"""DeepSpeed's internals, as far as training relies on them; nothing else of the package touches any.

DeepSpeed documents none of this and may change it in any release (these are 0.19's). Each function says which behaviour
it relies on: that is what to look up when an upgrade breaks a test.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.utils import groups, safe_set_local_fp32_param, safe_set_local_optimizer_state
from torch import Tensor, nn

# `init_distributed` compiles a reduction in shared memory, which takes a minute and a compiler, unless this table says
# that it cannot be built; gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel("WARNING")


def intercept_update(optimizer: torch.optim.Optimizer, prepare: Callable[[], bool]) -> None:
    """Have an optimizer make an update only where `prepare`, called right before it, returns True.

    DeepSpeed calls `step()` of the optimizer that it was given, once per training step or, under ZeRO, once per group
    of parameters. By then it knows the norm of the gradient; what it does afterwards is right with weights that have
    stayed.
    """
    update = optimizer.step

    def step() -> None:
        if prepare():
            update()

    optimizer.step = step  # type: ignore[method-assign, assignment]


def avoid_reduction_on_one_rank(engine: Any, ranks: int) -> None:
    """Have ZeRO 0 leave the gradients of a single rank alone: its reduction would copy each of them.

    `backward` reduces where `enable_backward_allreduce` is set. A pipeline's engine clears it, and reduces by itself.
    """
    engine.enable_backward_allreduce = ranks > 1


def zero_grad_norm(engine: Any) -> float | Tensor:
    """Return the norm of the whole gradient in the current step of ZeRO 1 to 3, before clipping.

    The wrapped optimizer stores it as `_global_grad_norm` before it calls the inner optimizer's `step`. The engine's
    public `get_global_grad_norm` knows it only when the step is done.
    """
    return engine.optimizer._global_grad_norm


# ------------------------------------------------------------------------------------------- parameters and states


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of a whole parameter: ZeRO 3 leaves an empty tensor in its place, and keeps it as `ds_shape`."""
    return getattr(parameter, "ds_shape", parameter.shape)


def set_full_value_zero3(parameter: Any, key: str | None, value: Tensor, rank: int, ranks: int) -> None:
    """Set a parameter (key None), or its optimizer state `key`, from its full value under ZeRO 3.

    `safe_set_full_fp32_param` fails where a value cannot be cut evenly. So it is cut here as DeepSpeed does it: flat,
    padded with zeros to `ranks` pieces as long as `ds_tensor`, one for each rank.
    """
    length = parameter.ds_tensor.numel()
    padded = nn.functional.pad(value.flatten(), (0, length * ranks - value.numel()))
    own = padded[rank * length :][:length]
    if key is None:
        safe_set_local_fp32_param(parameter, own)
    else:
        safe_set_local_optimizer_state(parameter, own, key)


def optimized_tensors(engine: Any, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """Return the tensors that the inner optimizer updates: the parameters or, under ZeRO, this rank's flat shares.

    They are `single_partition_of_fp32_groups` at stages 1 and 2, and `fp32_partitioned_groups_flat` at 3.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(parameters.values())
    if stage == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


class Shard(NamedTuple):
    """The stretch of a parameter that a rank keeps, within a tensor that the inner optimizer updates.

    Attributes:
        tensor: flat, of several parameters; at ZeRO 0 the parameter itself.
    """

    tensor: Tensor
    start: int
    stop: int

    def weights(self) -> Tensor:
        """Return the weights, of which the optimizer keeps float32: [stop - start]."""
        return self.tensor.detach().reshape(-1)[self.start : self.stop]

    def gradient(self) -> Tensor | None:
        """Return their gradient, while the optimizer updates `tensor`; None where there is none."""
        return None if self.tensor.grad is None else self.tensor.grad.reshape(-1)[self.start : self.stop]


def local_shard(engine: Any, parameter: Any, rank: int) -> Shard | None:
    """Return the stretch of a parameter that a data-parallel rank keeps; None: none. At ZeRO 0 all keep all of it.

    At ZeRO 1 and 2 `_hp_mapping`, None for a parameter of other ranks, has its address in the partition of its group.
    At 3 every rank has as much of it as `ds_tensor`, at its `grad_position`; the last pieces end with padding.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return Shard(parameter, 0, parameter.numel())
    if stage == 3:
        group, start, length = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        kept = min(max(parameter.ds_numel - rank * length, 0), length)
        return Shard(engine.optimizer.fp32_partitioned_groups_flat[group], start, start + kept)
    fragment = parameter._hp_mapping
    if fragment is None:
        return None
    address = fragment.get_hp_fragment_address()
    partition = engine.optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
    return Shard(partition, address.start, address.start + address.numel)


def link_optimizer_states(engine: Any) -> None:
    """Let each parameter find its optimizer states under ZeRO 1 and 2, for `safe_get_full_optimizer_state`.

    DeepSpeed links them once, when the first group of parameters has made its first update: too late for states that
    are restored, and too early for the other groups.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def loss_scaler_state(engine: Any) -> dict[str, Any]:
    """Return the attributes of fp16's loss scaler, to be read or updated: the scale and when it last changed.

    The wrapped optimizer has them in `loss_scaler`. Other precisions have none: the dictionary is empty then.
    """
    return vars(engine.optimizer.loss_scaler) if engine.fp16_enabled() else {}


# ------------------------------------------------------------------------------------------------------- pipelines


def forget_pipeline_grid() -> None:
    """Remove the grid of a pipeline that this process has trained before.

    DeepSpeed keeps it in the global `groups.mpu`, and an engine without stages would take its data-parallel group.
    """
    groups.mpu = None


def first_and_last_ranks(pipeline: PipelineModule) -> list[tuple[int, int]]:
    """Return the ranks of the first and the last stage in each of the parallel pipelines, from the module's `_topo`."""
    first = pipeline._topo.filter_match(pipe=0)
    last = pipeline._topo.filter_match(pipe=pipeline.num_stages - 1)
    return list(zip(first, last, strict=True))


def pipeline_group(engine: Any) -> Any:
    """Return the process group of the stages of this rank's pipeline, which the engine's `grid` holds."""
    return engine.grid.get_pipe_parallel_group()


def expect_other_lengths(engine: Any) -> None:
    """Let the next batch have another shape than the last one: stages exchange shapes once, and keep their buffers."""
    engine.reset_activation_shape()


def mark_as_replica(parameter: nn.Parameter) -> None:
    """Mark a parameter that another stage holds as well: with `ds_pipe_replicated` ZeRO counts it once in a norm."""
    parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]


def is_replica(parameter: nn.Parameter) -> bool:
    """Return whether `mark_as_replica` has marked a parameter; DeepSpeed itself sets the mark to False."""
    return getattr(parameter, "ds_pipe_replicated", False)


# ------------------------------------------------------------------------------------------------------------- end


def release(engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Free the memory of an engine that has trained, so that the process can build another.

    `destroy` leaves hooks that keep themselves alive and, under ZeRO 3, attributes of the parameters that hold shares.
    """
    engine.destroy()
    for parameter in parameters.values():
        vars(parameter).clear()
        parameter.data = torch.empty(0)
    vars(engine.optimizer).clear()
    vars(engine).clear()
