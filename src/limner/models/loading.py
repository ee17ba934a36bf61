"""Finding and reading models: `builtin`, a run or model folder, one part of a model, or a hub id.

A training run leaves a *part* (`<run>/model/vae/`); a model folder has all parts side by side, as Diffusers lays
them out. Weights are read from safetensors only, and only as classes that are named here.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner import artifacts
from limner.errors import ModelError
from limner.models import hub
from limner.models.clip import HALF, OPENAI, PREPROCESSOR, Clip

if TYPE_CHECKING:
    import torch

BUILTIN = Path(__file__).parents[1] / "builtin"

CLASSES: dict[str, tuple[str, ...]] = {
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "unet": ("UNet2DConditionModel",),
    "scheduler": (),
    "clip": ("CLIPModel", "SiglipModel"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": (),
}
"""The parts, and the classes that each may have; a scheduler may be any of Diffusers'."""

NOUNS = {"vae": "VAE", "unet": "U-Net", "clip": "CLIP", "text_encoder": "text encoder"}
MODEL_TYPES = {"clip": "CLIPModel", "siglip": "SiglipModel", "clip_text_model": "CLIPTextModel"}
"""The class that a config without `architectures` means."""

TOKENIZERS: dict[str, tuple[str, ...]] = {
    "CLIPTokenizer": ("tokenizer.json", "vocab.json"),
    "SiglipTokenizer": ("spiece.model",),
    "Siglip2Tokenizer": ("tokenizer.json",),
}
"""The classes that a tokenizer may have, and the files of which each needs one."""


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


def resolve_here(ref: str) -> Path | None:
    """As `resolve`, of what is on this machine; None for a hub id that would have to be fetched. Raises ModelError."""
    return hub.cached(ref) if is_hub_id(ref) else resolve(ref)


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
    what = f"it holds {', '.join(held) or 'no part of a model'}"
    if (c := class_of(root)) and not any(c in known for known in CLASSES.values()):
        what = f"it is of class {c}"
    elif odd := [c for place in places if (c := class_of(place)) and CLASSES[name]]:
        what = f"its {noun} is of class {odd[0]}"
    raise ModelError(f"{ref} has no {noun} that Limner can use ({what}); name a run, folder or hub id with one.")


def class_of(folder: Path) -> str | None:
    """The class that a part's config.json names; None where there is no such file."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = read_config(file)
    listed = config.get("architectures")
    named = config.get("_class_name") or (listed[0] if listed and isinstance(listed, list) else None)
    return str(named) if named else MODEL_TYPES.get(str(config.get("model_type")))


def fits(folder: Path, name: str) -> bool:
    """Whether `folder` itself is the part `name`."""
    if name == "scheduler":
        return (folder / "scheduler_config.json").is_file()
    if name == "tokenizer":
        return any((folder / file).is_file() for files in TOKENIZERS.values() for file in files)
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


_quieting = threading.Lock()
_loud: list[list[tuple[Any, int]]] = []  # for each that wants quiet, what the libraries' logs were before the first did
LOGS = ("diffusers.utils.logging", "transformers.utils.logging")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep messages and progress bars of Diffusers and Transformers, as far as they are imported, off the terminal;
    errors are raised too.

    For any thread: they are back when the last one has left.
    """
    with _quieting:
        # Once for all: each time a logger's level is set, Python forgets what every other one lets through
        _loud.append(_loud[0] if _loud else _silence())
    try:
        yield
    finally:
        with _quieting:
            levels = _loud.pop()
            if not _loud:
                for log, level in levels:
                    log.set_verbosity(level)
                    log.enable_progress_bar()


def _silence() -> list[tuple[Any, int]]:
    """-> what says less now, and its verbosity until then."""
    logs = [sys.modules[name] for name in LOGS if name in sys.modules]
    levels = [(log, log.get_verbosity()) for log in logs]
    for log in logs:
        log.set_verbosity(logging.CRITICAL)
        log.disable_progress_bar()
    return levels


@contextmanager
def reading(what: str, folder: Path) -> Iterator[None]:
    """Turn what the libraries raise about a broken or unfitting folder into one sentence; quieten them meanwhile."""
    try:
        with quiet():
            yield
    except Exception as error:  # some raise a bare Exception; nothing of ours runs in here
        if is_out_of_memory(error):
            raise
        told = re.sub(r":\s*\n\s*", ": ", str(error)).strip()  # a line that ends in a colon says nothing yet
        reason = told.split("\n")[0].rstrip(".") or type(error).__name__
        raise ModelError(f"The {what} in {folder} can't be read ({reason}); fetch or make it again.") from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python's or torch's says that memory, of the machine or a GPU, is too small."""
    told = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))
    return bool(told) or isinstance(error, MemoryError)


def _weights(cls: Any, what: str, folder: Path, dtype: torch.dtype | None) -> Any:
    """An instance of a Diffusers or Transformers model class, in evaluation mode, every weight read from the file."""
    import torch

    names = [p.name for p in folder.iterdir()]
    hub.refuse_pickles(names, names, {}, str(folder))
    with reading(what, folder):
        model, info = cls.from_pretrained(
            folder,
            dtype=dtype or torch.float32,
            variant=hub.variant(names),
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # so that they come to be named below
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"The {what} in {folder} lacks the weight {missing[0]}; fetch or make it again.")
    for name, found, wanted in info["mismatched_keys"]:
        raise ModelError(
            f"The weight {name} of the {what} in {folder} is of shape {tuple(found)}, but its config.json says "
            f"{tuple(wanted)}; fetch or make it again."
        )
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
    """The tokenizer of `ref`: a CLIPTokenizer, a SiglipTokenizer or, for SigLIP 2, a Siglip2Tokenizer.

    Raises ModelError.
    """
    folder = component(ref, "tokenizer")
    name = _tokenizer_class(folder)
    if not any((folder / file).is_file() for file in TOKENIZERS[name]):
        raise ModelError(f"The {name} in {folder} lacks {' or '.join(TOKENIZERS[name])}; fetch or make it again.")
    if name == "CLIPTokenizer":
        from transformers.models.clip.tokenization_clip import CLIPTokenizer as Tokenizer
    elif name == "Siglip2Tokenizer":
        from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer as Tokenizer
    else:
        if find_spec("sentencepiece") is None:
            raise ModelError(f"The {name} in {folder} needs sentencepiece; install with: pip install 'limner[train]'.")
        from transformers.models.siglip.tokenization_siglip import SiglipTokenizer as Tokenizer
    with reading("tokenizer", folder):
        return Tokenizer.from_pretrained(folder, local_files_only=True)


def _tokenizer_class(folder: Path) -> str:
    """Which of `TOKENIZERS` the tokenizer in `folder` is. Raises ModelError where it is another."""
    file = folder / "tokenizer_config.json"
    named = read_config(file).get("tokenizer_class") if file.is_file() else None
    name = str(named or ("SiglipTokenizer" if (folder / "spiece.model").is_file() else "CLIPTokenizer"))
    name = name.removesuffix("Fast")
    if name == "GemmaTokenizer":  # what SigLIP 2 names, though it was trained on Gemma's tokens of lower-cased text
        name = "Siglip2Tokenizer"
    if name not in TOKENIZERS:
        raise ModelError(f"The tokenizer in {folder} is of class {name}; choose a model with a CLIPTokenizer.")
    return name


def load_text_encoder(ref: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The CLIPTextModel and CLIPTokenizer of `ref`, out of its CLIP where it has no text encoder by itself.

    Raises ModelError.
    """
    from transformers.models.clip.modeling_clip import CLIPTextModel

    if _text_part(ref) == "text_encoder":
        encoder = _weights(CLIPTextModel, "text encoder", component(ref, "text_encoder"), dtype)
        return encoder, load_tokenizer(ref)
    clip = load_clip(ref, dtype)
    if not clip.causal:
        raise ModelError(f"{ref} is a SigLIP, whose text tower no U-Net of Stable Diffusion reads; name a CLIP.")
    return clip.network.text_model, clip.tokenizer


def load_clip(ref: str, dtype: torch.dtype | None = None) -> Clip:
    """The CLIPModel or SiglipModel of `ref`, with both towers, its tokenizer and normalisation. Raises ModelError."""
    folder = component(ref, "clip")
    if class_of(folder) == "SiglipModel":
        from transformers.models.siglip.modeling_siglip import SiglipModel as Network
    else:
        from transformers.models.clip.modeling_clip import CLIPModel as Network
    normalisation = read_normalisation(folder)
    tokenizer = load_tokenizer(str(folder))
    network = _weights(Network, "CLIP", folder, dtype)
    entries, room = len(tokenizer), network.config.text_config.vocab_size
    if entries > room:
        raise ModelError(
            f"The tokenizer in {folder} has {entries} entries, but its text tower reads {room}; fetch or make it again."
        )
    return Clip(network, tokenizer, normalisation)


def read_normalisation(folder: Path) -> dict[str, list[float]]:
    """`image_mean` and `image_std` that the CLIP in `folder` wants of pixels in [0, 1], three numbers each.

    Raises ModelError.
    """
    known: dict[str, Any] = {}
    for file in (folder / PREPROCESSOR, folder / "processor_config.json"):  # Transformers 5 nests all in the second
        config = read_config(file) if file.is_file() else {}
        nested = config.get("image_processor")
        known |= nested if isinstance(nested, dict) else config
    default = HALF if class_of(folder) == "SiglipModel" else OPENAI
    normalisation = {name: known.get(name, values) for name, values in default.items()}
    for name, values in normalisation.items():
        if not (isinstance(values, list) and [isinstance(v, int | float) for v in values] == [True] * 3):
            raise ModelError(f"The {name} of the CLIP in {folder} is not three numbers; fetch or make it again.")
    return normalisation


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


def tensor_names(file: Path, what: str) -> list[str]:
    """Names of the tensors in a safetensors file. Raises ModelError, which calls it `what`, where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError):
        raise ModelError(
            f"The {what} {file} is not a whole safetensors file; fetch it again, and as safetensors, since pickles may "
            "carry code."
        ) from None
