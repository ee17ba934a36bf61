"""limner serve: jobs over HTTP."""

from __future__ import annotations

import logging
import os
import socket
import sys
from contextlib import closing
from types import FrameType
from typing import Any

from limner.config import ServeConfig
from limner.errors import ConfigError, RunError
from limner.generation.jobs import count_parameters
from limner.models import loading

log = logging.getLogger("limner.serve")

BACKLOG = 2048  # connections that wait to be taken, as Uvicorn has it
TURN = 2e-4  # seconds that a thread may keep others from Python: what draws needs it for moments, thousands a picture


def run(config: ServeConfig) -> None:
    """Serve until told to end: SIGTERM or Ctrl-C finishes what is being drawn, a second one hands it back at once.

    Raises ConfigError, ModelError and RunError before it listens.
    """
    try:
        import uvicorn

        from limner.serving.access import is_this_machine
        from limner.serving.app import create_app
        from limner.serving.logs import begin
        from limner.serving.service import Service
    except ModuleNotFoundError as error:
        raise ConfigError(f"The server needs {error.name}; install with: pip install 'limner[serve]'.") from None

    class Server(uvicorn.Server):
        """Uvicorn's, which lets the service know that it is to end before it waits for open answers."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if service.draining:
                service.worker.halt()
            else:
                service.drain()
                super().handle_exit(sig, frame)

    listening = _listen(config.host, config.port)
    sys.setswitchinterval(TURN)
    begin()
    service = Service(config)
    with closing(service.store):
        if config.require_tokens is not False and not is_this_machine(config.host) and not service.store.tokens():
            raise RunError(
                f"Others can reach {config.host}, and there are no tokens; make one with "
                f"limner token add NAME --data {config.out}."
            )
        host, port = listening.getsockname()[:2]
        print(f"Limner listens at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        settings = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(config.drain)),
        )
        Server(settings).run(sockets=[listening])


def plan(config: ServeConfig) -> dict[str, Any]:
    """What `run` would offer, and where; nothing is fetched or written. Raises as `run` of what is given."""
    from limner.serving.shelf import read_loras, read_models, read_reports

    away = [ref for ref in config.models if loading.resolve_here(ref) is None]
    specs = read_models([ref for ref in config.models if ref not in away], loading.resolve_here)
    read_reports(specs, {name: page for name, page in config.reports.items() if name not in away})
    loras = read_loras(config.loras)
    return {
        **{
            f"model {name}": f"{spec.pipeline}, {sum(count_parameters(spec).values()) / 1e6:.1f} M parameters"
            for name, spec in specs.items()
        },
        **{f"model {ref}": "to be fetched; its size is not known yet" for ref in away},
        **({"LoRAs": ", ".join(f"{name} at {lora.weight:g}" for name, lora in loras.items())} if loras else {}),
        "address": f"http://{config.host}:{config.port}",
        "data": config.out,
        "queue": "PostgreSQL" if config.database else "SQLite",
    }


def _listen(host: str, port: int) -> socket.socket:
    """A socket at that address. Raises ConfigError where it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        if os.name == "posix" and sys.platform != "cygwin":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)  # who comes before the server is ready waits, and is not refused
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"Can't listen at {host}:{port} ({reason}); choose another --port or --host.") from None
    listening.set_inheritable(True)
    return listening
