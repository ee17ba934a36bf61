"""A stage in a process of its own, which SIGKILL ends at a chosen write or after a chosen time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from limner.config import StageConfig

C = TypeVar("C", bound=StageConfig)

WRITES = {"os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}
PRELOADED = [
    "limner.stages.train_clip",
    "limner.stages.train_vae",
    "limner.stages.train_unet",
    "limner.stages.encode",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
]


def writes_of(run: Callable[[C], Path], config: C) -> int:
    """How often a run opens, makes, renames or removes something in its folder when nobody kills it."""
    receive, send = multiprocessing.Pipe(duplex=False)
    code = _in_a_process(run, config, send, 0)
    assert code == 0, _log(config).read_text()
    count: int = receive.recv()
    return count


def kill(run: Callable[[C], Path], config: C, *, at_write: int) -> None:
    """Run a stage until just before its n-th write."""
    assert interrupt(run, config, at_write=at_write), "it ended before that"


def interrupt(run: Callable[[C], Path], config: C, *, at_write: int = 0, seconds: float | None = None) -> bool:
    """Run a stage until just before its n-th write, or for so long; tell whether it had not ended before that."""
    code = _in_a_process(run, config, None, at_write, seconds)
    assert code in (0, -signal.SIGKILL), _log(config).read_text()
    return code != 0


def _in_a_process(
    run: Callable[[C], Path], config: C, send: Any, at_write: int, seconds: float | None = None
) -> int | None:
    context = multiprocessing.get_context("forkserver")  # which loads the libraries once
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(run, config, send, at_write))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def _log(config: StageConfig) -> Path:
    return config.out.with_name(config.out.name + ".log")


def _run(run: Callable[[C], Path], config: C, send: Any, at_write: int) -> None:
    log = os.open(_log(config), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count = 0
    folder = str(config.out / "_")[:-1]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event in WRITES or (event == "open" and any(letter in str(arguments[1]) for letter in "wax"))
        if writes and f"{arguments[0]}/".startswith(folder):
            count += 1
            if count == at_write:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    run(config)
    if send is not None:
        send.send(count)
