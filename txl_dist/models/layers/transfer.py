"""Copies from the CPU to the device that computes."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without synchronising (pinned, non-blocking)."""
    if device.type == "cuda" and tensor.device.type == "cpu":  # a copy from pageable memory would synchronise
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
