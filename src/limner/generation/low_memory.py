"""Networks that take turns in memory where it is too small for all."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module


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
