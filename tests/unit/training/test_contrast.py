"""Both towers at once: chunks change nothing but the memory, and the temperature stays where it can be learned."""

from __future__ import annotations

import copy
import multiprocessing
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPModel

from limner.models.clip import HALF, Clip, new_tokenizer, text_settings
from limner.training.contrast import Towers, gathered
from limner.training.losses import contrastive, drift, sigmoid
from tiny import CAPTIONS, VOCABULARY, tiny_clip, tiny_siglip, tiny_siglip_tokenizer

BATCH, CHUNK = 256, 16


@pytest.fixture(scope="module")
def clip() -> Clip:
    """A tiny CLIP whose features differ clearly."""
    network = tiny_clip()
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(5 if weight.ndim == 2 else 1)
    return Clip(network, new_tokenizer(CAPTIONS, VOCABULARY), HALF)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A tiny SigLIP."""
    return Clip(tiny_siglip(), tiny_siglip_tokenizer(tmp_path_factory.mktemp("siglip")), HALF)


def examples(clip: Clip, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (N, L) of texts of very different length, pixels (N, 3, S, S), and owners (N,)."""
    texts = [" ".join(CAPTIONS[i % len(CAPTIONS)] for i in range(n, n + 1 + n % 4)) for n in range(count)]
    pixels = torch.rand(count, 3, clip.size, clip.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return clip.tokenize(texts), pixels, torch.arange(count) // 2


def towers(clip: Clip, *, chunk_size: int | None = None, biased: bool = False, guarded: bool = False) -> Towers:
    """Towers of a copy of a CLIP, whose text tower has moved on since where it is guarded."""
    made = Towers(
        Clip(copy.deepcopy(clip.network), clip.tokenizer, clip.normalisation),
        chunk_size=chunk_size,
        biased=biased,
        guarded=guarded,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in made.network.text_model.parameters() if guarded else ():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return made


def gradients(made: Towers, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Of the loss and the penalty for drift, by name; "loss" is their sum."""
    ids, pixels, owners = batch
    text, images, moved, scale, bias = made(ids, pixels)
    aligned = (
        sigmoid(text, images, scale, bias, owners)
        if made.bias.requires_grad
        else contrastive(text, images, scale, owners)
    )
    loss = aligned + 0.5 * moved.mean()
    loss.backward()
    found = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


# ---- chunks


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("biased", [False, True], ids=["infonce", "sigmoid"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_gradients_in_chunks_are_the_plain_ones(
    request: pytest.FixtureRequest, kind: str, biased: bool, guarded: bool
) -> None:
    clip = request.getfixturevalue(kind)
    batch = examples(clip, BATCH)
    plain = gradients(towers(clip, biased=biased, guarded=guarded), batch)
    chunked = gradients(towers(clip, biased=biased, guarded=guarded, chunk_size=CHUNK), batch)
    assert plain.keys() == chunked.keys()
    trained = {name for name, p in towers(clip, biased=biased).named_parameters() if p.requires_grad}
    assert plain.keys() - {"loss"} == trained
    assert_close(chunked["loss"], plain["loss"], rtol=1e-5, atol=0)
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        assert (chunked[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1.0), name


@given(st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=15)
def test_no_chunk_size_changes_what_comes_out(clip: Clip, count: int, chunk: int) -> None:
    batch = examples(clip, count)
    whole, parts = (towers(clip, chunk_size=size, guarded=True)(*batch[:2]) for size in (None, chunk))
    for one, other in zip(whole, parts, strict=True):
        assert_close(one, other)


def deep_clip() -> Clip:
    """Narrow and many layers deep, so that activations are nearly all that it takes."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2}
    tokenizer = new_tokenizer(CAPTIONS, VOCABULARY)
    text = tower | text_settings(tokenizer)
    vision = tower | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    return Clip(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), tokenizer, HALF)


def memory(name: str) -> int:
    """A figure of this process in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == f"{name}:")


def report_peak(chunk_size: int | None, answer: Any) -> None:
    """Send how many bytes a step of a deep CLIP takes at most, on top of what there was before."""
    torch.set_num_threads(1)
    made = towers(deep_clip(), chunk_size=chunk_size)
    batch = examples(made.clip, BATCH)
    ids, pixels, owners = (part[:CHUNK] for part in batch)
    gradients(made, (ids, pixels, owners))  # after which gradients, and what torch makes once, are there
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    gradients(made, batch)
    answer.send(memory("VmHWM") - before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_chunks_take_a_fifth_of_the_memory_at_most() -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["limner.training.contrast", "transformers.models.clip.modeling_clip"])
    peaks = []
    for chunk_size in (None, CHUNK):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=report_peak, args=(chunk_size, send))
        process.start()
        peaks.append(receive.recv())
        process.join()
        assert process.exitcode == 0
    assert peaks[0] > 100e6, "or else little was measured"
    assert peaks[0] >= 5 * peaks[1], peaks


# ---- drift


@torch.no_grad()
def test_nothing_has_moved_at_first_and_then_both_layers_count(clip: Clip) -> None:
    ids, pixels, _ = examples(clip, 6)
    made = Towers(clip, chunk_size=None, biased=False, guarded=True)
    assert not made(ids, pixels)[2].any()
    moved = towers(clip, guarded=True)
    found = moved(ids, pixels)[2]
    before, now = clip.token_states(ids), moved.clip.token_states(ids)
    layers = [drift(new, old, clip.mask(ids)) for new, old in zip(now, before)]
    assert_close(found, (layers[0] + layers[1]) / 2)
    assert found.min() > 0
    assert layers[0].mean() != pytest.approx(layers[1].mean().item(), rel=0.01)


def test_what_is_guarded_against_is_neither_trained_nor_stored(clip: Clip) -> None:
    one, other = (towers(clip, guarded=guarded) for guarded in (False, True))
    assert one.state_dict().keys() == other.state_dict().keys()
    before = copy.deepcopy(other.frozen[0].state_dict())
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    gradients(other, examples(clip, 8))
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in other.frozen[0].state_dict().items())


# ---- temperature and bias


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
@settings(max_examples=20)
def test_the_temperature_stays_within_1_and_100_whatever_the_step(clip: Clip, steps: list[float]) -> None:
    made = towers(clip)
    for step in steps:
        with torch.no_grad():
            made.network.logit_scale.add_(step)
        made.clamp()
        assert 1 <= made.network.logit_scale.exp() <= 100.001


def test_a_siglip_that_comes_with_more_keeps_it(siglip: Clip) -> None:
    """Google's has 117."""
    hot = Clip(copy.deepcopy(siglip.network), siglip.tokenizer, siglip.normalisation)
    with torch.no_grad():
        hot.network.logit_scale.fill_(4.77)
    made = towers(hot, biased=True)
    made.clamp()
    assert made.network.logit_scale.item() == pytest.approx(4.77)
    with torch.no_grad():
        made.network.logit_scale.fill_(9.0)
    made.clamp()
    assert made.network.logit_scale.item() == pytest.approx(4.77)


def test_the_bias_is_the_networks_own_where_it_has_one(clip: Clip, siglip: Clip) -> None:
    made = towers(siglip, biased=True)
    assert made.bias is made.network.logit_bias
    assert len(list(made.parameters())) == len(list(siglip.network.parameters()))
    assert towers(clip, biased=True).bias.item() == -10.0
    assert not towers(clip).bias.requires_grad


# ---- processes


def test_one_process_gathers_nothing() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert gathered(rows) is rows


def test_texts_of_all_lengths_are_among_the_examples(clip: Clip) -> None:
    lengths = clip.mask(examples(clip, CHUNK)[0]).sum(dim=1)
    assert max(abs(int(one) - int(other)) for one, other in pairwise(lengths)) > 20
