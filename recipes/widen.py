"""Give a VAE more channels without changing what it computes, so that a trained one goes on with more room.

python recipes/widen.py --vae builtin --channels 32 64 64 96 --out runs/vae-wide
limner train vae --preset builtin-decoder --model runs/vae-wide --data data/flickr8k --out runs/decoder

Each channel is copied and what reads it shares its weights out among the copies (Net2WiderNet, Chen et al. 1511.05641,
section 2.3). Copies lie beside their channel, so that they share its group and group norms see the same mean and
deviation. The encoder shares evenly and so stays exact; the decoder, which is to learn on, by chance, lest copies stay
alike.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.models import loading, vae


def widened(weights: dict[str, Tensor], wide: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The weights of a VAE in the shapes of a wider one."""
    return {name: _in_shape(name, weight, wide[name].shape, generator) for name, weight in weights.items()}


def _in_shape(name: str, weight: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    weight = weight.float().repeat_interleave(shape[0] // weight.shape[0], dim=0)
    if weight.ndim == 1 or shape[1] == weight.shape[1]:
        return weight
    copies = shape[1] // weight.shape[1]
    shares = torch.full((*weight.shape[:2], copies), 1.0)  # (out, in, copies), that sum to one over copies
    if name.startswith("decoder"):
        shares = shares.uniform_(0.5, 1.5, generator=generator)
    shares /= shares.sum(2, keepdim=True)
    return (weight[:, :, None] * shares[..., *(None,) * (weight.ndim - 2)]).flatten(1, 2)


def main() -> None:
    """Widen one VAE and say by how much its pictures differ, which is rounding."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--vae", required=True, help="a model's or a VAE's folder, hub id, or `builtin`")
    parser.add_argument("--channels", type=int, nargs="+", required=True, help="multiples of the present ones")
    parser.add_argument("--seed", type=int, default=0, help="of the decoder's shares")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    old: Any = loading.load_vae(options.vae).float().eval()
    present = old.config.block_out_channels
    if len(present) != len(options.channels) or any(new % c for new, c in zip(options.channels, present)):
        parser.error(f"--channels must be multiples of {' '.join(map(str, present))}.")
    if options.channels[-1] != present[-1]:
        parser.error("the last of --channels must stay, as attention's scale goes with it.")
    new = vae.new(options.channels, old.config.layers_per_block, old.config.latent_channels).eval()
    new.load_state_dict(widened(old.state_dict(), new.state_dict(), torch.Generator().manual_seed(options.seed)))
    new.register_to_config(scaling_factor=old.config.scaling_factor, shift_factor=old.config.shift_factor)

    with torch.no_grad():
        pixels = torch.rand(2, 3, 64, 64) * 2 - 1
        moments = old.encode(pixels).latent_dist.parameters
        moved = (new.encode(pixels).latent_dist.parameters - moments).abs().max()
        latents = moments.chunk(2, dim=1)[0]
        changed = (new.decode(latents).sample - old.decode(latents).sample).abs().max()
    new.save_pretrained(options.out / "vae")
    sizes = " -> ".join(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}" for network in (old, new))
    print(f"{sizes} million weights; latents differ by {moved:.1e}, pixels by {changed:.1e} at most")


if __name__ == "__main__":
    main()
