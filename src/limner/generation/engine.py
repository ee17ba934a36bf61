"""From prompts and seeds to pictures: the algorithm, one verb a step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from limner.diffusion import schedulers
from limner.diffusion.guidance import embedding as guidance_embedding
from limner.diffusion.guidance import guided, is_folded
from limner.errors import ConfigError, ModelError
from limner.generation import prompts as texts
from limner.generation.canvas import Canvas, Sketch
from limner.generation.jobs import Variation, steps_taken
from limner.generation.language import MOST_WEIGHT
from limner.generation.prompts import Piece
from limner.models import vae as vaes

if TYPE_CHECKING:
    from PIL.Image import Image

OnStep = Callable[[int], None]
"""Called with how many steps were done since the last call; an exception that it raises ends the work."""
OnX0 = Callable[[Tensor], None]
"""Called after each step with what the latents are estimated to become (N, C, h, w)."""


@torch.no_grad()
def encode_prompts(text_encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token states of captions, every character of which is itself -> (N, L, D).

    L is 77 for CLIP. When the longest caption needs k pieces (see `prompts.chunks`), each piece is encoded by itself
    and their states stand one behind the other, L = 77k; shorter ones are filled up with empty pieces.
    """
    length = texts.length_of(text_encoder, tokenizer)
    return _encode(text_encoder, tokenizer, [texts.plain(tokenizer, prompt, length) for prompt in prompts])


@torch.no_grad()
def encode_weighted(text_encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token states of prompts in the notation of `language` -> (N, L, D), L as in `encode_prompts`.

    States are multiplied with the weights of their tokens, and all of a piece then scaled to the mean that they had, as
    stable-diffusion-webui (A1111) does by default: in its notation prompts go round, and weights mean in it what they
    are tuned for. A piece without weights is as `encode_prompts` has it, bit for bit. Raises ConfigError as
    `language.parse`.
    """
    length = texts.length_of(text_encoder, tokenizer)
    return _encode(text_encoder, tokenizer, [texts.weighted(tokenizer, prompt, length) for prompt in prompts])


def _encode(text_encoder: Any, tokenizer: Any, cut: Sequence[Sequence[Piece]]) -> Tensor:
    """Token states of N texts, each cut into pieces -> (N, L, D)."""
    length = texts.length_of(text_encoder, tokenizer)
    most = max(map(len, cut))
    pieces = [piece for own in cut for piece in [*own, *[Piece([], [])] * (most - len(own))]]
    rows, masks = texts.framed([piece.ids for piece in pieces], tokenizer, length)
    device = text_encoder.device
    ids = torch.tensor(rows, device=device)  # (N k, 77)
    # As in Diffusers' pipeline: attention sees the padding unless the text encoder was trained otherwise.
    mask = torch.tensor(masks, device=device) if getattr(text_encoder.config, "use_attention_mask", False) else None
    states: Tensor = text_encoder(ids, attention_mask=mask)[0]  # (N k, 77, D)
    for i, piece in enumerate(pieces):
        if any(weight != 1 for weight in piece.weights):
            states[i] = _weigh(states[i], piece.weights)
    return states.reshape(len(cut), most * length, -1)  # (N, L, D)


def _weigh(states: Tensor, weights: Sequence[float]) -> Tensor:
    """States of one piece (77, D) multiplied with the weights of the tokens behind the first, the mean as before."""
    factors = states.new_ones(len(states), 1, dtype=torch.float32)  # (77, 1)
    factors[1 : len(weights) + 1, 0] = torch.tensor(weights)
    weighed = states.float() * factors  # (77, D)
    scale = float(states.double().mean() / weighed.double().mean())
    if not 1 / MOST_WEIGHT <= scale <= MOST_WEIGHT:  # no weights make that, but means next to nothing do
        scale = 1.0
    return (weighed * scale).to(states)


def generators(seeds: Sequence[int]) -> list[Generator]:
    """One source of randomness an image. They live on the CPU, so that all devices draw the same noise."""
    return [Generator("cpu").manual_seed(seed) for seed in seeds]


def initial_noise(seeds: Sequence[int | Generator], shape: Sequence[int]) -> Tensor:
    """Unit Gaussian noise of `shape` (C, h, w), one a seed, or from a generator, which moves on -> (N, C, h, w)."""
    sources = [seed if isinstance(seed, Generator) else generators([seed])[0] for seed in seeds]
    return torch.stack([torch.randn(tuple(shape), generator=source) for source in sources])


def turned(noise: Tensor, other: Tensor, share: float) -> Tensor:
    """Noise turned towards other noise by a share of the angle between them, so that its length stays a noise's.

    (C, h, w) each -> (C, h, w). Shoemake, "Animating Rotation with Quaternion Curves", 1985, section 3.3.
    """
    cosine = torch.nn.functional.cosine_similarity(noise.flatten(), other.flatten(), dim=0)
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-4:  # one is the other, or its negative, and there is no angle or no way to turn
        return torch.lerp(noise, other, share)
    return (((1 - share) * angle).sin() * noise + (share * angle).sin() * other) / angle.sin()


@torch.no_grad()
def denoise(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    states: Tensor,
    *,
    steps: int,
    guidance: float,
    guidance_rescale: float = 0.0,
    negative_states: Tensor | None = None,
    generators: Sequence[Generator] | None = None,
    canvas: Canvas | None = None,
    on_step: OnStep | None = None,
    on_x0: OnX0 | None = None,
) -> Tensor:
    """Turn unit noise into latents, with classifier-free guidance (Ho and Salimans 2022, equation 6).

    latents (N, C, h, w), states and negative_states (N, L, D) -> (N, C, h, w). At guidance 1, and where the U-Net
    takes the scale as an input, the negative states are not needed and each step is one pass; otherwise both passes
    share a batch, and `guidance_rescale` is the `rescale` of `guided`. Schedulers that add noise of their own draw it
    from `generators`, one an image, or from torch's global generator without them. With a `canvas` the noise is put on
    what is there already. The U-Net computes in the states' precision, the scheduler in the latents'. `scheduler` is
    left as it was. Raises ConfigError where the scheduler can't take that many steps.
    """
    scheduler = copy.deepcopy(scheduler)
    _set_timesteps(scheduler, steps, latents.device)
    embedding, folded = None, is_folded(unet)
    if folded:
        width = unet.config["time_cond_proj_dim"]
        embedding = guidance_embedding(torch.tensor([guidance]), width).to(states)  # (1, width)
    elif guidance > 1:
        assert negative_states is not None, "guidance needs negative states"
        states = torch.cat([negative_states, states])  # (2N, L, D)
    takes_generators = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if takes_generators and generators is not None else {}

    noise, timesteps = latents, scheduler.timesteps
    if canvas is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents, timesteps = canvas.begin(scheduler, noise, steps)
        steps = steps_taken(steps, canvas.strength)
    for i, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latents, t)  # (N, C, h, w)
        given = scaled.to(states)
        if folded or guidance <= 1:
            predicted = unet(given, t, encoder_hidden_states=states, timestep_cond=embedding, return_dict=False)[0]
        else:
            predicted = guided(unet, given, t, states, guidance, guidance_rescale)
        predicted = predicted.to(latents)
        latents = scheduler.step(predicted, t, latents, **extra, return_dict=False)[0]
        if canvas is not None:
            latents = canvas.hold(scheduler, latents, noise, timesteps[i + 1 : i + 2])
        if on_x0 is not None:
            on_x0(schedulers.x0_of(scheduler, scaled, predicted, t))
        if on_step is not None:  # some schedulers have more timesteps than steps
            of = len(timesteps)
            on_step(steps * (i + 1) // of - steps * i // of)
    return latents


def _set_timesteps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Tell the scheduler its timesteps. Raises ConfigError where it can't take that many steps."""
    name = type(scheduler).__name__
    try:
        scheduler.set_timesteps(steps, device=device)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"This model's {name} can't take {steps} steps ({error}).") from None
    timesteps, end = scheduler.timesteps, scheduler.config.num_train_timesteps
    # Diffusers rounds the distance between them down, at worst to nothing, and adds an offset that may lead too far
    stays = len(timesteps) > 1 and bool(timesteps[0] == timesteps[-1])
    beyond = not timesteps.is_floating_point() and bool(timesteps[0] >= end)
    if steps > end or stays or beyond:
        raise ConfigError(f"This model's {name} can't take {steps} steps of the {end} of its training; take fewer.")


@torch.no_grad()
def draw(
    unet: Any,
    scheduler: Any,
    vae: Any,
    states: Tensor,
    *,
    seeds: Sequence[int],
    shape: Sequence[int],
    steps: int,
    guidance: float,
    guidance_rescale: float = 0.0,
    negative_states: Tensor | None = None,
    variations: Sequence[Variation | None] | None = None,
    sketch: Sketch | None = None,
    on_step: OnStep | None = None,
    on_x0: OnX0 | None = None,
) -> Tensor:
    """From noise of `shape` (C, h, w), one seed a picture, to pixels -> (N, 3, H, W), about [-1, 1].

    states (N, L, D) and the other arguments as `denoise` takes them. `variations` say for each picture towards which
    other seed's noise its own is turned, and `sketch` is the picture that all begin with. Raises ConfigError as
    `denoise` does, and ModelError where the numbers of the U-Net have no bound.
    """
    sources = generators(seeds)
    canvas = None if sketch is None else sketch.encode(vae, sources)
    noise = initial_noise(sources, shape)  # (N, C, h, w)
    for own, variation in zip(noise, variations or []):
        if variation is not None:
            own.copy_(turned(own, initial_noise([variation.seed], shape)[0], variation.strength))
    latents = denoise(
        unet,
        scheduler,
        noise.to(states.device),
        states,
        steps=steps,
        guidance=guidance,
        guidance_rescale=guidance_rescale,
        negative_states=negative_states,
        generators=sources,
        canvas=canvas,
        on_step=on_step,
        on_x0=on_x0,
    )  # (N, C, h, w)
    if not latents.isfinite().all():
        raise ModelError("The model's numbers grew beyond all bounds; take more steps or less guidance.")
    pixels = vaes.decode(vae, latents)
    return pixels if sketch is None else sketch.composite(pixels)


def paint(
    unet: Any,
    scheduler: Any,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
) -> Tensor:
    """One picture a prompt and seed, of the size that the U-Net was trained for -> pixels (N, 3, H, W) in [-1, 1].

    Each is drawn alone, so that those beside it change none of its bits. Raises ConfigError and ModelError as `draw`.
    """
    size = unet.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    pictures = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        negative_states, states = encode_prompts(text_encoder, tokenizer, ["", prompt]).chunk(2)  # (1, L, D) each
        pixels = draw(
            unet,
            scheduler,
            vae,
            states,
            seeds=[seed],
            shape=(unet.config["in_channels"], height, width),
            steps=steps,
            guidance=guidance,
            negative_states=negative_states,
        )  # (1, 3, H, W)
        pictures.append(pixels.clamp(-1, 1))
    return torch.cat(pictures)


def to_images(pixels: Tensor) -> list[Image]:
    """Pictures of pixels (N, 3, H, W) in [-1, 1]; what lies outside is clamped."""
    from PIL import Image

    unit = (pixels.float() / 2 + 0.5).clamp(0, 1)  # (N, 3, H, W)
    bytes_ = (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
    return [Image.fromarray(array) for array in bytes_]
