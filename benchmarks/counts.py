"""What a training step asks of a GPU, counted without one, and how long it should take: python benchmarks/counts.py

The model runs on the meta device in bfloat16, where shapes and operators are real and numbers do not exist. An operator
is a kernel unless it returns a view, and moves its arguments and its results. Triton's kernels are compiled for sm_90
and not launched: what they take is the instructions in their loops. What the optimizer does is counted on a CPU, on a
small model, per parameter.

The times are predictions: of products of matrices at PRODUCTS or at the memory's speed, of Triton's kernels by their
instructions or at the memory's speed, and of everything else at the memory's speed. counts.json, in $OUT or beside this
file, has it all.
"""

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from cpu import text
from gpu import TRAINING, job
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime import JITFunction

from tests.models.layers.triton_process import KERNELS, compile_only, resources_of
from txl_dist.config.schema import TrainJob
from txl_dist.data.segments import Segment
from txl_dist.distributed.process_group import exit_process, process_group
from txl_dist.engine.lane_states import LaneStates
from txl_dist.engine.zero import ZeroEngine
from txl_dist.models import registry
from txl_dist.models.base import LanguageModel, Runtime
from txl_dist.models.layers.dropout import Noise
from txl_dist.objectives.causal_lm import CausalLM
from txl_dist.planning.trace import num_bytes

ROWS = Path(os.environ.get("OUT", Path(__file__).parent), "counts.json")

# What is assumed of an H100 (SXM) and of an H200, which differ in their memory.
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  # bytes per second
BANDWIDTH_SHARE = 0.9
PRODUCTS = 600e12  # FLOP/s of large products in bfloat16
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.7e9  # a scheduler issues an instruction of a warp per cycle
STALLS = 1.7  # as many times as long attention takes as its instructions alone

META = torch.device("meta")
aten = torch.ops.aten
FREE = {aten.empty, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.empty_strided, aten._unsafe_view}
WRITE_ONLY = {aten.copy_, aten.zero_, aten.fill_}  # do not read what they overwrite
SHAPE_ONLY = {aten.zeros_like, aten.new_zeros, aten.ones_like, aten.full_like, aten.nll_loss_backward}  # read nothing
SPARSE = {aten.embedding, aten.index_select, aten.gather, aten.index, aten.nll_loss_forward}  # read what they take


@dataclass
class Counts:
    """What some operators ask for.

    Attributes:
        launches: of kernels, by operator or kernel.
        moved: bytes read and written, of the operators that are no products of matrices.
        products: FLOPs and bytes of each product of matrices.
        syncs: how often the CPU waits for a number.
        attention: cycles in which one multiprocessor would issue all instructions, and bytes, of each of Triton's
            kernels.
    """

    launches: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    products: list[tuple[int, int]] = field(default_factory=list)
    syncs: int = 0
    attention: list[tuple[float, int]] = field(default_factory=list)

    @property
    def kernels(self) -> int:
        """Return how many kernels are launched."""
        return self.launches.total()

    @property
    def elementwise_bytes(self) -> int:
        """Return the bytes that are moved by all but products and Triton's kernels of attention."""
        return self.moved.total()

    @property
    def product_flops(self) -> int:
        """Return the FLOPs of all products of matrices outside of Triton's kernels."""
        return sum(flops for flops, _ in self.products)


class Counting(TorchDispatchMode):
    """Count what is computed on a device while it is entered."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.counts = Counts()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **(kwargs or {}))
        self._count(operator, [args, kwargs], results)
        return results

    def _count(self, operator: Any, arguments: Any, results: Any) -> None:
        packet = operator.overloadpacket
        if packet is aten._local_scalar_dense:
            self.counts.syncs += 1
        read = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.device == self.device]
        written = [x for x in tree_leaves(results) if isinstance(x, Tensor) and x.device == self.device]
        if not operator._schema.returns:
            written = overwritten(operator, arguments[0])
        if not written or packet in FREE or is_view(operator):
            return
        if packet in WRITE_ONLY:
            read = read[1:]
        elif packet in SHAPE_ONLY:
            read = []
        elif packet in SPARSE:
            read = written
        name = str(packet).removeprefix("aten.")
        self.counts.launches[name] += 1
        moved = sum(map(num_bytes, [*read, *written]))
        if packet in flop_registry:
            flops = flop_registry[packet](*arguments[0], **(arguments[1] or {}), out_val=results)
            self.counts.products.append((flops, moved))
        else:
            self.counts.moved[name] += moved


def is_view(operator: Any) -> bool:
    """Return whether an operator returns a view of an argument, and moves nothing."""
    aliases = [result.alias_info for result in operator._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def overwritten(operator: Any, arguments: Any) -> list[Tensor]:
    """Return the arguments that an operator without a result writes, alone or in lists."""
    named = zip(operator._schema.arguments, arguments, strict=False)
    return tree_leaves([value for name, value in named if name.alias_info is not None and name.alias_info.is_write])


@contextmanager
def counting(device: torch.device, compiled: bool = False) -> Iterator[Counts]:
    """Count what is computed on a device; Triton's kernels are not launched, and where it is wanted compiled."""
    mode = Counting(device)
    launch = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: Any, **kwargs: Any) -> None:
        name = kernel.__name__
        mode.counts.launches[name] += 1
        if compiled:
            launch(kernel, *args, grid=grid, warmup=True, **kwargs)
            numbers = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            moved = sum(num_bytes(x) for x in tree_leaves([args, kwargs]) if isinstance(x, Tensor))
            mode.counts.attention.append((cycles(name, grid, numbers), moved))

    JITFunction.run = run
    try:
        with mode:
            yield mode.counts
    finally:
        JITFunction.run = launch


# ------------------------------------------------------------------------------------------------------ attention


def cycles(name: str, grid: tuple[int, int, int], numbers: dict[str, Any]) -> float:
    """Return in how many cycles a multiprocessor would issue all instructions of a kernel's tiles."""
    _, n_head, lanes = grid
    length, mem_len, rows = (numbers[key] for key in ("length", "mem_len", "BLOCK_M"))
    columns = numbers.get("BLOCK_N", 32)
    last_keys = [mem_len + min(start + rows, length) for start in range(0, length, rows)]
    tiles = lanes * n_head * sum(-(-last // columns) for last in last_keys)  # those that are hidden are skipped
    return tiles * instructions_per_tile(name) * KERNELS[name].metadata.num_warps / SCHEDULERS


def instructions_per_tile(name: str) -> int:
    """Return how many instructions the longest loop of a compiled kernel has; without a loop, all of it."""
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(KERNELS[name].asm["cubin"])
        file.flush()
        lines = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    loops = []
    count = 0
    for line in lines.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]+\*/", line):
            count += 1
            target = re.search(r"BRA `\((\.L_x_\d+)\)", line)
            if target and target[1] in labels:
                loops.append(count - labels[target[1]])
    longest = max(loops, default=0)
    return longest if longest > 1 else count


# -------------------------------------------------------------------------------------------------------- a step


def build(given: TrainJob, vocab_size: int) -> LanguageModel:
    """Build a job's model in bfloat16, without numbers, with the attention of a GPU."""
    with META:
        return registry.build(given.model, vocab_size, Runtime("triton")).bfloat16()


def forward_and_backward(name: str, compiled: bool = False) -> tuple[Counts, int]:
    """Count the forward and backward of a step on one GPU, and its lane states; and the parameters of the model."""
    lanes, vocab_size, _ = TRAINING[name]
    given = job(name, lanes)
    model = build(given, vocab_size)
    KERNELS.clear()
    objective = CausalLM()
    states = LaneStates(range(given.model.n_layer), range(lanes), model.state_shapes(), META, torch.bfloat16)
    shape = (lanes, given.model.tgt_len)
    tokens = text(*shape, vocab_size)
    batch = {"inputs": tokens, "targets": tokens, "lookback": torch.full(shape, 10**6)}
    seeds = torch.zeros(lanes + 1, dtype=torch.int64, device=META).split([lanes, 1])
    rows = slice(0, lanes)
    with counting(META, compiled) as counts:
        nats, memory = model(batch, states.read(rows), Noise(*seeds))
        states.write(rows, memory)
        loss, _ = objective.loss(nats, 1.0)
        loss.backward()
    return counts, sum(parameter.numel() for parameter in model.parameters())


def optimizer_step() -> tuple[Counts, int, int]:
    """Count what a step of DeepSpeed's ZeRO 1 does in bfloat16; and the model's parameters, and their numbers."""
    small = ["model.n_layer=2", "model.d_model=256", "model.n_head=4", "model.d_inner=1024", "model.cutoffs=[]"]
    small += ["model.div_val=1", "model.tgt_len=8", "model.mem_len=8", "optimizer=adam"]
    given = job("wt103_large", 2, *small, "engine.zero_stage=1", "engine.precision=bf16")
    engine = ZeroEngine(given, CausalLM(), 100, process_group(), None)
    step = engine.deepspeed.step
    tokens = text(2, 8, 100).numpy()
    counts = Counts()

    def counted_step() -> None:
        nonlocal counts
        with counting(torch.device("cpu")) as counts:
            step()

    try:
        for _ in range(2):  # the first one builds the optimizer's states
            engine.deepspeed.step = counted_step
            engine.train_step(Segment(engine.step, tokens, tokens, np.full_like(tokens, 10**6)))
        return counts, len(engine.state.parameters), engine.num_parameters
    finally:
        engine.close()


# ---------------------------------------------------------------------------------------------------- prediction


PARTS = "products", "attention", "everything else", "optimizer"


def predicted_ms(counts: Counts, optimizer_bytes: float, bandwidth: float) -> dict[str, float]:
    """Return how long the parts of a step should take, in milliseconds."""
    speed = BANDWIDTH_SHARE * bandwidth
    products = sum(max(flops / PRODUCTS, moved / speed) for flops, moved in counts.products)
    rate = MULTIPROCESSORS * CLOCK / STALLS
    attention = sum(max(cycles / rate, moved / speed) for cycles, moved in counts.attention)
    seconds = products, attention, counts.elementwise_bytes / speed, optimizer_bytes / speed
    return {part: 1000 * value for part, value in zip(PARTS, seconds, strict=True)}


def row(name: str, optimizer: Counts, parameters: int) -> dict[str, Any]:
    """Return what a step of an experiment takes, with the optimizer's share by the small model's parameters."""
    lanes, _, goal = TRAINING[name]
    counts, num_parameters = forward_and_backward(name, compiled=True)
    optimizer_bytes = optimizer.elementwise_bytes / parameters * num_parameters
    tokens = lanes * job(name, lanes).model.tgt_len
    of_attention = {}
    for kernel, compiled in KERNELS.items():
        taken = resources_of(compiled)
        of_attention[kernel] = {
            "warps": compiled.metadata.num_warps,
            "registers": taken.registers,
            "spills": taken.spills,
            "programs_per_multiprocessor": taken.programs,
            "instructions_per_tile": instructions_per_tile(kernel),
        }
    predicted = {}
    for device, bandwidth in BANDWIDTH.items():
        parts = predicted_ms(counts, optimizer_bytes, bandwidth)
        predicted[device] = {"ms": parts, "tokens_per_second": 1000 * tokens / sum(parts.values())}
    return {
        "kernels": counts.kernels,
        "synchronizations": counts.syncs,
        "elementwise_gb": counts.elementwise_bytes / 1e9,
        "product_tflop": counts.product_flops / 1e12,
        "goal": goal,
        "attention": of_attention,
        "predicted": predicted,
    }


def table(rows: dict[str, Any]) -> Table:
    """Return the rows for people to read."""
    shown = Table("", "GPU", *PARTS, "ms", "tokens/s", "goal", title="predicted, in milliseconds per step")
    for name in TRAINING:
        for device, predicted in rows[name]["predicted"].items():
            times = [predicted["ms"][part] for part in PARTS]
            rates = predicted["tokens_per_second"], rows[name]["goal"]
            shown.add_row(name, device, *(f"{ms:.1f}" for ms in [*times, sum(times)]), *(f"{x:,.0f}" for x in rates))
    return shown


def described(numbers: dict[str, Any]) -> str:
    """Return the numbers of a dictionary in a line, with their names."""
    shown = {key: value for key, value in numbers.items() if not isinstance(value, dict)}
    return ", ".join(f"{key} {value:,.4g}" for key, value in shown.items())


def main() -> None:
    compile_only()
    optimizer, tensors, numbers = optimizer_step()
    of_optimizer = {
        "kernels_per_parameter": optimizer.kernels / tensors,
        "synchronizations": optimizer.syncs,
        "bytes_per_number": optimizer.elementwise_bytes / numbers,
    }
    rows: dict[str, Any] = {"optimizer": of_optimizer}
    for name in TRAINING:
        rows[name] = row(name, optimizer, numbers)
        print(name, described(rows[name]), flush=True)
        for kernel, taken in rows[name]["attention"].items():
            print("   ", kernel, described(taken))
    print("optimizer", described(of_optimizer))
    Console(width=120).print(table(rows))
    ROWS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
    exit_process()
