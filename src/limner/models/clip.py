"""CLIP and SigLIP: a new one with its tokenizer, and how any of them reads captions and pixels."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from limner.config import TrainClipConfig
from limner.errors import ConfigError
from limner.models import pooling

log = logging.getLogger(__name__)

LENGTH = 77  # tokens that CLIP's text tower reads, as everything that uses one expects
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
PREPROCESSOR = "preprocessor_config.json"
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
"""How OpenAI's CLIP wants its pixels; what a CLIP that doesn't say means."""
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""How a new CLIP wants its pixels; what a SigLIP that doesn't say means."""


@dataclass(frozen=True)
class Clip:
    """A CLIPModel or SiglipModel with all that it needs to read captions and pixels."""

    network: Any
    tokenizer: Any
    normalisation: dict[str, list[float]]

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it, so that padding behind the end changes nothing; not in SigLIP."""
        return bool(self.network.config.model_type == "clip")

    @property
    def pools(self) -> bool:
        """Whether features are read at one token, by an attention that `pooling` does as the network would."""
        return self.causal and self.network.config._attn_implementation == "sdpa"

    @property
    def size(self) -> int:
        """Side of the pictures that the image tower reads, in pixels."""
        return int(self.network.config.vision_config.image_size)

    @property
    def length(self) -> int:
        """Tokens that the text tower reads, with start and end."""
        return min(self.tokenizer.model_max_length, int(self.network.config.text_config.max_position_embeddings))

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids of captions, cut and padded to what the text tower reads -> (N, L)."""
        ids: Tensor = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )["input_ids"]
        return ids

    def reads_whole(self, caption: str) -> bool:
        """Whether `tokenize` cuts nothing off."""
        return not longer(self.tokenizer, [caption], self.length)

    def trimmed(self, ids: Tensor) -> Tensor:
        """Ids (N, L) without the padding that all share, where it changes no feature -> (N, the longest text's)."""
        return ids[:, : int(self.mask(ids).sum(dim=1).max())]

    def text_features(self, ids: Tensor) -> Tensor:
        """Features of unit length of token ids (N, L) -> (N, E)."""
        ids, network = self.trimmed(ids), self.network
        if self.pools:
            ends = self.mask(ids).sum(dim=1) - 1  # (N,)
            features = network.text_projection(pooling.pooled_text(network.text_model, ids, ends))
        else:
            features = network.get_text_features(ids).pooler_output
        return normalize(features.float(), dim=1)

    def image_features(self, pixels: Tensor, dropped: float = 0.0) -> Tensor:
        """Features of unit length of pixels (N, 3, size, size) in [-1, 1] -> (N, E).

        Where features are read at one token, `dropped` is the share of patches that are left out at random.
        """
        values, network = normalised(pixels, self.normalisation), self.network
        if self.pools:
            features = network.visual_projection(pooling.pooled_image(network.vision_model, values, dropped))
        else:
            features = network.get_image_features(values).pooler_output
        return normalize(features.float(), dim=1)

    def patch_features(self, pixels: Tensor) -> Tensor:
        """The image tower's last layer by patch, final norm included, of pixels as above -> (N, W, s, s)."""
        vision = self.network.vision_model
        states = vision(normalised(pixels, self.normalisation)).last_hidden_state  # (N, P, W), CLIP's class token first
        if self.causal:
            states = vision.post_layernorm(states[:, 1:])
        side = math.isqrt(states.shape[1])
        return states.transpose(1, 2).unflatten(2, (side, side)).float()

    def token_states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What a U-Net may read of token ids; see the function of this name."""
        return token_states(self.network.text_model, ids)

    def mask(self, ids: Tensor) -> Tensor:
        """Which of the token ids (N, L) are the text, with its begin and end -> (N, L) bool; all of them in SigLIP."""
        if not self.causal:
            return torch.ones_like(ids, dtype=torch.bool)
        ends = (ids == self.tokenizer.eos_token_id).int().argmax(dim=1)  # (N,)
        return torch.arange(ids.shape[1], device=ids.device) <= ends[:, None]

    def save(self, folder: Path) -> None:
        """Write what Transformers reads: both towers, the tokenizer and the preprocessor."""
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        kind = "CLIPImageProcessor" if self.causal else "SiglipImageProcessor"
        crop = {"do_center_crop": True, "crop_size": {"height": self.size, "width": self.size}} if self.causal else {}
        preprocessor = {
            "image_processor_type": kind,
            "do_resize": True,
            "size": {"shortest_edge": self.size} if self.causal else {"height": self.size, "width": self.size},
            **crop,
            "resample": 3,  # PIL's bicubic
            "do_normalize": True,
            **self.normalisation,
        }
        (folder / PREPROCESSOR).write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")


def longer(tokenizer: Any, captions: Sequence[str], length: int) -> int:
    """How many captions have more tokens than `length`, with begin and end."""
    return sum(len(ids) > length for ids in tokenizer(list(captions), verbose=False)["input_ids"])


def warn_of_cut(tokenizer: Any, captions: Sequence[str], length: int) -> None:
    """Say so where captions are longer than the `length` tokens that are read of each."""
    if count := longer(tokenizer, captions, length):
        log.warning(
            "%d of %d captions are longer than the %d tokens that are read of each; their ends are left out.",
            *(count, len(captions), length),
        )


def token_states(text_model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a U-Net may read of token ids (N, L): the last layer, final norm included, and the layer before it.

    -> two of (N, L, D). SD 1.x reads the first, SDXL the second.
    """
    out = text_model(input_ids=ids, output_hidden_states=True)
    return out.last_hidden_state, out.hidden_states[-2]


def new_tokenizer(captions: Iterable[str], size: int) -> Any:
    """A CLIPTokenizer of `size` entries at most: all bytes, so that any text has tokens, and the commonest merges.

    Raises ConfigError where `size` has no room for the bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*letters, *(f"{letter}</w>" for letter in letters)]
    room = size - len(entries) - 2
    if room < 0:
        raise ConfigError(f"vocabulary {size} is too small; the bytes alone take {len(entries) + 2} entries.")
    pattern = CLIPTokenizer().backend_tokenizer  # for how it cuts text into words
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    # The trainer numbers ends of words as it meets them, in an order of chance, and breaks ties between merges by
    # number; told beforehand, the numbers are always the same, and so is the tokenizer.
    trainer = trainers.BpeTrainer(
        vocab_size=size, end_of_word_suffix="</w>", show_progress=False, special_tokens=entries
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"][:room]]
    entries += ["".join(pair) for pair in merges] + [BEGIN, END]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def new(config: TrainClipConfig, captions: Iterable[str]) -> Clip:
    """An untrained CLIP of the sizes that `config` sets, with a tokenizer for these captions. Raises ConfigError."""
    from transformers.models.clip.configuration_clip import CLIPConfig
    from transformers.models.clip.modeling_clip import CLIPModel

    tokenizer = new_tokenizer(captions, config.vocabulary)
    tower = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "projection_dim": config.features,
    }
    vision = {**tower, "image_size": config.size, "patch_size": config.patch}
    settings = CLIPConfig(
        text_config=tower | text_settings(tokenizer), vision_config=vision, projection_dim=config.features
    )
    return Clip(CLIPModel(settings), tokenizer, HALF)


def settings_of(clip: Clip) -> dict[str, Any]:
    """What of the settings `new` would be given for towers of these sizes; one that they don't share is None.

    Without `vocabulary`, as a tokenizer has fewer entries where there are few captions.
    """
    settings = clip.network.config
    text, vision = settings.text_config, settings.vision_config
    shared = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    both = {name: (getattr(text, key), getattr(vision, key)) for name, key in shared.items()}
    return {
        "size": clip.size,
        "patch": vision.patch_size,
        **{name: one if one == other else None for name, (one, other) in both.items()},
        "features": getattr(settings, "projection_dim", None),
    }


def text_settings(tokenizer: Any) -> dict[str, int]:
    """What the configuration of a text tower must take from its tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def normalised(pixels: Tensor, normalisation: dict[str, list[float]]) -> Tensor:
    """Pixels in [-1, 1] as a CLIP wants them. (N, 3, H, W) -> (N, 3, H, W)."""
    mean, std = (torch.tensor(normalisation[name], device=pixels.device)[:, None, None] for name in OPENAI)
    return (pixels * 0.5 + 0.5 - mean) / std
