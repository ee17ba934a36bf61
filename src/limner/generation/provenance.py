"""A picture knows its origin: what its file says of it, how that is read back, and where the file goes.

Two texts, which `files` puts in their places. The parameters are what stable-diffusion-webui (A1111) writes, which
other programs show. The record is JSON with every setting, the versions of the libraries, the device, and the sha256
of every weight file.
"""

from __future__ import annotations

import functools
import itertools
import json
import platform
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from limner import artifacts
from limner.config import Engine
from limner.diffusion import samplers
from limner.errors import ConfigError, DataError
from limner.generation import files
from limner.generation.sources import Source

if TYPE_CHECKING:
    from PIL.Image import Image

    from limner.config import Format
    from limner.generation.jobs import Job

FORMAT = 1  # of the record; higher when a reader of this one would misread it
LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "pillow", "numpy")
NAME_BYTES = 100  # of a file name, so that numbers and endings fit beside it


def make_record(job: Job, model: dict[str, Any], device: dict[str, Any]) -> dict[str, Any]:
    """Everything that the picture came from; `model` as `Model.facts` says, `device` as `Model.device_facts`."""
    from limner import __version__

    engine = ["openvino"] if device["engine"] == "openvino" else []
    libraries = {name: _version(name) for name in (*LIBRARIES, *engine)}
    versions = {"limner": __version__, "python": platform.python_version(), **libraries}
    settings = {field.name: _plain(getattr(job, field.name)) for field in fields(job)}
    return {"format": FORMAT, **settings, "model": model, "device": device, "versions": versions}


_version = functools.cache(version)  # which looks into folders each time


def _plain(value: Any) -> Any:
    """A setting as JSON has it; of a picture its name and hash."""
    if isinstance(value, Source):
        return {"file": value.ref, "sha256": value.sha256}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def differences(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a picture was drawn with that is otherwise `now`, in the record of the same picture drawn again."""
    found = []
    hashed: list[tuple[str, dict[str, str], dict[str, str]]] = [
        ("weights", record["model"]["weights"], now["model"]["weights"]),
        ("LoRA", _added(record, "loras"), _added(now, "loras")),
        ("embedding", _added(record, "embeddings"), _added(now, "embeddings")),
        ("picture", _pictures(record), _pictures(now)),
    ]
    for what, one, other in hashed:
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                state = "is gone" if name not in other else "is new" if name not in one else "has changed"
                found.append(f"{what} {name} {state}")
    for what, one, other in (
        ("scheduler", record["model"]["scheduler"], now["model"]["scheduler"]),
        ("version of", record["versions"], now["versions"]),
        ("device", {"engine": "torch", **record["device"]}, now["device"]),  # which older records don't name
    ):
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                found.append(f"{what} {name}: {one.get(name)} then, {other.get(name)} now")
    return found


def _added(record: dict[str, Any], kind: str) -> dict[str, str]:
    """The sha256 of LoRAs or textual inversions."""
    return {added["ref"]: added["sha256"] for added in record["model"].get(kind, [])}


def _pictures(record: dict[str, Any]) -> dict[str, str]:
    """The sha256 of the pictures that a drawing began with."""
    begun = {f"of {role}": record.get(role) for role in ("image", "mask")}
    return {role: facts["sha256"] for role, facts in begun.items() if facts is not None}


def parameters(record: dict[str, Any]) -> str:
    """The record as A1111 writes it: prompt, negative prompt, and a line of settings."""
    model = record["model"]
    settings = {
        "Steps": record["steps"],
        "Sampler": samplers.label(record["scheduler"], model["scheduler"]),
        **({} if record["guidance"] is None else {"CFG scale": f"{record['guidance']:g}"}),
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": model["sha256"][:10],
        "Model": model["ref"],
        "Version": f"limner {record['versions']['limner']}",
    }
    if record.get("strength") is not None:
        settings["Denoising strength"] = f"{record['strength']:g}"
    if (variation := record.get("variation")) is not None:
        settings |= {"Variation seed": variation["seed"], "Variation seed strength": f"{variation['strength']:g}"}
    if added := [f"{Path(lora['ref']).name}:{lora['weight']:g}" for lora in model["loras"]]:
        settings["Loras"] = ", ".join(added)
    if added := [f"{embedding['token']}: {embedding['sha256'][:12]}" for embedding in model["embeddings"]]:
        settings["TI hashes"] = ", ".join(added)
    optional = {
        "CFG rescale": record["guidance_rescale"],
        "DeepCache": record["reuse"] if record["reuse"] > 1 else None,
        "Template": record["template"],
        "Negative Template": record["negative_template"],
    }
    settings |= {name: value for name, value in optional.items() if value}
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items())
    negative = [f"Negative prompt: {record['negative']}"] if record["negative"] else []
    return "\n".join([record["prompt"], *negative, line])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value


def save(image: Image, record: dict[str, Any], folder: Path, kind: Format = "png", quality: int = 95) -> Path:
    """Write the picture into `folder`, whole or not at all, under a name that no file has; return the path.

    The record of a JPEG or WebP has `quality` in it too. Raises OSError as the writing does, and ConfigError as
    `files.write`, or for another `kind`.
    """
    if kind not in files.SUFFIXES:
        raise ConfigError(f"The format {kind!r} is none of {', '.join(files.SUFFIXES)}; choose one of them.")
    texts = _texts(record, kind, quality)
    names = free_names(folder / f"{slug(record['prompt'])}-{record['seed']}{files.SUFFIXES[kind]}")
    return artifacts.write_new(names, lambda path: files.write(image, path, kind, quality, *texts))


def write(image: Image, record: dict[str, Any], path: Path) -> None:
    """Write the picture as the PNG `path`, whole or not at all. Raises OSError as the writing does."""
    with artifacts.atomic_file(path) as partial:
        files.write(image, partial, "png", 100, *_texts(record, "png", 100))


def check_fits(record: dict[str, Any], kind: Format) -> None:
    """Raise ConfigError where the record is too long for such a file."""
    from PIL import Image as Images

    files.write(Images.new("RGB", (1, 1)), BytesIO(), kind, 100, *_texts(record, kind, 100))


def _texts(record: dict[str, Any], kind: Format, quality: int) -> tuple[str, str]:
    """What `files.write` puts beside the pixels."""
    written = record if kind == "png" else {**record, "quality": quality}
    return parameters(written), json.dumps(written)


def free_names(path: Path) -> Iterator[Path]:
    """`dog.png`, `dog-2.png`, `dog-3.png`, ..."""
    yield path
    for number in itertools.count(2):
        yield path.with_stem(f"{path.stem}-{number}")


def slug(prompt: str) -> str:
    """`A dog, on a beach.` -> `a-dog-on-a-beach`; letters and digits of any script are kept."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt.lower()))
    slug = "-".join(words).encode()[:NAME_BYTES].decode(errors="ignore").strip("-")
    return slug or "picture"


def read(file: Path) -> dict[str, Any]:
    """The record in a picture that Limner drew. Raises DataError where there is none."""
    return parsed(file, files.read(file)[2])


def parsed(file: Path, text: str) -> dict[str, Any]:
    """The record that `files.read` found in a file. Raises DataError where it is none."""
    try:
        record = json.loads(text)
        known = record["format"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(
            f"{file} does not say how it was drawn; it is not Limner's, or another program saved it again."
        ) from None
    if known != FORMAT:
        raise DataError(f"{file} was drawn by another version of Limner, whose record this one can't read.")
    return dict(record)


class _Part(BaseModel):
    """What of a record is read to draw the picture again; there may be more in it."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _File(_Part):
    file: str
    sha256: str


class _Variation(_Part):
    seed: int
    strength: float


class _Lora(_Part):
    ref: str
    sha256: str
    weight: float


class _Embedding(_Part):
    ref: str
    sha256: str
    token: str


class _Model(_Part):
    ref: str
    scheduler: dict[str, Any]
    weights: dict[str, str]
    loras: list[_Lora]
    embeddings: list[_Embedding] = []


class _Device(_Part):
    precision: Literal["fp32", "bf16"] = "fp32"
    low_memory: bool = False
    engine: Engine = "torch"


class _Record(_Part):
    """Those with a default are not in every record: Limner's earlier ones had no such setting."""

    prompt: str
    negative: str
    seed: int
    steps: int | None
    guidance: float | None
    width: int
    height: int
    scheduler: str | None = None
    guidance_rescale: float = 0.0
    reuse: int = 1
    variation: _Variation | None = None
    image: _File | None = None
    mask: _File | None = None
    strength: float | None = None
    quality: int = Field(default=95, ge=1, le=100)
    model: _Model
    device: _Device
    versions: dict[str, str]


def checked(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a file with what a picture is drawn from, and no more. Raises DataError where another program
    changed it."""
    try:
        return _Record.model_validate(record).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"The record in {file} can't be used ({where}: {first['msg'].lower()}); another program changed it."
        ) from None
