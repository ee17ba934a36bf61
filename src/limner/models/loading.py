"""Finding and reading models: `builtin`, a run or model folder, one part of a model, or a hub id.

A training run leaves a *part* (`<run>/model/vae/`); a model folder has all parts side by side, as Diffusers lays
them out. Weights are read from safetensors only, and only as classes that are named here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner import artifacts
from limner.errors import ModelError
from limner.models import hub

if TYPE_CHECKING:
    import torch

BUILTIN = Path(__file__).parents[1] / "builtin"

CLASSES: dict[str, tuple[str, ...]] = {
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "unet": ("UNet2DConditionModel",),
    "scheduler": (),
    "clip": ("CLIPModel",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": (),
}
"""The parts, and the classes that each may have; a scheduler may be any of Diffusers'."""

NOUNS = {"vae": "VAE", "unet": "U-Net", "clip": "CLIP", "text_encoder": "text encoder"}
MODEL_TYPES = {"clip": "CLIPModel", "clip_text_model": "CLIPTextModel"}  # for a config without `architectures`
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def resolve(ref: str) -> Path:
    """The folder that a reference to a model means: `builtin`, a folder, or a hub id, which is fetched.

    Raises ModelError in one sentence.
    """
    if ref == "builtin":
        if not (BUILTIN / "model_index.json").exists():
            raise ModelError("This installation has no built-in model; name a model folder or a hub id with --model.")
        return BUILTIN
    if is_hub_id(ref):
        return hub.fetch(ref)
    folder = _path(ref)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{ref} is a file; name the model folder that it belongs to.")
    raise ModelError(f"There is no model folder {ref}; name one that exists, a hub id or builtin.")


def is_hub_id(ref: str) -> bool:
    """Whether a reference to a model means one on the hub: neither `builtin` nor anything that lies here."""
    return ref != "builtin" and not _path(ref).exists() and hub.looks_like_hub_id(ref)


def _path(ref: str) -> Path:
    try:
        return Path(ref).expanduser()
    except RuntimeError:  # the home of somebody who has none here
        return Path(ref)


def component(ref: str, name: str) -> Path:
    """The folder of one part of a model: "vae", "unet", "scheduler", "clip", "text_encoder" or "tokenizer".

    `ref` may be a run, a model folder, that part's own folder, a hub id or `builtin`. Raises ModelError.
    """
    root = resolve(ref)
    places = [root / name, root / "model" / name]
    if name == "tokenizer":  # a CLIP carries its own
        places += [root / "clip", root / "model" / "clip"]
    for place in (*places, root):
        if fits(place, name):
            return place
    noun = NOUNS.get(name, name)
    held = parts_in(root)
    if (root / "checkpoints").is_dir() and not held:
        raise ModelError(f"The run in {ref} has no result yet; finish it by running its command again.")
    odd = [c for p in places if (c := class_of(p)) and CLASSES[name]]
    what = f"its {noun} is of class {odd[0]}" if odd else f"it holds {', '.join(held) or 'no part of a model'}"
    raise ModelError(f"{ref} has no {noun} that Limner can use ({what}); name a run, folder or hub id with one.")


def class_of(folder: Path) -> str | None:
    """The class that a part's config.json names; None where there is no such file."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = read_config(file)
    listed = config.get("architectures") or [MODEL_TYPES.get(config.get("model_type", ""))]
    return config.get("_class_name") or listed[0]


def fits(folder: Path, name: str) -> bool:
    """Whether `folder` itself is the part `name`."""
    if name == "scheduler":
        return (folder / "scheduler_config.json").is_file()
    if name == "tokenizer":
        return any((folder / file).is_file() for file in TOKENIZER_FILES)
    return class_of(folder) in CLASSES[name]


def read_config(file: Path) -> dict[str, Any]:
    """A part's JSON file. Raises ModelError where it can't be read."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{file} can't be read ({reason}); fetch or assemble the model again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} does not hold settings by name; fetch or assemble the model again.")
    return config


def pipeline_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a whole model folder.

    Raises ModelError where it is missing, names code of its own in place of Diffusers' classes, or has pickles only.
    """
    file = folder / "model_index.json"
    if not file.is_file():
        held = parts_in(folder)
        if not held and (folder / "checkpoints").is_dir():
            raise ModelError(f"The run in {folder} has no result yet; finish it by running its command again.")
        what = f"only the part {' and '.join(held)}; join parts with limner assemble" if held else "no model"
        raise ModelError(f"{folder} holds {what}; a whole model has a model_index.json.")
    index = read_config(file)
    hub.refuse_code(index, str(folder))
    names = [p.relative_to(folder).as_posix() for p in folder.glob("*/*")]
    hub.refuse_pickles(names, names, index, str(folder))
    return index


def parts_in(root: Path) -> list[str]:
    """The parts that a run or model folder holds, or is."""
    return [name for name in CLASSES if any(fits(place, name) for place in (root / name, root / "model" / name, root))]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and progress bars of Diffusers and Transformers off the terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels):
            log.set_verbosity(level)
            log.enable_progress_bar()


@contextmanager
def reading(what: str, folder: Path) -> Iterator[None]:
    """Turn what the libraries raise about a broken or unfitting folder into one sentence; quieten them meanwhile."""
    from safetensors import SafetensorError

    problems = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, SafetensorError)
    try:
        with quiet():
            yield
    except problems as error:
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise ModelError(f"The {what} in {folder} can't be read ({reason}); fetch or make it again.") from None


def variant(names: Iterable[str]) -> str | None:
    """The variant to load of these weight files: None where there is a plain one, or else the first."""
    variants = {hub.variant_of(name) for name in names if name.endswith(".safetensors")}
    return None if None in variants else min((v for v in variants if v), default=None)


def _weights(cls: Any, what: str, folder: Path, dtype: torch.dtype | None) -> Any:
    """An instance of a Diffusers or Transformers model class, in evaluation mode, every weight read from the file."""
    import torch

    names = [p.name for p in folder.iterdir()]
    hub.refuse_pickles(names, names, {}, str(folder))
    with reading(what, folder):
        model, info = cls.from_pretrained(
            folder,
            dtype=dtype or torch.float32,
            variant=variant(names),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"]):
        raise ModelError(f"The {what} in {folder} lacks the weight {missing[0]}; fetch or make it again.")
    return model.eval()


def load_vae(ref: str, dtype: torch.dtype | None = None) -> Any:
    """The VAE of `ref`, an AutoencoderKL or AutoencoderTiny, float32 unless told. Raises ModelError."""
    folder = component(ref, "vae")
    if class_of(folder) == "AutoencoderTiny":
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as Vae
    else:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Vae
    return _weights(Vae, "VAE", folder, dtype)


def load_unet(ref: str, dtype: torch.dtype | None = None) -> Any:
    """The U-Net of `ref`, a UNet2DConditionModel, float32 unless told. Raises ModelError."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return _weights(UNet2DConditionModel, "U-Net", component(ref, "unet"), dtype)


def load_scheduler(ref: str) -> Any:
    """The noise schedule and sampler of `ref`, of the class that it names. Raises ModelError."""
    import diffusers

    folder = component(ref, "scheduler")
    name = str(read_config(folder / "scheduler_config.json").get("_class_name"))
    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if cls is None:
        raise ModelError(f"The scheduler {name} in {folder} is not one of Diffusers'; choose another model.")
    with reading("scheduler", folder):
        return cls.from_pretrained(folder, local_files_only=True)


def load_tokenizer(ref: str) -> Any:
    """The CLIPTokenizer of `ref`. Raises ModelError."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    folder = component(ref, "tokenizer")
    with reading("tokenizer", folder):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def load_text_encoder(ref: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The CLIPTextModel and CLIPTokenizer of `ref`, out of its CLIP where it has no text encoder by itself.

    Raises ModelError.
    """
    from transformers.models.clip.modeling_clip import CLIPTextModel

    if _text_part(ref) == "text_encoder":
        encoder = _weights(CLIPTextModel, "text encoder", component(ref, "text_encoder"), dtype)
        return encoder, load_tokenizer(ref)
    clip, tokenizer = load_clip(ref, dtype)
    return clip.text_model, tokenizer


def load_clip(ref: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The CLIPModel, with both towers, and the CLIPTokenizer of `ref`. Raises ModelError."""
    from transformers.models.clip.modeling_clip import CLIPModel

    folder = component(ref, "clip")
    return _weights(CLIPModel, "CLIP", folder, dtype), load_tokenizer(str(folder))


def identity(ref: str, name: str) -> str:
    """The sha256 of one part's weights, for a manifest. Raises ModelError."""
    return artifacts.identity(component(ref, name))


def text_identity(ref: str) -> str:
    """The sha256 of the weights that `load_text_encoder` reads, for a manifest. Raises ModelError."""
    return identity(ref, _text_part(ref))


def _text_part(ref: str) -> str:
    """Where the text encoder of `ref` comes from: its own folder, or its CLIP."""
    root = resolve(ref)
    own = any(fits(place, "text_encoder") for place in (root, root / "text_encoder"))
    return "text_encoder" if own else "clip"
