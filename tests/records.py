"""Records of pictures that nobody drew, for the tests of what a file says of its picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from limner.generation import provenance
from limner.generation.jobs import Job

JOB = Job("A dog.", "", 7, 25, 7.5, 16, 16)
MODEL: dict[str, Any] = {
    "ref": "builtin",
    "pipeline": "StableDiffusionPipeline",
    "scheduler": {"_class_name": "DDIMScheduler"},
    "weights": {"unet/a.safetensors": "0" * 64},
    "sha256": "abcdef" + "0" * 58,
    "loras": [],
    "embeddings": [],
}
DEVICE = {"type": "cpu", "name": "x86_64", "threads": 2, "engine": "torch"}
IMAGE = Image.new("RGB", (16, 16), "red")

any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200)


def record(**changes: Any) -> dict[str, Any]:
    """The record of a job that differs from `JOB` as told."""
    return provenance.make_record(replace(JOB, **changes), MODEL, DEVICE)
