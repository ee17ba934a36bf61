"""How a model draws on a machine: on which device, in which precision, by what, with how much memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from limner.config import Engine, Precision
from limner.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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


class OneAtATime:
    """Keeps one of several networks in memory: the one that is called is read, and the one before it leaves."""

    def __init__(self) -> None:
        self.here: tuple[Any, _Guest] | None = None

    def keep(self, network: Any, read: Callable[[], Any]) -> None:
        """Let `network` leave until it is called; `read` then gives another of its class with the weights to take."""
        guest = _Guest(self, network, read)
        add_hook_to_module(network, guest)
        self.here = network, guest
        self.empty()

    def enter(self, network: Any, guest: _Guest) -> None:
        """See that `network` is the one in memory."""
        if self.here is None or self.here[0] is not network:
            self.empty()
            network.load_state_dict(guest.read().state_dict(), assign=True)
            self.here = network, guest

    def empty(self) -> None:
        """Free the memory of the network that is here."""
        if self.here is not None:
            network, guest = self.here
            network.load_state_dict(guest.away, assign=True)
            self.here = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what is freed to itself
        if trim is not None:
            trim(0)


class _Guest(ModelHook):
    """Calls a network in before its forward, and a VAE also before its encode and decode, as Diffusers has it."""

    def __init__(self, house: OneAtATime, network: Any, read: Callable[[], Any]) -> None:
        self.house, self.read = house, read
        self.away = {
            name: torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
            for name, tensor in network.state_dict().items()
        }
        """In place of the weights: their shapes and device, and one zero each."""

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.house.enter(module, self)
        return args, kwargs
