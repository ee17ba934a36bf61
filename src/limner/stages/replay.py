"""limner replay: a picture is drawn again from what its file says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from limner.config import ReplayConfig
from limner.errors import ModelError
from limner.generation import files, provenance, sources
from limner.generation.jobs import Job, Spec, make_jobs, read_embeddings, read_loras, read_spec
from limner.models import loading
from limner.models.inversion import Inversion
from limner.models.lora import Lora


def run(config: ReplayConfig) -> int:
    """Say whether the pixels are the same, and what it was drawn with that is otherwise now; keep one that differs.

    A JPEG or WebP is compared with the new picture in the same kind of file. Returns 0 where the pixels are the same,
    1 where not, as `cmp` does. Raises DataError where the file has no record, or as `generate`.
    """
    import numpy as np

    image, kind, text = files.read(config.image)
    record = provenance.parsed(config.image, text)
    said = provenance.checked(config.image, record)
    spec, (loras, embeddings), job = _read(config, said, _place(config, said))
    from limner.generation.model import Model

    drawn_on = said["device"]
    model = Model(
        spec,
        config.device,
        loras,
        embeddings,
        drawn_on["precision"],
        drawn_on["low_memory"],
        drawn_on["engine"],
    )
    picture = next(model.draw([job]))
    again = picture.image if kind == "png" else files.reencoded(picture.image, kind, said["quality"])
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
        print(
            "  versions, weights and device are the same: the file was changed, or Limner's code within its version, "
            "or the device draws not always alike"
        )
    print(picture.save(config.out))
    return 1


def plan(config: ReplayConfig) -> dict[str, Any]:
    """What would be drawn again; nothing is loaded or fetched."""
    said = provenance.checked(config.image, provenance.read(config.image))
    drawing = {
        "prompt": said["prompt"],
        "seed": said["seed"],
        "size": f"{said['width']}x{said['height']} pixels",
    }
    place = _place(config, said)
    if place is None:
        return {"model": f"{config.model}, to be fetched", **drawing}
    spec, _, job = _read(config, said, place)
    return {"model": f"{spec.ref} ({spec.pipeline})", **drawing, "steps": job.steps_taken}


def _place(config: ReplayConfig, said: dict[str, Any]) -> Path | None:
    """The folder of the model; None where `--model` names one to be fetched.

    What a picture names is not fetched, as it may be a stranger's. Raises ModelError where it is not here.
    """
    ref = config.model or said["model"]["ref"]
    place = loading.resolve_here(ref)
    if place is None and config.model is None:
        raise ModelError(f"{config.image} was drawn with {ref}, which is not here; fetch it with --model {ref}.")
    return place


def _read(
    config: ReplayConfig, said: dict[str, Any], folder: Path | None
) -> tuple[Spec, tuple[Sequence[Lora], Sequence[Inversion]], Job]:
    """The model, the LoRAs and textual inversions added to it, and the job of a record. Raises as `generate`."""
    model, variation, image, mask = (said[name] for name in ("model", "variation", "image", "mask"))
    spec = read_spec(config.model or model["ref"], folder)
    [job] = make_jobs(
        spec,
        [said["prompt"]],
        seed=said["seed"],
        steps=said["steps"],
        guidance=said["guidance"],
        negative=said["negative"],
        size=f"{said['width']}x{said['height']}",
        scheduler=said["scheduler"],
        guidance_rescale=said["guidance_rescale"],
        reuse=said["reuse"],
        variation=variation and f"{variation['seed']}:{variation['strength']!r}",
        image=image and sources.read_picture(Path(image["file"])),
        mask=mask and sources.read_mask(Path(mask["file"])),
        strength=said["strength"],
    )
    loras = [f"{lora['ref']}:{lora['weight']!r}" for lora in model["loras"]]
    found = read_embeddings(spec, [added["ref"] for added in model["embeddings"]])
    # A token of a file's own may have a colon, which FILE:TOKEN can't say
    embeddings = [replace(one, token=added["token"]) for one, added in zip(found, model["embeddings"])]
    return spec, (read_loras(spec, loras), embeddings), job
