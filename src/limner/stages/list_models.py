"""limner models list: the models that are on this machine."""

from __future__ import annotations

import json
from typing import Any

from limner.config import ListModelsConfig
from limner.errors import ConfigError, ModelError


def run(config: ListModelsConfig) -> None:
    """Print a line for each model. Raises ConfigError where the folder is not there."""
    if not config.folder.is_dir():
        raise ConfigError(f"There is no folder {config.folder}; name one that holds models.")
    from limner.generation import catalogue

    there, where = catalogue.free_memory()
    rows: list[dict[str, Any]] = []
    for ref, found in catalogue.look_around(config.folder):
        if isinstance(found, ModelError):
            rows.append({"model": ref, "error": str(found)})
            continue
        size = found.spec.size
        rows.append(
            {
                "model": ref,
                "class": found.spec.pipeline,
                "parameters": sum(found.parameters.values()),
                "bytes": found.bytes,
                "pixels": f"{size[0]}x{size[1]}" if size else "",
                "licence": found.licence,
                "fits": found.fitting(there),
            }
        )
    if config.as_json:
        print(json.dumps(rows, indent=2))
        return
    heads = ("model", "class", "parameters", "files", "pixels", "licence", f"fits in {there / 1e9:.1f} GB of {where}")
    shown = [heads, *(_cells(row) for row in rows)]
    widths = [max(len(cells[i]) for cells in shown if len(cells) > 2) for i in range(len(heads))]
    for cells in shown:
        if len(cells) == 2:
            print(f"{cells[0]:<{widths[0]}}  {cells[1]}")
        else:
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths)).rstrip())


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "error" in row:
        return row["model"], f"can't be used: {row['error']}"
    parameters, size = f"{row['parameters'] / 1e6:,.1f} M", f"{row['bytes'] / 1e6:,.0f} MB"
    return row["model"], row["class"], parameters, size, row["pixels"], row["licence"], row["fits"]
