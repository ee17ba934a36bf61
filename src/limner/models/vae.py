"""Pixels to moments to latents and back; the one file that knows a VAE's scale and shift."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limner.errors import ConfigError
from limner.models import hub, loading

NORM_GROUPS = 8
TILE = 512  # pixels, of which Stable Diffusion's decoder needs 0.6 GB in bf16
DECODING = ("decoder", "post_quant_conv")  # of which an AutoencoderTiny has the first, and so have others
LOGVAR = (-30.0, 20.0)  # the range that Diffusers' DiagonalGaussianDistribution clamps to


def new(channels: Sequence[int], layers: int, latent_channels: int) -> Any:
    """An untrained AutoencoderKL: `channels` at each resolution, of which each but the last halves the side.

    Raises ConfigError where the channels don't fit its group norms.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if bad := [c for c in channels if c % NORM_GROUPS]:
        raise ConfigError(f"channels of a VAE must be multiples of {NORM_GROUPS}, not {bad[0]}.")
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=NORM_GROUPS,
        scaling_factor=1.0,
    )


def settings_of(vae_config: Any) -> dict[str, Any]:
    """What `new` would be given for a VAE of these sizes; one that it has none of is None, as of an AutoencoderTiny."""
    if not has_variance(vae_config):
        return dict.fromkeys(("channels", "layers", "latent_channels"))
    return {
        "channels": tuple(vae_config["block_out_channels"]),
        "layers": vae_config["layers_per_block"],
        "latent_channels": vae_config["latent_channels"],
    }


def factor(vae_config: Any) -> int:
    """Pixels a latent, along a side."""
    name = "block_out_channels" if "block_out_channels" in vae_config else "decoder_block_out_channels"
    return int(2 ** (len(vae_config[name]) - 1))


def has_variance(vae_config: Any) -> bool:
    """Whether the encoder predicts a Gaussian, as an AutoencoderKL's, and not latents, as an AutoencoderTiny's."""
    return "decoder_block_out_channels" not in vae_config


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Moments of pixels in [-1, 1].

    pixels (N, 3, H, W) -> (N, 2C, h, w): the mean of the encoder's Gaussian, then its log-variance. An
    AutoencoderTiny has no variance, so it gets the smallest that `sample` knows.
    """
    encoded = vae.encode(pixels)
    if (latents := getattr(encoded, "latents", None)) is not None:
        return torch.cat([latents, torch.full_like(latents, LOGVAR[0])], dim=1)
    moments: Tensor = encoded.latent_dist.parameters
    return moments


def freeze_encoder(vae: Any) -> None:
    """Leave what makes latents as it is, and train what makes pixels of them alone."""
    vae.requires_grad_(False)
    for name in DECODING:
        if (part := getattr(vae, name, None)) is not None:
            part.requires_grad_(True)


def encoder_identity(ref: str) -> str:
    """The sha256 of the weights of a VAE that make latents, for a manifest; another decoder makes no others.

    Raises ModelError.
    """
    from safetensors import safe_open

    folder, digest = loading.component(ref, "vae"), hashlib.sha256()
    for file in hub.weight_files(folder):
        with loading.reading("VAE", folder), safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                if name.split(".")[0] not in DECODING:
                    weight = opened.get_tensor(name)
                    digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
                    digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sample(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw from the Gaussian that moments describe, in the VAE's own scale (Kingma and Welling 2013, section 2.4).

    moments (N, 2C, h, w), noise (N, C, h, w) -> (N, C, h, w).
    """
    mean, logvar = moments.chunk(2, dim=1)  # (N, C, h, w) each
    return mean + torch.exp(0.5 * logvar.clamp(*LOGVAR)) * noise


def to_latents(vae_config: Any, drawn: Tensor) -> Tensor:
    """Scale what `sample` drew to the unit variance that the U-Net sees. (N, C, h, w) -> (N, C, h, w)."""
    scale, shift = _affine(vae_config)
    return (drawn - shift) * scale


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels of latents, not clamped. (N, C, h, w) -> (N, 3, H, W), about [-1, 1], in the VAE's own precision."""
    scale, shift = _affine(vae.config)
    drawn = (latents / scale + shift).to(vae.dtype)
    pixels: Tensor = vae.decode(drawn, return_dict=False)[0]
    return pixels


def decode_in_tiles(vae: Any) -> None:
    """Let the VAE decode larger pictures in tiles of `TILE` pixels that overlap by a quarter and are blended there."""
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // factor(vae.config)
    vae.enable_tiling()


def _affine(vae_config: Any) -> tuple[float, float]:
    # Diffusers' defaults, which files of its early versions leave out
    usual = 0.18215 if has_variance(vae_config) else 1.0
    return float(vae_config.get("scaling_factor", usual)), float(vae_config.get("shift_factor") or 0.0)


@torch.no_grad()
def standardise(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Fold the latents' own mean and deviation into the 1x1 convolutions beside them, so that scale is 1, shift 0.

    mean, std (C,) of `sample`d latents. Diffusers' StableDiffusionPipeline knows one scale for all channels and no
    shift; the quantising convolutions are affine, so whitening each channel there is exact.
    """
    inverse = torch.cat([1 / std, torch.ones_like(std)])  # (2C,)
    vae.quant_conv.weight.mul_(inverse[:, None, None, None])
    vae.quant_conv.bias.mul_(inverse)
    vae.quant_conv.bias.sub_(torch.cat([mean / std, 2 * std.log()]))  # log-variance: -2 log std
    vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight[:, :, 0, 0] @ mean)
    vae.post_quant_conv.weight.mul_(std[None, :, None, None])
    vae.register_to_config(scaling_factor=1.0)
