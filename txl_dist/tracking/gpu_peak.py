"""What devices can do at best: the rates that their vendors tell."""

import re

import torch

PRECISIONS = ("fp16", "bf16", "tf32", "fp32")

# TFLOP/s of dense products of matrices, not of those with sparsity; fp16 and bf16 of the tensor cores, accumulating in
# fp32 as training does; fp32 of the other cores. NVIDIA's figures, gathered second-hand: engine.peak_tflops overrides
# them. Names are whole, as their kin with other rates bear similar ones (A10G, 3090 Ti).
KNOWN: dict[str, tuple[float | None, ...]] = {
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
    """The rate of a device of this name (torch.cuda.get_device_name); None where it is not known, or has no such rate.

    In fp32 that of TF32 where it is allowed (torch.get_float32_matmul_precision) and there.
    """
    for pattern, rates in KNOWN.items():
        if re.fullmatch(f"(NVIDIA )?(Tesla )?({pattern})", name):
            rate = dict(zip(PRECISIONS, rates, strict=True))
            if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
                return rate["tf32"] or rate["fp32"]
            return rate[precision]
    return None
