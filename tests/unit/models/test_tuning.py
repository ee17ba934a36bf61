"""What of a CLIP is trained, and that its result is read by plain Transformers and by PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close
from transformers import CLIPModel

from limner.config import TrainClipConfig
from limner.errors import ConfigError
from limner.models import adapter as adapters
from limner.models import loading
from limner.models.clip import HALF, Clip, new_tokenizer
from limner.models.tuning import TOWERS, Adapted, Tuning, layer_rates
from limner.training.contrast import Towers
from limner.training.losses import contrastive
from tiny import CAPTIONS, VOCABULARY, WIDTH, tiny_clip, tiny_siglip, tiny_siglip_tokenizer
from trainings import config

KINDS = pytest.mark.parametrize("kind", ["clip", "siglip"])


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Clip]:
    """What a tuning begins with, by kind."""
    tokenizer = tiny_siglip_tokenizer(tmp_path_factory.mktemp("siglip"))
    return {
        "clip": Clip(tiny_clip(), new_tokenizer(CAPTIONS, VOCABULARY), HALF),
        "siglip": Clip(tiny_siglip(), tokenizer, HALF),
    }


def tuning(clip: Clip, **settings: Any) -> Tuning:
    """The tuning of a copy of a CLIP."""
    torch.manual_seed(0)
    fresh = Clip(copy.deepcopy(clip.network), clip.tokenizer, clip.normalisation)
    return Tuning(fresh, config(TrainClipConfig, Path("d"), Path("o"), model="owner/base", **settings))


def trained(made: Tuning) -> set[str]:
    """The names of what is trained."""
    return {name for name, p in made.clip.network.named_parameters() if p.requires_grad}


def examples(clip: Clip) -> tuple[Tensor, Tensor]:
    """Token ids and pixels."""
    pixels = torch.rand(len(CAPTIONS), 3, clip.size, clip.size, generator=torch.Generator().manual_seed(0))
    return clip.tokenize(CAPTIONS), pixels * 2 - 1


def train(made: Tuning) -> None:
    """A few steps, far enough to show."""
    towers = Towers(made.clip, chunk_size=None, biased=False, guarded=False)
    optimizer = torch.optim.AdamW([p for p in towers.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        text, images, _, scale, _ = towers(*examples(made.clip))
        contrastive(text, images, scale, torch.arange(len(CAPTIONS))).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def features(clip: Clip) -> tuple[Tensor, Tensor]:
    """Of the examples, as they are during training: (N, E) of captions, (N, E) of pictures."""
    ids, pixels = examples(clip)
    return clip.text_features(ids), clip.image_features(pixels)


@torch.no_grad()
def plain_features(network: Any, clip: Clip) -> tuple[Tensor, Tensor]:
    """The same, with Transformers' own forward pass over whole texts."""
    ids, pixels = examples(clip)
    mean, std = (torch.tensor(clip.normalisation[name])[:, None, None] for name in ("image_mean", "image_std"))
    out = network(input_ids=ids, pixel_values=((pixels + 1) / 2 - mean) / std)
    return normalize(out.text_embeds, dim=1), normalize(out.image_embeds, dim=1)


def differ(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[bool, bool]:
    """Whether features of captions and of pictures differ by more than rounding."""
    text, images = (not torch.allclose(a, b, atol=1e-3) for a, b in zip(one, other))
    return text, images


def bits(network: Any, prefixes: tuple[str, ...]) -> dict[str, bytes]:
    """The weights of some parts, to the bit, under the names that they have without PEFT."""
    named = ((name.replace(".base_layer", ""), value) for name, value in network.state_dict().items())
    found = {name: value.numpy().tobytes() for name, value in named if name.startswith(prefixes) and "lora" not in name}
    assert found
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Tuning], Path]:
    """Writes what came of a tuning. -> the folder."""

    def save(made: Tuning) -> Path:
        with loading.quiet():
            made.save(tmp_path)
        assert not [p for p in tmp_path.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
        return tmp_path

    return save


# ---- all, and towers that stay


@KINDS
def test_full_trains_every_weight(given: dict[str, Clip], kind: str) -> None:
    names = {name for name, _ in given[kind].network.named_parameters()}
    assert trained(tuning(given[kind], loss="sigmoid")) == names
    assert trained(tuning(given[kind])) == names - {"logit_bias"}, "InfoNCE knows no bias"


@KINDS
@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("lock", ["text", "image"])
def test_a_locked_tower_keeps_every_bit(given: dict[str, Clip], kind: str, tune: str, lock: str) -> None:
    made = tuning(given[kind], tune=tune, lock=lock)
    train(made)
    base, network = given[kind].network, made.clip.network
    other = {"text": "image", "image": "text"}[lock]
    assert bits(network, TOWERS[lock]) == bits(base, TOWERS[lock])
    moves_text, moves_images = differ(features(made.clip), features(given[kind]))
    assert (moves_text, moves_images) == (other == "text", other == "image")
    assert network.logit_scale != base.logit_scale
    locked = {name for name, _ in network.named_parameters() if name.startswith(TOWERS[lock])}
    assert not locked & trained(made)
    assert not [name for name in locked if "lora" in name], "nothing that costs time and is of no use"


# ---- low-rank additions


@KINDS
def test_lora_trains_low_rank_matrices_of_the_layers_and_the_temperature(given: dict[str, Clip], kind: str) -> None:
    made = tuning(given[kind], tune="lora", lora_rank=3)
    names = trained(made)
    assert {name for name in names if "lora_" not in name} == {"logit_scale"}
    matrices = {name.split(".lora_")[0] for name in names if "lora_" in name}
    wanted = {
        f"{tower}.encoder.layers.{layer}.{part}"
        for tower in ("text_model", "vision_model")
        for layer in (0, 1)
        for part in (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
    }
    assert matrices == wanted
    parameters = dict(made.clip.network.named_parameters())
    assert {min(parameters[name].shape) for name in names if "lora_" in name} == {3}
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    before = tuning(given[kind]).clip
    for one, other in zip(features(made.clip), features(before)):
        assert torch.equal(one, other), "nothing has changed yet"
    train(made)
    assert bits(made.clip.network, ("text_model", "vision_model")) == bits(
        given[kind].network, ("text_model", "vision_model")
    )
    assert differ(features(made.clip), features(before)) == (True, True)
    assert trained(tuning(given[kind], tune="lora", loss="sigmoid")) - names == (
        {"logit_bias"} if kind == "siglip" else set()
    )


@KINDS
def test_what_lora_learned_is_in_the_weights_and_beside_them(
    given: dict[str, Clip], kind: str, saved: Callable[[Tuning], Path]
) -> None:
    made = tuning(given[kind], tune="lora")
    train(made)
    kept = copy.deepcopy(made.clip.network.state_dict())
    folder = saved(made)
    assert {p.name for p in folder.iterdir()} == {"clip", "lora"}
    assert {p.name for p in (folder / "lora").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(torch.equal(value, kept[name]) for name, value in made.clip.network.state_dict().items())
    during = features(made.clip)
    read = loading.load_clip(str(folder / "clip"))
    assert type(read.network) is type(given[kind].network)
    assert read.network.state_dict().keys() == given[kind].network.state_dict().keys()
    assert_close(plain_features(read.network, read), during, atol=1e-5, rtol=0)
    assert torch.equal(read.network.logit_scale, made.clip.network.logit_scale)
    beside = PeftModel.from_pretrained(copy.deepcopy(given[kind].network), folder / "lora")
    assert_close(plain_features(beside, read), during, atol=1e-5, rtol=0)
    assert beside.peft_config["default"].base_model_name_or_path == "owner/base"


# ---- a linear map


def test_the_map_is_folded_into_the_projection_and_told_beside_it(
    given: dict[str, Clip], saved: Callable[[Tuning], Path]
) -> None:
    clip = given["clip"]
    made = tuning(clip, tune="adapter")
    assert trained(made) == {"logit_scale", "text_projection.0.change"}
    for one, other in zip(features(made.clip), features(clip)):
        assert torch.equal(one, other), "nothing has changed yet"
    train(made)
    kept = copy.deepcopy(made.clip.network.state_dict())
    folder = saved(made)
    assert {p.name for p in folder.iterdir()} == {"clip", "adapter"}
    after = made.clip.network.state_dict()
    assert kept.keys() == after.keys(), "it can be trained on"
    assert all(torch.equal(value, kept[name]) for name, value in after.items())
    assert load_file(folder / "adapter" / "adapter.safetensors").keys() == {"weight"}
    weight = adapters.load(folder / "adapter", WIDTH)
    assert not torch.allclose(weight, torch.eye(WIDTH), atol=1e-3)
    read = CLIPModel.from_pretrained(folder / "clip").eval()
    towers = ("text_model", "vision_model", "visual_projection")
    assert bits(read, towers) == bits(clip.network, towers)
    assert_close(read.text_projection.weight, clip.network.text_projection.weight @ weight)
    assert_close(plain_features(read, clip), features(made.clip), atol=1e-5, rtol=0)
    ids, _ = examples(clip)
    with torch.no_grad():
        ends = clip.mask(ids).sum(dim=1) - 1
        states = clip.token_states(ids)[0][torch.arange(len(ids)), ends] @ weight.T  # (N, D), as a U-Net reads them
        assert_close(normalize(clip.network.text_projection(states), dim=1), features(made.clip)[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_adapted_token_states_are_mapped(given: dict[str, Clip]) -> None:
    clip = given["clip"]
    ids, _ = examples(clip)
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    mapped = Adapted(**vars(clip), weight=weight)
    for one, other in zip(mapped.token_states(ids), clip.token_states(ids), strict=True):
        assert_close(one, torch.einsum("ij,nlj->nli", weight, other))
    assert torch.equal(mapped.text_features(ids), clip.text_features(ids))


def test_no_unet_reads_a_siglip_through_a_map(given: dict[str, Clip]) -> None:
    with pytest.raises(ConfigError, match="tune=adapter is for a CLIP") as caught:
        tuning(given["siglip"], tune="adapter")
    assert str(caught.value).endswith(".")


# ---- rates


@KINDS
def test_each_layer_learns_at_its_share_of_the_one_above(given: dict[str, Clip], kind: str) -> None:
    rates = layer_rates(given[kind].network, 0.5)
    levels = {"encoder.layers.1.": 0.5, "encoder.layers.0.": 0.25, "embeddings.": 0.125, "pre_layrnorm.": 0.125}
    for name, _ in given[kind].network.named_parameters():
        wanted = [rate for part, rate in levels.items() if name.split("_model.")[-1].startswith(part)]
        assert ([rates[name]] if name in rates else []) == wanted, name
    behind = {"clip": ("text_model.final_layer_norm.weight", "visual_projection.weight", "logit_scale")}
    behind["siglip"] = ("text_model.head.weight", "vision_model.head.mlp.fc1.weight", "vision_model.head.probe")
    names = {name for name, _ in given[kind].network.named_parameters()}
    assert set(behind[kind]) <= names - rates.keys()


def test_low_rank_matrices_learn_at_their_layers_share(given: dict[str, Clip]) -> None:
    made = tuning(given["clip"], tune="lora", layer_decay=0.5)
    found = {name: rate for name, rate in made.rates.items() if name in trained(made)}
    assert found.keys() == trained(made) - {"logit_scale"}
    assert all(rate == (0.5 if "layers.1." in name else 0.25) for name, rate in found.items())


def test_without_decay_there_are_no_rates(given: dict[str, Clip]) -> None:
    assert layer_rates(given["clip"].network, 1.0) == {}
    assert tuning(given["clip"]).rates == {}
