"""What a CLIP's towers answer at one token, without what the last layer would answer at all others.

Features are read at the end token of a text and at the class token of a picture. For those, the last layer needs keys
and values of every token, but one query, and its MLP once: a sixth of its work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def pooled_text(text_model: Any, ids: Tensor, at: Tensor) -> Tensor:
    """The text tower's answer, final norm included, to ids (N, L) at the tokens `at` (N,) -> (N, D)."""
    states = text_model.embeddings(input_ids=ids)  # (N, L, D)
    return text_model.final_layer_norm(_at(text_model.encoder, states, at, causal=True))


def pooled_image(vision_model: Any, values: Tensor, dropped: float = 0.0) -> Tensor:
    """The image tower's answer, final norm included, to normalised pixels (N, 3, S, S) at its class token -> (N, W).

    `dropped` is the share of each picture's patches, drawn at random, that it answers without (Li et al. 2212.00794).
    """
    states = vision_model.embeddings(values)  # (N, 1 + P, W)
    if dropped:
        states = torch.cat([states[:, :1], _some(states[:, 1:], 1 - dropped)], dim=1)
    states = vision_model.pre_layrnorm(states)
    first = torch.zeros(len(states), dtype=torch.long, device=states.device)
    return vision_model.post_layernorm(_at(vision_model.encoder, states, first, causal=False))


def _some(states: Tensor, share: float) -> Tensor:
    """A random share of each row's states (N, P, W), one at least -> (N, P', W)."""
    count, patches, width = states.shape
    order = torch.rand(count, patches, device=states.device).argsort(dim=1)
    chosen = order[:, : max(1, round(share * patches)), None]  # (N, P', 1)
    return states.gather(1, chosen.expand(-1, -1, width))


def _at(encoder: Any, states: Tensor, at: Tensor, *, causal: bool) -> Tensor:
    """All layers of an encoder, on states (N, L, W), of which the last answers at `at` (N,) alone -> (N, W)."""
    *layers, last = encoder.layers
    for layer in layers:
        states = layer(states, attention_mask=None, is_causal=causal)
    attention = last.self_attn
    rows = torch.arange(len(states), device=states.device)
    normed = last.layer_norm1(states)  # (N, L, W)
    query, keys, values = (
        projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (N, H, 1 or L, W / H)
        for projected in (
            attention.q_proj(normed[rows, at, None]),
            attention.k_proj(normed),
            attention.v_proj(normed),
        )
    )
    seen = torch.arange(states.shape[1], device=at.device) <= at[:, None, None, None] if causal else None
    dropout = attention.dropout if attention.training else 0.0
    read = scaled_dot_product_attention(query, keys, values, attn_mask=seen, dropout_p=dropout, scale=attention.scale)
    answer = states[rows, at] + attention.out_proj(read.flatten(1))  # (N, W)
    return answer + last.mlp(last.layer_norm2(answer))
