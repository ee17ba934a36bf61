"""limner token: who may use the server."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from typing import Any

from limner.config import TokenConfig
from limner.errors import ConfigError, RunError


def run(config: TokenConfig) -> None:
    """Make a token and print it, list the names, or remove one. A server hears of it at once.

    Raises ConfigError where the database can't be used, RunError for a name that is there already, or isn't.
    """
    try:
        from limner.serving.store import Store
        from limner.serving.tokens import digest, new_token
    except ModuleNotFoundError as error:
        raise ConfigError(f"Tokens need {error.name}; install with: pip install 'limner[serve]'.") from None

    with closing(Store(config.out, config.database)) as store:
        if config.action == "add":
            token = new_token()
            store.add_token(config.name, digest(token))
            print(token)
        elif config.action == "list":
            for name, created in store.tokens():
                print(f"{name}  since {datetime.fromtimestamp(created, UTC):%Y-%m-%d %H:%M} UTC")
        elif not store.remove_token(config.name):
            raise RunError(f"There is no token for {config.name}; limner token list shows those there are.")


def plan(config: TokenConfig) -> dict[str, Any]:
    """What `run` would do."""
    return {"action": config.action, "name": config.name or "all", "data": config.out}
