"""limner replay: a picture is drawn again from what its file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from limner.config import ReplayConfig
from limner.errors import DataError
from limner.generation import files, provenance, sources
from limner.generation.jobs import Job, Spec, make_jobs, read_embeddings, read_loras, read_spec


def run(config: ReplayConfig) -> int:
    """Say whether the pixels are the same, and what it was drawn with that is otherwise now; keep one that differs.

    A JPEG or WebP is compared with the new picture in the same kind of file. Returns 0 where the pixels are the same,
    1 where not, as `cmp` does. Raises DataError where the file has no record, or as `generate`.
    """
    import numpy as np

    image, kind, text = files.read(config.image)
    record = provenance.parsed(config.image, text)
    spec, (loras, embeddings), job = _read(config, record)
    from limner.generation.model import Model

    drawn_on = record["device"]
    model = Model(
        spec,
        config.device,
        loras,
        embeddings,
        drawn_on.get("precision", "fp32"),
        drawn_on.get("low_memory", False),
        drawn_on.get("engine", "torch"),
    )
    picture = next(model.draw([job]))
    again = picture.image if kind == "png" else files.reencoded(picture.image, kind, record["quality"])
    differences = provenance.differences(record, picture.record)
    one, other = (np.asarray(each.convert("RGB")).astype(int) for each in (image, again))
    same = one.shape == other.shape and not (one != other).any()
    if same:
        print("identical")
    elif one.shape != other.shape:
        print(f"differs: {image.width}x{image.height} pixels, drawn again {again.width}x{again.height}")
    else:
        apart = abs(one - other).max(axis=2)  # (H, W)
        print(f"differs: in {(apart > 0).mean():.1%} of the pixels, by {apart.max()} of 255 at most")
    for difference in differences:
        print(f"  {difference}")
    if same:
        return 0
    if not differences:
        print("  code, weights and device are the same: the file was changed, or the device draws not always alike")
    print(picture.save(config.out))
    return 1


def plan(config: ReplayConfig) -> dict[str, Any]:
    """What would be drawn again; nothing is loaded."""
    record = provenance.read(config.image)
    spec, _, job = _read(config, record)
    return {
        "model": f"{spec.ref} ({spec.pipeline})",
        "prompt": job.prompt,
        "seed": job.seed,
        "size": f"{job.width}x{job.height} pixels",
        "steps": job.steps_taken,
    }


def _read(config: ReplayConfig, record: dict[str, Any]) -> tuple[Spec, tuple[Any, Any], Job]:
    """The model, the LoRAs and textual inversions added to it, and the job of a record.

    Raises DataError where it is not one that Limner wrote.
    """
    try:
        model = record["model"]
        loras = [f"{lora['ref']}:{lora['weight']!r}" for lora in model["loras"]]
        embeddings = [f"{added['ref']}:{added['token']}" for added in model.get("embeddings", [])]
        image, mask = record.get("image"), record.get("mask")
        variation = record.get("variation") and "{seed}:{strength!r}".format(**record["variation"])
        spec = read_spec(config.model or model["ref"])
        [job] = make_jobs(
            spec,
            [record["prompt"]],
            seed=record["seed"],
            steps=record["steps"],
            guidance=record["guidance"],
            negative=record["negative"],
            size=f"{record['width']}x{record['height']}",
            scheduler=record.get("scheduler"),
            guidance_rescale=record.get("guidance_rescale", 0.0),
            reuse=record.get("reuse", 1),
            variation=variation,
            image=image and sources.read_picture(Path(image["file"])),
            mask=mask and sources.read_mask(Path(mask["file"])),
            strength=record.get("strength"),
        )
        return spec, (read_loras(spec, loras), read_embeddings(spec, embeddings)), job
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"The record in {config.image} can't be used ({error}); another program changed it.") from None
