"""Give a VAE more latent channels, and a U-Net of its latents room for them, without losing what either has learned.

python recipes/more_latents.py vae --model builtin --channels 8 --out runs/more/begun
limner train vae --preset builtin-tuned --model runs/more/begun --data data/flickr8k --out runs/more/vae
python recipes/more_latents.py unet --model builtin --vae runs/more/vae --data data/flickr8k --out runs/more/model
limner encode --data data/flickr8k --vae runs/more/model --clip builtin --out runs/more/latents
limner train unet --preset builtin-tuned --data runs/more/latents --model runs/more/model --out runs/more/unet

The old channels begin as they were, and are first; the VAE hardly heeds the new ones until it is trained. Then all are
brought to zero mean and unit deviation, and the U-Net begins by leaving the new ones out, on both sides.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.data.dataset import read_split
from limner.data.pictures import load_pixels
from limner.models import loading
from limner.models import vae as vaes
from running import run

LOGVAR = -4.0  # of the new channels at first, which so say much with little noise
HEEDED = 0.02  # deviation of the weights by which the decoder reads them at first
MEASURED, AT_ONCE = 1024, 16  # train pictures for the latents' mean and deviation


def main() -> None:
    """Write the VAE, or the VAE and the U-Net, that training goes on with."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    first, then = parts.add_parser("vae"), parts.add_parser("unet")
    first.add_argument("--channels", type=int, required=True, help="latent channels, more than there are")
    then.add_argument("--vae", required=True, help="the VAE that was trained with more channels")
    then.add_argument("--data", type=Path, required=True, help="the dataset whose train pictures tell the scale")
    then.add_argument("--size", type=int, default=128, help="their side in pixels (default 128)")
    for part in (first, then):
        part.add_argument("--model", required=True, help="a model: builtin, a folder or a hub id")
        part.add_argument("--out", type=Path, required=True, help="folder for the result")
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.part == "vae":
        more_channels(loading.load_vae(given.model), given.channels).save_pretrained(given.out / "vae")
        return
    vae = loading.load_vae(given.vae).eval()
    vaes.standardise(vae, *statistics(vae, given.data, given.size))
    vae.save_pretrained(given.out / "vae")
    more_room(loading.load_unet(given.model), vae.config["latent_channels"]).save_pretrained(given.out / "unet")
    loading.load_scheduler(given.model).save_pretrained(given.out / "scheduler")


@torch.no_grad()
def more_channels(old: Any, channels: int) -> Any:
    """A VAE whose first latent channels and whose pictures are `old`'s, but for what little it heeds of the others."""
    before = old.config["latent_channels"]
    if channels <= before:
        raise SystemExit(f"--channels must be more than the {before} that there are.")
    new = type(old).from_config(old.config, latent_channels=channels)
    means, others = torch.arange(before), torch.arange(before, channels)
    moments = torch.cat([means, channels + means])  # where old moments lie among the new
    weights, given = new.state_dict(), old.state_dict()  # of `new` itself: what is written there is its own
    for name, weight in given.items():
        if weights[name].shape == weight.shape:
            weights[name].copy_(weight)
    fresh = weights["encoder.conv_out.weight"]
    fresh.normal_(std=float(given["encoder.conv_out.weight"][:before].std()))
    fresh[channels + others] = 0
    weights["decoder.conv_in.weight"].normal_(std=HEEDED)[:, :before] = given["decoder.conv_in.weight"]
    for name, own in (("encoder.conv_out", moments), ("quant_conv", moments), ("post_quant_conv", means)):
        bias = weights[f"{name}.bias"].zero_()
        bias[own] = given[f"{name}.bias"]
    weights["quant_conv.bias"][channels + others] = LOGVAR
    fresh[moments] = given["encoder.conv_out.weight"]
    for name, own in (("quant_conv", moments), ("post_quant_conv", means)):
        square = torch.eye(len(weights[f"{name}.weight"]))
        square[own[:, None], own] = given[f"{name}.weight"][:, :, 0, 0]
        weights[f"{name}.weight"].copy_(square[:, :, None, None])
    return new


@torch.no_grad()
def statistics(vae: Any, data: Path, size: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of latents over train pictures, (C,) each."""
    records = read_split(data, "train")[:MEASURED]
    drawn = []
    for start in range(0, len(records), AT_ONCE):
        pixels = torch.stack([load_pixels(record.path, size) for record in records[start : start + AT_ONCE]])
        moments = vaes.encode(vae, pixels)
        drawn.append(vaes.sample(moments, torch.randn_like(moments.chunk(2, dim=1)[0])))
    latents = torch.cat(drawn)  # (N, C, h, w)
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))


@torch.no_grad()
def more_room(old: Any, channels: int) -> Any:
    """A U-Net that answers for the first channels as `old` does, and nothing for the others, which it does not heed."""
    before = old.config["in_channels"]
    new = type(old).from_config(old.config, in_channels=channels, out_channels=channels)
    weights, given = new.state_dict(), old.state_dict()  # of `new` itself: what is written there is its own
    for name, weight in given.items():
        if weights[name].shape == weight.shape:
            weights[name].copy_(weight)
    weights["conv_in.weight"].zero_()[:, :before] = given["conv_in.weight"]
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name].zero_()[:before] = given[name]
    return new


if __name__ == "__main__":
    run(main)
