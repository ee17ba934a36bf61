"""CLIP: a new one with its tokenizer, how it wants its pixels, and its features."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.config import TrainClipConfig
from limner.errors import ConfigError
from limner.models import loading

LENGTH = 77  # tokens that CLIP's text tower reads, as everything that uses one expects
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
PREPROCESSOR = "preprocessor_config.json"
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
"""How OpenAI's CLIP wants its pixels; what a folder without `preprocessor_config.json` means."""


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


def new(config: TrainClipConfig, tokenizer: Any) -> Any:
    """An untrained CLIPModel for a tokenizer, of the sizes that `config` sets."""
    from transformers.models.clip.configuration_clip import CLIPConfig
    from transformers.models.clip.modeling_clip import CLIPModel

    tower = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "projection_dim": config.features,
    }
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "image_size": config.size, "patch_size": config.patch}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.features))


def save(clip: Any, tokenizer: Any, normalisation: dict[str, list[float]], folder: Path) -> None:
    """Write a CLIP as Transformers reads it: both towers, the tokenizer and the preprocessor."""
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = clip.config.vision_config.image_size
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "resample": 3,  # PIL's bicubic
        "do_normalize": True,
        **normalisation,
    }
    (folder / PREPROCESSOR).write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")


def read_normalisation(folder: Path) -> dict[str, list[float]]:
    """`image_mean` and `image_std` of the CLIP in `folder`, for pixels in [0, 1]. Raises ModelError."""
    file = folder / PREPROCESSOR
    known = loading.read_config(file) if file.is_file() else {}
    return {name: known.get(name, default) for name, default in OPENAI.items()}


def normalise(pixels: Tensor, normalisation: dict[str, list[float]]) -> Tensor:
    """Pixels in [-1, 1] as a CLIP wants them. (N, 3, H, W) -> (N, 3, H, W)."""
    mean, std = (torch.tensor(normalisation[name], device=pixels.device)[:, None, None] for name in OPENAI)
    return (pixels * 0.5 + 0.5 - mean) / std


def tokenize(tokenizer: Any, caption: str) -> Tensor:
    """Token ids of a caption, cut and padded to what the tokenizer's text tower reads -> (L,)."""
    ids: Tensor = tokenizer(
        caption,
        padding="max_length",
        truncation=True,
        max_length=min(tokenizer.model_max_length, LENGTH),
        return_tensors="pt",
    )["input_ids"][0]
    return ids


def trimmed(ids: Tensor, end: int) -> Tensor:
    """Ids without the padding that all share: attention is causal, so what follows the end token changes no feature.

    ids (N, L) -> (N, the longest text's length).
    """
    length = (ids == end).int().argmax(dim=1).max() + 1
    return ids[:, :length]
