"""Features read at one token of the last layer are those of all of it, and so are their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from limner.models.clip import HALF, Clip, normalised
from tiny import CAPTIONS, tiny_clip, tiny_tokenizer


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(tiny_clip(), tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")), HALF)


def gradients(clip: Clip, *features: Tensor) -> dict[str, Tensor]:
    """Gradients of some loss of the features by parameter's name."""
    clip.network.zero_grad()
    weights = torch.linspace(-1, 1, features[0].numel()).reshape(features[0].shape)
    torch.stack([(part * weights).sum() for part in features]).sum().backward()
    return {name: p.grad.clone() for name, p in clip.network.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_the_whole_layer(clip: Clip) -> None:
    ids, pixels = clip.tokenize(CAPTIONS), torch.rand(len(CAPTIONS), 3, 16, 16) * 2 - 1
    network = clip.network
    whole = (
        network.get_text_features(ids).pooler_output,
        network.get_image_features(normalised(pixels, clip.normalisation)).pooler_output,
    )
    wanted = gradients(clip, *(normalize(part) for part in whole))
    found = gradients(clip, clip.text_features(ids), clip.image_features(pixels))
    assert set(wanted) == set(found) == {name for name, _ in network.named_parameters()} - {"logit_scale"}
    for name, gradient in found.items():
        assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_the_last_layer_works_at_one_token_alone(clip: Clip) -> None:
    seen: list[tuple[int, ...]] = []
    hooks = [
        tower.encoder.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
        for tower in (clip.network.text_model, clip.network.vision_model)
    ]
    clip.text_features(clip.tokenize(CAPTIONS))
    clip.image_features(torch.zeros(3, 3, 16, 16))
    for hook in hooks:
        hook.remove()
    assert seen == [(len(CAPTIONS), 32), (3, 32)]


@torch.no_grad()
def test_other_attentions_go_the_networks_own_way(clip: Clip) -> None:
    ids, pixels = clip.tokenize(CAPTIONS), torch.rand(2, 3, 16, 16) * 2 - 1
    eager = Clip(tiny_clip(), clip.tokenizer, HALF)
    eager.network.set_attn_implementation("eager")
    assert_close(eager.text_features(ids), clip.text_features(ids), rtol=0, atol=2e-6)
    assert_close(eager.image_features(pixels), clip.image_features(pixels), rtol=0, atol=1e-5)
