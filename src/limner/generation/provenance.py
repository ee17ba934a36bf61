"""A picture knows its origin: what is written into a PNG, how it is read back, and where the file goes.

Two text chunks. `parameters` is what stable-diffusion-webui (A1111) writes, which other programs show. `limner` is
JSON with every setting, the versions of the libraries, the device, and the sha256 of every weight file.
"""

from __future__ import annotations

import json
import platform
import re
import unicodedata
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner.artifacts import atomic_file
from limner.diffusion import samplers
from limner.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from limner.generation.jobs import Job

RECORD, PARAMETERS = "limner", "parameters"
FORMAT = 1  # of the record; higher when a reader of this one would misread it
LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "pillow", "numpy")
NAME_BYTES = 100  # of a file name, so that numbers and endings fit beside it


def make_record(job: Job, model: dict[str, Any], device: dict[str, Any]) -> dict[str, Any]:
    """Everything that the picture came from; `model` as `Model.facts` says, `device` as `Model.device_facts`."""
    from limner import __version__

    libraries = {name: version(name) for name in LIBRARIES}
    versions = {"limner": __version__, "python": platform.python_version(), **libraries}
    return {"format": FORMAT, **asdict(job), "model": model, "device": device, "versions": versions}


def parameters(record: dict[str, Any]) -> str:
    """The record as A1111 writes it: prompt, negative prompt, and a line of settings."""
    model = record["model"]
    settings = {
        "Steps": record["steps"],
        "Sampler": samplers.label(record["scheduler"], model["scheduler"]),
        "CFG scale": f"{record['guidance']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": model["sha256"][:10],
        "Model": model["ref"],
        "Version": f"limner {record['versions']['limner']}",
    }
    if added := [f"{Path(lora['ref']).name}:{lora['weight']:g}" for lora in model["loras"]]:
        settings["Loras"] = ", ".join(added)
    if added := [f"{embedding['token']}: {embedding['sha256'][:12]}" for embedding in model["embeddings"]]:
        settings["TI hashes"] = ", ".join(added)
    optional = {
        "CFG rescale": record["guidance_rescale"],
        "Template": record["template"],
        "Negative Template": record["negative_template"],
    }
    settings |= {name: value for name, value in optional.items() if value}
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items())
    negative = [f"Negative prompt: {record['negative']}"] if record["negative"] else []
    return "\n".join([record["prompt"], *negative, line])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value


def save(image: Image, record: dict[str, Any], folder: Path) -> Path:
    """Write the picture as a PNG into `folder`, whole or not at all, under a name that no file has; return the path.

    Raises OSError as the writing does.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(PARAMETERS, parameters(record))
    info.add_text(RECORD, json.dumps(record))
    path = _claim(folder, f"{_slug(record['prompt'])}-{record['seed']}")
    try:
        with atomic_file(path) as partial:
            image.save(partial, "PNG", pnginfo=info)
    except BaseException:
        path.unlink()
        raise
    return path


def _claim(folder: Path, stem: str) -> Path:
    """An empty file of a new name, which no other process can take from then on."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path


def _slug(prompt: str) -> str:
    """`A dog, on a beach.` -> `a-dog-on-a-beach`; letters and digits of any script are kept."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt.lower()))
    slug = "-".join(words).encode()[:NAME_BYTES].decode(errors="ignore").strip("-")
    return slug or "picture"


def read(file: Path) -> dict[str, Any]:
    """The record in a picture that Limner drew. Raises DataError where there is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            image.load()
            text = image.info.get(RECORD)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a whole picture"
        raise DataError(f"{file} can't be read ({reason}).") from None
    try:
        record = json.loads(text or "")
        known = record["format"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(
            f"{file} does not say how it was drawn; it is not Limner's, or another program saved it again."
        ) from None
    if known != FORMAT:
        raise DataError(f"{file} was drawn by another version of Limner, whose record this one can't read.")
    return dict(record)
