"""MODEL_CARD.md: what a model is made of, as its folder and the manifests of its trainings have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limner.artifacts import sha256

PARTS = ("text_encoder", "vae", "unet", "clip")
NAMES = {"clip": "CLIP", "vae": "VAE", "unet": "U-Net"}


def model_card(folder: Path, facts: dict[str, Any], text: str) -> str:
    """The card of the model in `folder`, from its manifest's `facts`, with the author's own `text` first."""
    sections = [text.strip() or "# A text-to-image model", _use(facts), _parts(folder)]
    if facts["trainings"]:
        sections.append(_trainings(facts["trainings"]))
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


def _parts(folder: Path) -> str:
    rows = ["## Parts", "", "| part | class | file | bytes | sha256 |", "| --- | --- | --- | ---: | --- |"]
    for part in PARTS:
        for file in sorted((folder / part).glob("*.safetensors")):
            config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
            name = config.get("_class_name") or config["architectures"][0]
            rows.append(f"| {part} | {name} | {file.name} | {file.stat().st_size:,} | `{sha256(file)}` |")
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
