"""Which devices are known, by the names that their drivers give them."""

import pytest
import torch

from txl_dist.tracking.gpu_peak import peak_tflops


@pytest.mark.parametrize(
    "name, bf16, fp32",
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("A100-SXM4-40GB", 312, 19.5),  # older drivers leave out the maker
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756, 51.2),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_known_devices(name, bf16, fp32):
    rates = [peak_tflops(name, precision) for precision in ("bf16", "fp16", "fp32")]
    assert rates == [bf16, bf16, fp32]


@pytest.mark.parametrize(
    "name, fp16, fp32",
    [("Tesla V100-SXM2-16GB", 125, 15.7), ("Tesla V100-PCIE-32GB", 112, 14), ("Tesla T4", 65, 8.1)],
)
def test_devices_without_bf16_have_no_rate_for_it(name, fp16, fp32):
    assert [peak_tflops(name, precision) for precision in ("fp16", "bf16", "fp32")] == [fp16, None, fp32]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Tesla T40",
        "",
    ],
)
def test_a_similar_name_is_another_device(name):
    assert peak_tflops(name, "fp16") is peak_tflops(name, "fp32") is None


def test_fp32_is_tf32_where_that_is_allowed():
    torch.set_float32_matmul_precision("high")
    try:
        rates = [peak_tflops(name, "fp32") for name in ("NVIDIA H100 PCIe", "Tesla T4")]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert rates == [378, 8.1]
