"""Triton's kernels without a GPU: interpreted, or compiled for an H100.

Triton decides at its import whether it interprets or compiles, so each is done in a process of its own, and neither
touches the tests.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import NamedTuple


@contextmanager
def process(prepare: Callable[[], None]) -> Iterator[Callable]:
    """Run functions of test modules in a new process that begins with `prepare`."""
    with ProcessPoolExecutor(1, get_context("spawn"), prepare) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def interpreting():
    """Run functions with kernels that are interpreted, on CPU tensors."""
    return process(interpret)


def compiling():
    """Run functions with kernels that are compiled where they would be launched."""
    return process(compile_only)


def interpret() -> None:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    # Triton 3.6 gives int() an array of one number, which numpy refuses since 2.4 (mended in Triton 3.7, its #9172).
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda x: x.handle.data.item())

    interpreter._patch_lang_tensor = patch


def compile_only() -> None:
    """A driver that says it has an H100, and kernels that are compiled where they would be launched."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    class H100:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    driver.set_active(H100())
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        KERNELS[self.__name__] = launch(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = run


KERNELS: dict = {}  # of the compiling process, by name


class Resources(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spills: bytes, from registers.
        programs: that fit on a multiprocessor of an H100, by their registers.
        rows: that the warps of its products cover; 0 without products.
        narrow: whether it loads numbers of two bytes one by one.
    """

    registers: int
    spills: int
    programs: int
    rows: int
    narrow: bool


REGISTERS = 65536  # of a multiprocessor
WARP = 32  # threads


def resources(folder: str, launch: Callable[..., None], *args) -> dict[str, Resources]:
    """What each of the kernels takes that `launch` launches."""
    os.environ["TRITON_CACHE_DIR"] = folder
    KERNELS.clear()
    launch(*args)
    return {name: resources_of(kernel) for name, kernel in KERNELS.items()}


def resources_of(kernel) -> Resources:
    """What a compiled kernel takes, as ptxas and Triton's layouts tell."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.M)[1]
    command = [get_ptxas(90).path, "-v", f"--gpu-name={target}", "-o", os.devnull, "/dev/stdin"]
    report = subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    layouts = re.findall(r"nvidia_mma<\{[^}]*warpsPerCTA = \[(\d+),", kernel.asm["ttgir"])
    rows = 16 * max(map(int, layouts), default=0)  # a warp has 16
    programs = REGISTERS // (registers * kernel.metadata.num_warps * WARP)
    return Resources(registers, spills, programs, rows, "ld.global.b16" in kernel.asm["ptx"])
