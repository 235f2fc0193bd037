"""Peak rates, memory and power of devices, as their vendors publish them."""

import re
from typing import NamedTuple

import torch

from txl_dist.config.schema import EngineConfig
from txl_dist.distributed.process_group import ProcessGroup

PRECISIONS = ("fp16", "bf16", "tf32", "fp32")


class Device(NamedTuple):
    """What a vendor publishes of a device.

    Attributes:
        tflops: TFLOP/s of dense products of matrices, not of those with sparsity, by PRECISIONS; None: not in hardware.
            fp16 and bf16 of the tensor cores, accumulating in fp32 as training does; fp32 of the other cores.
        memory: GiB that programs see.
        bandwidth: GB/s of that memory.
        link: GB/s, in one direction, to other devices of its node: NVLink where there is some, else PCIe.
        watts: its power limit.
    """

    tflops: tuple[float | None, ...]
    memory: float
    bandwidth: float
    link: float
    watts: float


# NVIDIA's figures, gathered second-hand: engine.peak_tflops and the planner's keys override them. A pattern matches the
# full name: devices with other rates have similar ones (A10G, 3090 Ti).
A100 = (312, 312, 156, 19.5)
H100 = (989.4, 989.4, 494.7, 66.9)
DEVICES: dict[str, Device] = {
    "V100-SXM[23]-16GB": Device((125, None, None, 15.7), 15.8, 900, 150, 300),
    "V100-SXM[23]-32GB": Device((125, None, None, 15.7), 31.7, 900, 150, 300),
    "V100-PCIE-16GB": Device((112, None, None, 14), 15.8, 900, 16, 250),
    "V100-PCIE-32GB": Device((112, None, None, 14), 31.7, 900, 16, 250),
    "T4": Device((65, None, None, 8.1), 14.6, 320, 16, 70),
    "A100-SXM4-80GB": Device(A100, 79.1, 2039, 300, 400),
    "A100-SXM4-40GB": Device(A100, 39.4, 1555, 300, 400),
    "A100-PCIE-40GB": Device(A100, 39.4, 1555, 32, 250),
    "A100 80GB PCIe": Device(A100, 79.1, 1935, 32, 300),
    "A10": Device((125, 125, 62.5, 31.2), 22.2, 600, 32, 150),
    "L4": Device((121, 121, 60, 30.3), 22.0, 300, 32, 72),
    "L40S": Device((362, 362, 183, 91.6), 44.4, 864, 32, 350),
    "H100 80GB HBM3": Device(H100, 79.1, 3350, 450, 700),
    "H100 PCIe": Device((756, 756, 378, 51.2), 79.1, 2000, 64, 350),
    "H200": Device(H100, 139.8, 4800, 450, 700),
    "B200": Device((2250, 2250, 1100, 75), 178.4, 8000, 900, 1000),
    "GeForce RTX 3090": Device((71, 71, 35.6, 35.6), 23.6, 936, 32, 350),
    "GeForce RTX 4090": Device((165.2, 165.2, 82.6, 82.6), 23.6, 1008, 32, 450),
    "cpu": Device((None, 0.15, None, 0.15), 8, 20, 2, 30),  # a core of a server, in round numbers
}


def find_device(name: str) -> Device | None:
    """Return the device of this name (torch.cuda.get_device_name); None where it is not known."""
    for pattern, device in DEVICES.items():
        if re.fullmatch(f"(NVIDIA )?(Tesla )?({pattern})", name):
            return device
    return None


def device_named(name: str) -> Device | None:
    """Return the first device whose name begins so, such as H100; None where there is none."""
    return find_device(name) or next(
        (device for key, device in DEVICES.items() if re.match(f"{re.escape(name)}\\b", key)), None
    )


def peak_tflops(name: str, precision: str) -> float | None:
    """Return the peak rate of a device of this name (torch.cuda.get_device_name).

    In fp32 it is the rate of TF32 where that is allowed (torch.get_float32_matmul_precision) and there is one. None
    where the device is not known, or does not have the precision.
    """
    device = find_device(name)
    if device is None:
        return None
    rate = dict(zip(PRECISIONS, device.tflops, strict=True))
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return rate["tf32"] or rate["fp32"]
    return rate[precision]


def total_peak_flops(config: EngineConfig, precision: str, group: ProcessGroup) -> float | None:
    """Return the peak rate, in FLOP/s, of all ranks' devices together; every rank must call it.

    None where the rate of any device is not known.
    """
    tflops = config.peak_tflops
    if tflops is None and group.device.type == "cuda":
        tflops = peak_tflops(torch.cuda.get_device_name(group.device), precision)
    total, unknown = group.sum(tflops or 0.0, tflops is None)
    return None if unknown else total * 1e12
