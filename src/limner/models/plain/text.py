"""The text encoder and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from limner.models import staged
from limner.models.bare import LayerNorm, Linear
from limner.models.plain.layers import Layers, Network

DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "use_attention_mask": False,
}
"""Settings of a CLIPTextModel that its layers depend on, as they are where a file leaves them out."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": "<|endoftext|>"}
ALIKE = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
"""What all special tokens are here."""
FURTHER = ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "split_special_tokens")
"""Settings that would change the tokens of a text."""
FURTHER_FILES = ("special_tokens_map.json", "added_tokens.json")


class Tokenizer:
    """CLIPTokenizer, for one text at a time."""

    def __init__(self, folder: Path) -> None:
        """Of the tokenizer.json in a folder. Raises ValueError for settings that are not known here."""
        config, written = (
            json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("tokenizer_config", "tokenizer")
        )
        special = {kind: config.get(f"{kind}_token", usual) for kind, usual in SPECIAL.items()}
        alike = [{"id": written["model"]["vocab"][name], "content": name} | ALIKE for name in {*special.values()}]
        if (
            config["tokenizer_class"] != "CLIPTokenizer"
            or any(config.get(name) for name in FURTHER)
            or any((folder / name).exists() for name in FURTHER_FILES)
            or sorted(written["added_tokens"], key=itemgetter("id")) != sorted(alike, key=itemgetter("id"))
        ):
            raise ValueError("another kind of tokenizer")
        vocabulary, merges = written["model"]["vocab"], [tuple(merge) for merge in written["model"]["merges"]]
        unknown = special["unk"]
        self.backend = Backend(BPE(vocabulary, merges, unk_token=unknown, end_of_word_suffix="</w>"))
        self.backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self.backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self.backend.add_special_tokens([AddedToken(token["content"], normalized=False) for token in alike])
        self.model_max_length: int = config["model_max_length"]
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            vocabulary[special[kind]] for kind in ("bos", "eos", "pad")
        )

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        """`input_ids`, as CLIPTokenizer has them without special tokens."""
        assert not add_special_tokens
        assert not verbose
        return {"input_ids": self.backend.encode(text, add_special_tokens=False).ids}

    def get_added_vocab(self) -> dict[str, int]:
        """None that matter here: those that textual inversion adds are left to Transformers' class."""
        return {}


class TextEncoder(Network):
    """CLIPTextModel."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError for settings that are not known here."""
        known = {**DEFAULTS, **config}
        if known["use_attention_mask"] or "quantization_config" in known:
            raise ValueError("another kind of text encoder")
        width, inner, eps = known["hidden_size"], known["intermediate_size"], known["layer_norm_eps"]
        layers = [
            Layers(
                layer_norm1=LayerNorm(width, eps),
                self_attn=Layers(**{name: Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}),
                layer_norm2=LayerNorm(width, eps),
                mlp=Layers(fc1=Linear(width, inner), fc2=Linear(inner, width)),
            )
            for _ in range(known["num_hidden_layers"])
        ]
        super().__init__(
            embeddings=Layers(
                # The other way of making them begins with random numbers, which takes PyTorch's compiler
                token_embedding=nn.Embedding.from_pretrained(torch.empty(known["vocab_size"], width)),
                position_embedding=nn.Embedding.from_pretrained(torch.empty(known["max_position_embeddings"], width)),
            ),
            encoder=Layers(layers=layers),
            final_layer_norm=LayerNorm(width, eps),
            config=SimpleNamespace(**known),
            act=ACTIVATIONS[known["hidden_act"]],
        )

    def named(self, name: str) -> str | None:
        """Older versions of Transformers wrote a prefix, and the numbers of the positions."""
        name = name.removeprefix("text_model.")
        return None if name == "embeddings.position_ids" else name

    def forward(self, ids: Tensor, attention_mask: None = None) -> tuple[Tensor]:
        """Token ids (N, L) -> token states (N, L, D), in a tuple as from Transformers."""
        assert attention_mask is None
        heads = self.config.num_attention_heads
        positions = self.embeddings.position_embedding.weight[: ids.shape[1]]
        hidden = self.embeddings.token_embedding(ids) + positions
        for layer in self.encoder.layers:
            own, normed = layer.self_attn, layer.layer_norm1(hidden)
            queries, keys, values = (
                staged.heads(project(normed), heads) for project in (own.q_proj, own.k_proj, own.v_proj)
            )
            seen = scaled_dot_product_attention(queries, keys, values, is_causal=True)
            hidden = hidden + own.out_proj(seen.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp.fc2(self.act(layer.mlp.fc1(layer.layer_norm2(hidden))))
        return (self.final_layer_norm(hidden),)
