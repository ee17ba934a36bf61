"""Several processes of one training, as `accelerate launch` starts them: what the main one alone does for all."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from limner.errors import ConfigError, UserError

WAIT = timedelta(hours=2)  # for the main process, which validates and writes alone
SETTLE = 0.2  # seconds that a process of several waits at its end

P = ParamSpec("P")
T = TypeVar("T")


def join(folder: Path | None) -> Accelerator:
    """Join the other processes, if there are any; what trackers write goes to `folder`."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes that torchrun started without a GPU stay strangers
        mixed_precision="no",  # its own could not differ between two trainings of a process; see `task.step`
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )
    if accelerator.num_processes > 1:
        atexit.unregister(_settle)  # of an earlier training: once is enough
        atexit.register(_settle)
    return accelerator


def _settle() -> None:
    """Let gloo's threads free the tensors of what they did last, whether it ended well or not.

    One that does so once Python is ending ends the process with SIGABRT (PyTorch's issue 190489).
    """
    time.sleep(SETTLE)


def on_main(accelerator: Accelerator | PartialState, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `do` on the main process while the others wait. -> on all, what it returned there.

    Raises on all the UserError or OSError that it raised there.
    """
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [do(*args, **kwargs)]
        except (UserError, OSError) as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], UserError | OSError):
        raise answer[0]
    value: T = answer[0]
    return value


def refuse_uneven(batch_size: int, accelerator: Accelerator) -> None:
    """Raise ConfigError where a batch can't be split evenly among the processes."""
    count = accelerator.num_processes
    if batch_size % count:
        raise ConfigError(f"batch_size {batch_size} can't be split evenly among {count} processes; choose a multiple.")
