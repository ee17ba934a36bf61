"""limner models show: what a model is made of."""

from __future__ import annotations

import json
from typing import Any

from limner.config import ShowModelConfig
from limner.errors import ModelError
from limner.models import loading


def run(config: ShowModelConfig) -> None:
    """Print what is known of a model that is here; nothing is fetched. Raises ModelError."""
    ref = config.model
    folder = loading.resolve_here(ref)
    if folder is None:
        raise ModelError(f"There is no model folder {ref}, nor is it in the hub's cache; limner models pull {ref}.")
    from limner.generation import catalogue

    facts = catalogue.facts(catalogue.look_into(ref, folder))
    print(json.dumps(facts, indent=2) if config.as_json else "\n".join(_lines(facts)))


def _lines(facts: dict[str, Any]) -> list[str]:
    """The facts as a person reads them."""
    plain = ("model", "folder", "class", "draws with", "licence", "size", "steps", "guidance")
    lines = [f"{name:<11} {facts[name]}" for name in plain if facts[name] is not None]
    lines.append(f"{'files':<11} {facts['bytes'] / 1e6:,.1f} MB")
    for name, part in facts["parts"].items():
        lines.append(f"{name:<13} {part['class']}, {part['parameters'] / 1e6:,.2f} M parameters")
        lines += [f"  {digest}  {file}" for file, digest in part["sha256"].items()]
    needs = ", ".join(f"{value / 1e9:.2f} GB {_how(name)}" for name, value in facts["needs"].items())
    ((where, there),) = facts["free"].items()
    lines.append(f"{'needs':<11} about {needs}")
    lines.append(f"{'here':<11} {there / 1e9:.2f} GB of {where} are free; does it fit: {facts['fits']}")
    return lines


def _how(name: str) -> str:
    return "with --low-memory" if name == "low_memory" else f"in {name}"
