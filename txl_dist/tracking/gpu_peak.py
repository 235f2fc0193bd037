"""Peak rates of devices, as their vendors publish them."""

import re

import torch

from txl_dist.config.schema import EngineConfig
from txl_dist.distributed.process_group import ProcessGroup

PRECISIONS = ("fp16", "bf16", "tf32", "fp32")

# TFLOP/s of dense products of matrices, not of those with sparsity; fp16 and bf16 of the tensor cores, accumulating in
# fp32 as training does; fp32 of the other cores. NVIDIA's figures, gathered second-hand: engine.peak_tflops overrides
# them. A pattern matches the full name: devices with other rates have similar ones (A10G, 3090 Ti).
PEAK_TFLOPS: dict[str, tuple[float | None, ...]] = {
    "V100-SXM[23]-[0-9]+GB": (125, None, None, 15.7),
    "V100-PCIE-[0-9]+GB": (112, None, None, 14),
    "T4": (65, None, None, 8.1),
    "A100-SXM4-[48]0GB|A100-PCIE-40GB|A100 80GB PCIe": (312, 312, 156, 19.5),
    "A10": (125, 125, 62.5, 31.2),
    "L4": (121, 121, 60, 30.3),
    "L40S": (362, 362, 183, 91.6),
    "H100 80GB HBM3": (989.4, 989.4, 494.7, 66.9),
    "H100 PCIe": (756, 756, 378, 51.2),
    "H200": (989.4, 989.4, 494.7, 66.9),
    "B200": (2250, 2250, 1100, 75),
    "GeForce RTX 3090": (71, 71, 35.6, 35.6),
    "GeForce RTX 4090": (165.2, 165.2, 82.6, 82.6),
}


def peak_tflops(name: str, precision: str) -> float | None:
    """Return the peak rate of a device of this name (torch.cuda.get_device_name).

    In fp32 it is the rate of TF32 where that is allowed (torch.get_float32_matmul_precision) and there is one. None
    where the device is not known, or does not have the precision.
    """
    for pattern, rates in PEAK_TFLOPS.items():
        if re.fullmatch(f"(NVIDIA )?(Tesla )?({pattern})", name):
            rate = dict(zip(PRECISIONS, rates, strict=True))
            if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
                return rate["tf32"] or rate["fp32"]
            return rate[precision]
    return None


def total_peak_flops(config: EngineConfig, precision: str, group: ProcessGroup) -> float | None:
    """Return the peak rate, in FLOP/s, of all ranks' devices together; every rank must call it.

    None where the rate of any device is not known.
    """
    tflops = config.peak_tflops
    if tflops is None and group.device.type == "cuda":
        tflops = peak_tflops(torch.cuda.get_device_name(group.device), precision)
    total, unknown = group.sum(tflops or 0.0, tflops is None)
    return None if unknown else total * 1e12
