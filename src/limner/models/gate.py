"""What a U-Net was trained to read, and whether a text encoder gives it that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from limner.errors import ModelError
from limner.models import loading


@dataclass(frozen=True)
class TextFacts:
    """What a U-Net takes for granted in the text encoder behind its token states; None is what isn't known.

    Which hidden layer it reads is among them: Diffusers' StableDiffusionPipeline reads the last layer of the text
    encoder that it is given, final norm included, and a U-Net that was trained on an earlier one ships an encoder
    that ends there. So the number of layers tells: 23 of OpenCLIP's 24 in Stable Diffusion 2.
    """

    width: int | None = None
    layers: int | None = None
    vocabulary: int | None = None
    """Entries of the token embedding."""
    positions: int | None = None
    activation: str | None = None
    norm_epsilon: float | None = None
    """Of the layer norms, of which the final one is the last thing before the U-Net."""
    padding: int | None = None
    """Token behind the end of a text; the U-Net reads its states too."""
    tokens: str | None = None
    """sha256 of the tokenizer's entries and their numbers."""

    @classmethod
    def of(cls, config: Mapping[str, Any], tokenizer: Any = None) -> Self:
        """The facts of a CLIPTextModel's config.json, and of its tokenizer where one is given."""
        from transformers.models.clip.configuration_clip import CLIPTextConfig

        settings = {**CLIPTextConfig().to_dict(), **config}  # a config.json may leave out what is as by default
        facts = cls(
            width=settings["hidden_size"],
            layers=settings["num_hidden_layers"],
            vocabulary=settings["vocab_size"],
            positions=settings["max_position_embeddings"],
            activation=settings["hidden_act"],
            norm_epsilon=settings["layer_norm_eps"],
        )
        if tokenizer is None:
            return facts
        tokens = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
        return replace(facts, padding=tokenizer.pad_token_id, tokens=hashlib.sha256(tokens).hexdigest())

    def differences(self, other: TextFacts) -> dict[str, tuple[Any, Any]]:
        """What both know and do not agree on: both values by name."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return {name: pair for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]}


WORDS = {"norm_epsilon": "layer_norm_eps", "padding": "padding token"}  # of messages, where they are not the names
KNOWN = (
    (
        TextFacts(768, 12, 49_408, 77, "quick_gelu", 1e-5),
        "take or tune openai/clip-vit-large-patch14, which Stable Diffusion 1.x reads",
    ),
    (
        TextFacts(1024, 23, 49_408, 77, "gelu", 1e-5),
        "take the text encoder of stabilityai/stable-diffusion-2, which is OpenCLIP ViT-H/14 without its last layer",
    ),
)
"""Text encoders that are known by their facts, and what to do to get one."""


def wanted(ref: str) -> TextFacts:
    """What the U-Net of `ref` was trained to read.

    Known from the text encoder and tokenizer beside it in the same model folder or hub model, or from the manifest
    of its training; otherwise only the width is, which is its own `cross_attention_dim` in any case. Raises ModelError.
    """
    root = loading.resolve(ref)
    width = loading.read_config(loading.component(ref, "unet") / "config.json").get("cross_attention_dim")
    manifest = root / "manifest.json"
    if _beside(root).is_file():
        facts = _facts_beside(root, ref)
    elif manifest.is_file() and isinstance(text := loading.read_config(manifest).get("text"), dict):
        facts = TextFacts(**{field.name: text.get(field.name) for field in fields(TextFacts)})
    else:
        facts = TextFacts()
    return replace(facts, width=width)


def check(given: TextFacts, wanted: TextFacts, *, clip: str, unet: str) -> None:
    """Raise ModelError, naming every difference and what would fit, where the U-Net of `unet` can't read `clip`."""
    wrong = given.differences(wanted)
    if "vocabulary" in wrong:
        wrong.pop("tokens", None)  # which goes without saying
    if not wrong:
        return
    told = [
        "other tokens under the same numbers" if name == "tokens" else f"{WORDS.get(name, name)} {one} against {other}"
        for name, (one, other) in wrong.items()
    ]
    raise ModelError(
        f"The text encoder of {clip} is not what the U-Net of {unet} was trained to read ({', '.join(told)}); "
        f"{_remedy(wrong, wanted, unet)}."
    )


def _remedy(wrong: dict[str, tuple[Any, Any]], wanted: TextFacts, unet: str) -> str:
    beside = _beside(loading.resolve(unet)).is_file()
    own = f"the text encoder beside the U-Net in {unet}" if beside else "the CLIP that the U-Net was trained with"
    if "layers" in wrong and "width" not in wrong and wrong["layers"][0] > wrong["layers"][1]:
        return f"cut its layers behind number {wanted.layers}, the last that the U-Net reads, or take {own}"
    return next((remedy for facts, remedy in KNOWN if not facts.differences(wanted)), f"take or tune {own}")


def _beside(root: Path) -> Path:
    return root / "text_encoder" / "config.json"


def _facts_beside(root: Path, ref: str) -> TextFacts:
    folder = _beside(root).parent
    if not loading.fits(folder, "text_encoder"):
        raise ModelError(
            f"The U-Net of {ref} was trained to read a {loading.class_of(folder)}, not a CLIP; choose another U-Net."
        )
    has_tokenizer = loading.fits(root / "tokenizer", "tokenizer")
    tokenizer = loading.load_tokenizer(str(root / "tokenizer")) if has_tokenizer else None
    return TextFacts.of(loading.read_config(_beside(root)), tokenizer)
