"""The verbs of drawing, one by one."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from libraries import load_with_libraries
from limner.diffusion import samplers
from limner.errors import ConfigError
from limner.generation.engine import (
    denoise,
    encode_prompts,
    encode_weighted,
    generators,
    initial_noise,
    paint,
    to_images,
)
from limner.generation.model import Model
from tiny import CAPTIONS, WIDTH, tiny_scheduler, tiny_text_encoder, tiny_unet


def states(count: int = 1) -> torch.Tensor:
    """Random token states (N, 77, D)."""
    return torch.randn(count, 77, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """A tiny model whose networks can be called as Diffusers' are."""
    return load_with_libraries(folder)


def test_noise_depends_on_its_own_seed_only() -> None:
    shape = (4, 8, 8)
    together = initial_noise([5, 6, 7], shape)  # (3, 4, 8, 8)
    assert torch.equal(together[1], initial_noise([6], shape)[0])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(together[2], torch.randn(shape, generator=torch.Generator().manual_seed(7)))


def test_a_generator_moves_on_and_a_seed_does_not() -> None:
    source = generators([5])[0]
    first, second = initial_noise([source], (4,)), initial_noise([source], (4,))
    assert torch.equal(first, initial_noise([5], (4,)))
    assert not torch.equal(first, second)


def test_the_states_of_a_long_prompt_are_those_of_its_pieces(model: Model) -> None:
    encoder, tokenizer = model.painter.text_encoder, model.painter.tokenizer
    long = encode_prompts(encoder, tokenizer, ["a " * 75 + "dog"])  # (1, 154, D)
    assert long.shape == (1, 154, WIDTH)
    assert torch.allclose(long[:, :77], encode_prompts(encoder, tokenizer, ["a " * 75]), atol=1e-5)
    assert torch.allclose(long[:, 77:], encode_prompts(encoder, tokenizer, ["dog"]), atol=1e-5)


def test_a_short_prompt_beside_a_long_one_is_filled_up_with_empty_pieces(model: Model) -> None:
    encoder, tokenizer = model.painter.text_encoder, model.painter.tokenizer
    both = encode_prompts(encoder, tokenizer, ["dog", "a " * 80])  # (2, 154, D)
    alone = torch.cat([encode_prompts(encoder, tokenizer, [text]) for text in ("dog", "")], dim=1)  # (1, 154, D)
    assert torch.allclose(both[:1], alone, atol=1e-5)


@pytest.fixture
def parts(model: Model) -> tuple[Any, Any]:
    """A text encoder and its tokenizer. Its states have a mean, as those of a trained one do."""
    encoder = tiny_text_encoder()
    torch.nn.init.uniform_(encoder.get_submodule("final_layer_norm").bias)
    return encoder, model.painter.tokenizer  # type: ignore[attr-defined]


def weighed(encoder: Any, tokenizer: Any, words: list[tuple[str, float]]) -> torch.Tensor:
    """Token states of one piece as A1111 describes its weights: multiply, then bring back the mean (1, 77, D)."""
    plain = encode_prompts(encoder, tokenizer, [" ".join(word for word, _ in words)])
    weights = [1.0]
    for word, weight in words:
        weights += [weight] * len(tokenizer(word, add_special_tokens=False)["input_ids"])
    scaled = plain.clone()
    for place, weight in enumerate(weights):
        scaled[0, place] *= weight
    return scaled * plain.mean() / scaled.mean()


def test_weights_scale_the_states_of_their_tokens_and_keep_the_mean(parts: tuple[Any, Any]) -> None:
    found = encode_weighted(*parts, ["a (brown:1.4) dog on ((the) [beach]) [now]"])
    words = [("a", 1), ("brown", 1.4), ("dog on", 1), ("the", 1.21), ("beach", 1), ("now", 1 / 1.1)]
    assert torch.allclose(found, weighed(*parts, words), atol=1e-5)


def test_a_prompt_without_weights_is_the_plain_one_bit_for_bit(parts: tuple[Any, Any]) -> None:
    for text in ("", "A dog: brown, {small} | C:\\dogs", "a " * 80 + "dog", "Ein Hünd 犬", *CAPTIONS):
        assert torch.equal(encode_weighted(*parts, [text]), encode_prompts(*parts, [text]))
    assert torch.equal(encode_weighted(*parts, ["a (dog:1) [(b)]"]), encode_prompts(*parts, ["a dog b"]))
    assert torch.equal(encode_weighted(*parts, [r"a \(brown\) dog"]), encode_prompts(*parts, ["a (brown) dog"]))


def test_captions_have_no_notation(parts: tuple[Any, Any]) -> None:
    assert not torch.equal(encode_prompts(*parts, ["a (dog:1.3)"]), encode_prompts(*parts, ["a dog"]))


def test_weights_reach_across_pieces_and_each_keeps_its_own_mean(parts: tuple[Any, Any]) -> None:
    found = encode_weighted(*parts, ["a " * 74 + "(dog dog:1.5)"])  # (1, 154, D)
    first = weighed(*parts, [("a " * 74, 1.0), ("dog", 1.5)])
    assert torch.allclose(found, torch.cat([first, weighed(*parts, [("dog", 1.5)])], dim=1), atol=1e-5)


def test_weights_leave_numbers_in_bounds_where_there_is_no_mean(model: Model) -> None:
    parts = model.painter.text_encoder, model.painter.tokenizer  # untrained: the mean is nothing but rounding
    for weight in (-100, -1, 0, 1.2, 100):
        states = encode_weighted(*parts, [f"a (brown:{weight}) dog"])
        assert states.abs().max() < 100 * 100 * 6


def test_break_begins_a_new_piece(parts: tuple[Any, Any]) -> None:
    both = [encode_prompts(*parts, [text]) for text in ("a field", "a dog")]
    assert torch.allclose(encode_weighted(*parts, ["a field BREAK a dog"]), torch.cat(both, dim=1), atol=1e-5)


@pytest.mark.parametrize("name", ["pndm", "ddim", "dpm-flow"])  # pndm takes a timestep more than steps
def test_the_steps_that_are_told_add_up(name: str) -> None:
    told: list[int] = []
    scheduler = tiny_scheduler(name)
    before = scheduler.to_json_string(), scheduler.num_inference_steps
    denoise(tiny_unet(), scheduler, torch.zeros(1, 4, 8, 8), states(), steps=7, guidance=1, on_step=told.append)
    assert sum(told) == 7
    assert before == (scheduler.to_json_string(), scheduler.num_inference_steps), "the scheduler was changed"


def test_an_exception_of_the_listener_ends_the_work() -> None:
    def stop(done: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        denoise(tiny_unet(), tiny_scheduler(), torch.zeros(1, 4, 8, 8), states(), steps=7, guidance=1, on_step=stop)


def test_at_guidance_one_the_prompt_alone_counts_and_the_networks_run_once() -> None:
    passes: list[int] = []
    unet = tiny_unet()
    unet.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    settings: dict[str, Any] = {"steps": 2, "negative_states": states()}
    denoise(unet, tiny_scheduler(), torch.zeros(1, 4, 8, 8), states(), guidance=1, **settings)
    denoise(unet, tiny_scheduler(), torch.zeros(1, 4, 8, 8), states(), guidance=2, **settings)
    assert passes == [1, 1, 2, 2]


def test_guidance_towards_where_the_negative_states_are_is_no_guidance() -> None:
    """Equation 6 with both conditions equal is the plain prediction, whatever the scale."""
    unet, noise = tiny_unet(), initial_noise([0], (4, 8, 8))
    plain = denoise(unet, tiny_scheduler(), noise, states(), steps=4, guidance=1)
    guided = denoise(unet, tiny_scheduler(), noise, states(), steps=4, guidance=9, negative_states=states())
    assert torch.allclose(plain, guided, atol=1e-3)


def test_more_steps_than_the_scheduler_has_are_refused() -> None:
    for steps in (999, 60):
        with pytest.raises(ConfigError, match=f"LCMScheduler can't take {steps} steps"):
            denoise(tiny_unet(), tiny_scheduler("lcm"), torch.zeros(1, 4, 8, 8), states(), steps=steps, guidance=1)


def test_pixels_become_bytes() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).expand(1, 3, 1, 5)
    image = to_images(pixels)[0]
    assert image.size == (5, 1)
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def painted(model: Model, prompts: list[str], seeds: list[int], **changed: Any) -> torch.Tensor:
    """What `paint` draws with a model's parts (N, 3, H, W), in three steps at guidance 4 unless told."""
    parts = {name: getattr(model.painter, name) for name in ("unet", "scheduler", "vae", "text_encoder", "tokenizer")}
    return paint(**{"prompts": prompts, "seeds": seeds, "steps": 3, "guidance": 4.0, **parts, **changed})


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_paint_draws_what_the_model_draws(model: Model, guidance: float) -> None:
    prompts = [*CAPTIONS[:2], "a " * 80 + "dog on a beach"]
    pixels = painted(model, prompts, [7, 7, 7], guidance=guidance)
    assert pixels.shape == (3, 3, 16, 16)
    for mine, theirs in zip(to_images(pixels), model(prompts, seed=7, steps=3, guidance=guidance).images):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))


def test_a_painting_depends_on_its_own_prompt_and_seed_only(model: Model) -> None:
    noisy = tiny_scheduler("euler-ancestral")  # draws noise of its own in each step
    together = painted(model, [*CAPTIONS[:3], "a " * 80], [5, 6, 7, 8], scheduler=noisy)
    assert torch.equal(together[1:2], painted(model, CAPTIONS[1:2], [6], scheduler=noisy))
    assert torch.equal(together, painted(model, [*CAPTIONS[:3], "a " * 80], [5, 6, 7, 8], scheduler=noisy))
    assert not torch.equal(together[1:2], painted(model, CAPTIONS[1:2], [5], scheduler=noisy))
    assert not torch.equal(together[1:2], painted(model, CAPTIONS[:1], [6], scheduler=noisy))
    other = painted(model, CAPTIONS[1:2], [6], scheduler=noisy, text_encoder=tiny_text_encoder(seed=1))
    assert not torch.equal(together[1:2], other)


def test_a_painting_has_the_size_that_its_unet_was_trained_for(model: Model) -> None:
    pixels = painted(model, ["A dog."], [0], unet=tiny_unet(sample_size=(8, 16)))
    assert pixels.shape == (1, 3, 16, 32)


def test_a_painting_keeps_to_the_range_of_pixels(model: Model) -> None:
    vae = copy.deepcopy(model.painter.vae)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(100)
    pixels = painted(model, ["A dog."], [0], vae=vae)
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert not pixels.requires_grad


def test_each_prompt_wants_a_seed(model: Model) -> None:
    with pytest.raises(ValueError):
        painted(model, ["A dog.", "A cat."], [0])


class Still:
    """A U-Net that sees no noise anywhere."""

    config: ClassVar[dict[str, Any]] = {}

    def __call__(self, latents: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (torch.zeros_like(latents),)


@pytest.mark.parametrize("name", samplers.fitting({}))
def test_as_many_steps_as_there_are_draw_or_are_refused(name: str) -> None:
    """Diffusers' "leading" timesteps, which are Stable Diffusion's, then lead beyond the end or stand still."""
    given = DDIMScheduler(num_train_timesteps=40, timestep_spacing="leading", clip_sample=False)
    noise, states = torch.randn(1, 4, 2, 2), torch.zeros(1, 77, 8)
    for steps in (39, 40, 41, 1000):
        with suppress(ConfigError):
            denoise(Still(), samplers.named(name, given), noise, states, steps=steps, guidance=1.0)
