"""How a model draws on a machine: on which device, in which precision, by what, with how much memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from limner.config import Engine, Precision
from limner.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICES = ("cpu", "cuda", "mps")
"""Those of torch's that compute pictures."""
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
"""Names of processors' instructions that multiply matrices of bf16 faster than those of fp32."""


@dataclass(frozen=True)
class Setup:
    """Where and how the networks compute."""

    device: torch.device
    precision: Literal["fp32", "bf16"] = "fp32"
    low_memory: bool = False
    """Whether only that part of a model is in memory which is in use."""
    engine: Engine = "torch"
    """What computes U-Net and decoder."""

    @property
    def dtype(self) -> torch.dtype:
        """Of torch's weights and activations; the scheduler's arithmetic is in fp32. OpenVINO rounds for itself."""
        return DTYPES[self.precision if self.engine == "torch" else "fp32"]


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU when there is one. Raises ConfigError where it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type not in DEVICES:
        raise ConfigError(f"There is no device {name!r} here; leave out --device, or name cpu or cuda.")
    return device


def choose(
    device: torch.device, precision: Precision = "auto", low_memory: bool = False, engine: Engine = "torch"
) -> Setup:
    """`auto` is bf16 where the device can multiply it fast, which no clock decides, or memory is short; else fp32.

    Raises ConfigError where there is no such precision or engine, or the engine is not installed, or not for this.
    """
    for what, name, known in (("precision", precision, get_args(Precision)), ("engine", engine, get_args(Engine))):
        if name not in known:
            raise ConfigError(f"There is no {what} {name!r}; choose one of {', '.join(known)}.")
    if engine == "openvino":
        from limner.models import export

        export.require("openvino")
        if device.type != "cpu" or low_memory:
            with_ = "--low-memory" if low_memory else f"--device {device.type}"
            raise ConfigError(
                f"OpenVINO draws on the CPU, with all of a model in memory; leave out {with_} or --engine."
            )
    if precision == "auto":
        precision = "bf16" if low_memory or has_fast_bf16(device) else "fp32"
    return Setup(device, precision, low_memory, engine)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bf16 matrices."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(able.get(name) for name in BF16_INSTRUCTIONS)
