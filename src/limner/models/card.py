"""MODEL_CARD.md: what a model is made of, as its folder and the manifests of its trainings have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limner.artifacts import sha256

PARTS = ("text_encoder", "vae", "unet", "clip")
NAMES = {"clip": "CLIP", "vae": "VAE", "unet": "U-Net"}
GRID = """## Pictures, before and after

A row has one caption and one seed; a column has one CLIP in front of the same U-Net.

![The same captions with the CLIP before and after tuning](grid.png)"""


def model_card(folder: Path, facts: dict[str, Any], text: str) -> str:
    """The card of the model in `folder`, from its manifest's `facts`, with the author's own `text` first."""
    sections = [text.strip() or "# A text-to-image model", _use(facts), _parts(folder, facts)]
    if facts["trainings"]:
        sections.append(_trainings(facts["trainings"]))
    if "retrieval" in facts:
        sections.append(_retrieval(**facts["retrieval"]))
    if (folder / "grid.png").is_file():
        sections.append(GRID)
    return "\n\n".join(sections) + "\n"


def _use(facts: dict[str, Any]) -> str:
    steps, guidance = facts["defaults"]["steps"], facts["defaults"]["guidance"]
    return f"""## Use

With Limner: `limner generate "A dog on a beach." --model FOLDER`, by default in {steps} steps at guidance {guidance:g}.

With Diffusers alone:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER")
pipeline("A dog on a beach.", num_inference_steps={steps}, guidance_scale={guidance:g}).images[0].save("dog.png")
```"""


def _parts(folder: Path, facts: dict[str, Any]) -> str:
    rows = ["## Parts", "", "| part | class | file | bytes | sha256 |", "| --- | --- | --- | ---: | --- |"]
    for part in PARTS:
        for file in sorted((folder / part).glob("*.safetensors")):
            config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
            name = config.get("_class_name") or config["architectures"][0]
            rows.append(f"| {part} | {name} | {file.name} | {file.stat().st_size:,} | `{sha256(file)}` |")
    if "adapter" in facts["parents"]:
        rows += ["", "Keys and values of the U-Net's cross attention have the CLIP's linear adapter in them."]
    return "\n".join(rows)


def _trainings(trainings: dict[str, Any]) -> str:
    rows = [
        "## Trainings",
        "",
        "| part | images seen | seed | on | val figures at the end |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for role, training in trainings.items():
        machine = training["hardware"]
        where = machine["gpu"] or f"{machine['cores']} CPU cores"
        figures = ", ".join(f"{name} {value:.4g}" for name, value in (training["validation"] or {}).items())
        rows.append(f"| {NAMES[role]} | {training['images']:,} | {training['seed']} | {where} | {figures} |")
    return "\n".join(rows)


def _retrieval(split: str, figures: dict[str, dict[str, Any]]) -> str:
    """Figures by CLIP: plain, or with their interval; drift by layer."""
    rows = [
        "## CLIP, before and after" if "base" in figures else "## CLIP",
        "",
        f"| on {split} pictures | {' | '.join(figures)} |",
        f"| --- |{' ---: |' * len(figures)}",
    ]
    columns = [_flat(column) for column in figures.values()]
    for name in dict.fromkeys(name for column in columns for name in column):
        rows.append(f"| {name} | {' | '.join(column.get(name, '') for column in columns)} |")
    return "\n".join([*rows, "", "In brackets: 95 % intervals."])


def _flat(figures: dict[str, Any]) -> dict[str, str]:
    """What stands in the column of a CLIP, by name."""
    drift = figures.get("drift", {})
    cosines = {f"cosine of token states to the base, {layer} layer": cosine for layer, cosine in drift.items()}
    return {name: _figure(found) for name, found in {**figures, **cosines}.items() if name != "drift"}


def _figure(found: Any) -> str:
    if found is None:  # of token states that are not finite
        return "-"
    if not isinstance(found, dict):
        return f"{found:.4g}"
    interval = f" ({found['low']:.4g} to {found['high']:.4g})" if "low" in found else ""
    return f"{found['value']:.4g}{interval}"
