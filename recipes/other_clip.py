"""Let a U-Net that has learned one CLIP's token states begin with another's, without losing what it has learned.

python recipes/other_clip.py --model runs/unet --clip builtin --other runs/clip --data data/flickr8k --out runs/other
limner encode --data data/flickr8k --vae VAE --clip runs/clip --out runs/latents
limner train unet --preset builtin-tuned --data runs/latents --model runs/other --out runs/unet2

The linear map that best makes the old states of the train captions of the new ones goes into keys and values of
cross-attention. Both CLIPs must cut captions into the same tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner.data.dataset import read_split
from limner.generation.engine import encode_prompts
from limner.models import layers, loading
from running import run

READ = 400  # train pictures whose captions tell the map


def main() -> None:
    """Write the U-Net and its scheduler."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="the U-Net: a run of train unet, a model folder or builtin")
    parser.add_argument("--clip", required=True, help="the CLIP that it knows: a run, a folder, a hub id or builtin")
    parser.add_argument("--other", required=True, help="the CLIP that it is to read")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    given = parser.parse_args()
    captions = [caption for record in read_split(given.data, "train")[:READ] for caption in record.captions]
    unet = loading.load_unet(given.model)
    reread(unet, between(given.other, given.clip, captions))
    unet.save_pretrained(given.out / "unet")
    loading.load_scheduler(given.model).save_pretrained(given.out / "scheduler")


@torch.no_grad()
def between(new: str, old: str, captions: Sequence[str]) -> Tensor:
    """The map (new width, old width) of least squares from one CLIP's token states to the other's.

    Raises SystemExit where they cut the captions otherwise.
    """
    encoders = [loading.load_text_encoder(clip) for clip in (new, old)]
    cut = [tokenizer(captions).input_ids for _, tokenizer in encoders]
    if cut[0] != cut[1]:
        raise SystemExit("The two CLIPs cut captions into different tokens, so that their states can't be compared.")
    x, y = (encode_prompts(*encoder, captions).flatten(0, 1).double() for encoder in encoders)
    return torch.linalg.lstsq(x, y).solution.float()


@torch.no_grad()
def reread(unet: Any, states: Tensor) -> None:
    """Read what `states` (new width, old width) maps to the states that the U-Net knows."""
    for name in layers.tuned_layers(unet, "cross_attention_kv"):
        layer = unet.get_submodule(name)
        layer.weight = torch.nn.Parameter(layer.weight @ states.T)
        layer.in_features = len(states)
    unet.register_to_config(cross_attention_dim=len(states))


if __name__ == "__main__":
    run(main)
