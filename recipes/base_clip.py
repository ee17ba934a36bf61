"""Train the base of the built-in CLIP on what teachers know of photographs and of captions, none of them in pairs.

python recipes/base_clip.py --data TEACHERS --dataset DATASET --out RUN [--images N] [--set key=value] [--dry-run]

TEACHERS is the folder that recipes/teachers.py wrote. The image tower learns Lite0's features, of the whole crop and
of each patch, and the place among sentences that the names of ImageNet's classes give a picture; the text tower learns
where MiniLM puts a caption. Both places are one space, so that captions find photographs, a little, though no caption
was seen with its photograph. RUN/model/clip is what `limner train clip --model RUN` then tunes on pairs.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.functional import grid_sample, mse_loss, normalize

from limner.artifacts import read_json, sha256
from limner.config import TrainConfig
from limner.data.dataset import read_split
from limner.models import clip as clips
from limner.models import loading
from limner.settings import resolve
from limner.training.loop import plan_training, run_training
from limner.training.stream import Example, Stream
from running import run
from teachers import ImageTeacher

HINTS = (2, 4, 7, 10)  # blocks of the teacher whose answers the first layers of the image tower learn
EACH = 4  # pictures of which one is asked for hints, and for which one caption is read: both are learned sooner


class BaseClipConfig(TrainConfig):
    """Sizes of the two towers, and what the losses weigh."""

    dataset: Path
    """The dataset folder that the teachers' train and val pictures are from, whose val captions judge."""
    vocabulary: PositiveInt = 4096
    """Entries of the tokenizer, trained on all captions."""
    size: PositiveInt = 160
    """Side of the pictures that the image tower reads, in pixels."""
    patch: PositiveInt = 16
    """Side of a patch, in pixels."""
    width: PositiveInt = 256
    """Width of the image tower."""
    layers: PositiveInt = 6
    """Layers of the image tower."""
    heads: PositiveInt = 4
    """Attention heads of the image tower."""
    text_width: PositiveInt = 256
    """Width of the text tower, which is what the U-Net reads."""
    text_layers: PositiveInt = 4
    """Layers of the text tower."""
    text_heads: PositiveInt = 4
    """Attention heads of the text tower."""
    kept: float = 0.5
    """Share of the patches that the image tower sees in training (Li et al. 2212.00794)."""
    hint_weight: float = 1.0
    """Weight of what the layers of the teacher answer on the way, each asked of a layer of the image tower."""
    min_scale: float = 0.35
    """Smallest share of the picture that a random crop takes."""
    pasted: float = 0.5
    """Share of the examples in which a box shows another picture (CutMix, Yun et al. 1905.04899), so that few
    photographs make many."""
    dense_weight: float = 1.0
    """Weight of the features by patch."""
    pooled_weight: float = 1.0
    """Weight of the features of the whole crop."""
    place_weight: float = 1.0
    """Weight of the picture's place among sentences."""
    text_weight: float = 2.0
    """Weight of the captions' places."""


def sine_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of rows and columns -> (side * side, width)."""
    quarter = width // 4
    frequencies = math.pi / 2 * side / (1.5 ** torch.arange(quarter))  # the finest turns by a quarter a patch
    where = torch.linspace(0, 1, side)[:, None] * frequencies.clamp(min=math.pi / 2)  # (side, W/4)
    waves = torch.cat([where.sin(), where.cos()], dim=1)  # (side, W/2)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return nn.functional.pad(torch.cat([rows, columns], dim=2).flatten(0, 1), (0, width - 4 * quarter))


@torch.no_grad()
def begin_like_trained(vision: Any) -> None:
    """Start the image tower where trained ones are found: patches look at patches near them, and values pass through.

    Queries and keys begin alike, so that positions find themselves and their neighbours, and values with their output
    begin as minus a share of the identity (Trockman and Kolter, 2305.09828, equations 5 and 6).
    """
    positions = vision.embeddings.position_embedding.weight  # (1 + P, W)
    side = math.isqrt(len(positions) - 1)
    positions[1:] = sine_positions(side, positions.shape[1]) * 0.5
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        width, heads = attention.q_proj.weight.shape[0], attention.num_heads
        each = width // heads
        for head in range(heads):
            rows = slice(head * each, (head + 1) * each)
            wanted = 0.7 * torch.randn(width, width) / width**0.5 + 0.7 * torch.eye(width)
            u, s, v = torch.linalg.svd(wanted)
            root = s[:each].sqrt()
            attention.q_proj.weight[rows] = (u[:, :each] * root).T
            attention.k_proj.weight[rows] = v[:each] * root[:, None]
        wanted = 0.4 * torch.randn(width, width) / width**0.5 - 0.4 * torch.eye(width)
        u, s, v = torch.linalg.svd(wanted)
        attention.v_proj.weight.copy_(s.sqrt()[:, None] * v)
        attention.out_proj.weight.copy_(u * s.sqrt())


def missed(answers: Tensor, wanted: Tensor) -> Tensor:
    """Share of what is wanted that the answers miss: 1 where they are its mean, 0, and 0 where they are right."""
    return mse_loss(answers, wanted) / wanted.square().mean()


def apart(answers: Tensor, wanted: Tensor) -> Tensor:
    """One minus the mean cosine of unit-length rows (N, E)."""
    return 1 - (answers * wanted.to(answers.device)).sum(dim=1).mean()


class Hints(nn.Module):
    """What the teacher's blocks see at each patch, to be learned by the image tower's layers (FitNets, 1412.6550)."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        network = ImageTeacher().network
        self.stem = nn.Sequential(network._conv_stem, nn.ReLU6(inplace=True))
        self.blocks = network._blocks[: max(HINTS) + 1]
        self.patch = patch

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Pixels (N, 3, S, S) in [-1, 1] -> for each of HINTS what its block answers (N, P, C)."""
        x = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        answers = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in HINTS:
                fold = x.shape[-1] * self.patch // pixels.shape[-1]  # places a patch, along a side
                answers.append(nn.functional.pixel_unshuffle(x, fold).flatten(2).permute(0, 2, 1))
        return answers


class Student(nn.Module):
    """A CLIP, and the heads that answer the image teacher."""

    def __init__(self, clip: clips.Clip, components: int, hints: list[int], kept: float) -> None:
        super().__init__()
        self.clip, self.kept = clip.network, kept
        width = clip.network.config.vision_config.hidden_size
        self.pooled, self.dense = nn.Linear(width, components), nn.Linear(width, components)
        self.hints = nn.ModuleList(nn.Linear(width, count) for count in hints)

    def forward(self, values: Tensor, ids: Tensor, order: Tensor) -> tuple[Any, ...]:
        """Pixels (N, 3, S, S) in [-1, 1], token ids (M, L), patches in random order (N, P) -> what the teachers ask.

        That is, of pictures: features of the whole (N, K) and of each patch shown (N, P', K), hints (N, P', C), which
        patches were shown (N, P'), the place (N, E); and of captions: the place (M, E).
        """
        vision = self.clip.vision_model
        x = vision.embeddings(values)  # (N, 1 + P, W)
        shown = order[:, : round(self.kept * order.shape[1])]  # (N, P')
        patches = x[:, 1:].gather(1, shown[..., None].expand(-1, -1, x.shape[2]))
        x = vision.pre_layrnorm(torch.cat([x[:, :1], patches], dim=1))
        hints = []
        for number, layer in enumerate(vision.encoder.layers):
            x = layer(x, attention_mask=None)
            if number < len(self.hints):
                hints.append(self.hints[number](nn.functional.layer_norm(x[:, 1:], x.shape[2:])))
        whole = vision.post_layernorm(x[:, 0])
        place = normalize(self.clip.visual_projection(whole), dim=1)
        text = normalize(self.clip.get_text_features(ids).pooler_output, dim=1)
        return self.pooled(whole), self.dense(vision.post_layernorm(x[:, 1:])), hints, shown, place, text


class TrainBaseClip:
    """The task: as a teacher sees each picture, as another reads each caption."""

    def __init__(self, config: BaseClipConfig) -> None:
        self.config = config
        counts = read_json(config.data / "counts.json")
        self.pictures = np.load(config.data / "pictures.npy", mmap_mode="r")
        self.maps = torch.from_numpy(np.load(config.data / "maps.npy"))  # (N, h, w, K) float16
        self.places = self._centred(np.load(config.data / "places.npy"))
        self.sentences = self._centred(np.load(config.data / "sentences.npy"))
        self.captions = json.loads((config.data / "captions.json").read_text(encoding="utf-8"))
        self.count = counts["train"] + counts["extra"]
        tokenizer = clips.new_tokenizer(self.captions, config.vocabulary)
        self.clip = self._new(tokenizer)
        self.ids = self.clip.tokenize(self.captions)
        self.hints = Hints(config.patch)
        self.means, self.scales = self._spread()
        self.network = Student(self.clip, self.maps.shape[-1], [len(mean) for mean in self.means], config.kept)
        self.parents = {"teachers": sha256(config.data / "counts.json")}
        self.facts: dict[str, Any] = {}
        self.rates: dict[str, float] = {}
        self.val = [record for record in read_split(config.dataset, "val") if record.captions]
        self.stream = Stream(self.count, config.seed, self._example)

    def _spread(self) -> tuple[list[Tensor], list[Tensor]]:
        """Mean and standard deviation of each number of the hints, on a few pictures."""
        rows = np.linspace(0, self.count - 1, 64).astype(int)
        pixels = torch.from_numpy(self.pictures[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        side = self.config.size
        answers = self.hints(nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True))
        return [a.mean(dim=(0, 1)) for a in answers], [a.std(dim=(0, 1)) + 1e-3 for a in answers]

    @staticmethod
    def _centred(array: np.ndarray[Any, Any]) -> Tensor:
        """Unit-length rows (N, E) about their mean."""
        rows = torch.from_numpy(array).float()
        return normalize(rows - rows.mean(dim=0), dim=1)

    def _new(self, tokenizer: Any) -> clips.Clip:
        from transformers.models.clip.configuration_clip import CLIPConfig
        from transformers.models.clip.modeling_clip import CLIPModel

        config = self.config
        text = {
            "hidden_size": config.text_width,
            "intermediate_size": 4 * config.text_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads,
            "hidden_act": "gelu",
            **clips.text_settings(tokenizer),
        }
        vision = {
            "hidden_size": config.width,
            "intermediate_size": 4 * config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "hidden_act": "gelu",
            "image_size": config.size,
            "patch_size": config.patch,
        }
        features = self.sentences.shape[1]
        network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=features))
        begin_like_trained(network.vision_model)
        # Of few tokens, plain products are three times as fast as the fused kernel of a CPU
        network.set_attn_implementation("eager")
        return clips.Clip(network, tokenizer, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        side = self.config.size // self.config.patch
        other = int(rng.integers(self.count))
        (pixels, box), (others, other_box) = self._crop(index, rng), self._crop(other, rng)
        hidden = np.zeros((side, side), dtype=bool)
        if rng.random() < self.config.pasted:
            height, width = rng.integers(1, side, size=2)
            top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
            hidden[top : top + height, left : left + width] = True
        shown = torch.from_numpy(hidden.repeat(self.config.patch, 0).repeat(self.config.patch, 1))
        caption = int(rng.integers(len(self.captions)))
        return {
            "pixels": torch.where(shown, others, pixels),
            "box": torch.stack([box, other_box]),
            "order": torch.from_numpy(rng.permutation(side**2)),
            "index": torch.tensor([index, other]),
            "hidden": torch.from_numpy(hidden.flatten()),
            "ids": self.ids[caption],
            "caption": caption,
        }

    def _crop(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A random crop of a picture -> (3, S, S) uint8; left, top and width as shares, and whether mirrored."""
        config, picture = self.config, self.pictures[index]
        side = len(picture)
        width = side * float(rng.uniform(config.min_scale, 1.0)) ** 0.5
        left, top = (float(rng.uniform(0, side - width)) for _ in range(2))
        box = (left, top, left + width, top + width)
        image = Image.fromarray(picture).resize((config.size, config.size), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        flip = rng.random() < 0.5
        return pixels.flip(-1) if flip else pixels, torch.tensor([left / side, top / side, width / side, flip])

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """How far the student is from its teachers; 1 is knowing nothing."""
        config, rows = self.config, batch["index"].cpu()  # (N, 2)
        values = batch["pixels"].float() / 127.5 - 1
        some = slice(None, None, EACH)
        pooled, dense, hints, shown, place, text = network(
            values, self.clip.trimmed(batch["ids"][some]), batch["order"]
        )
        hidden = batch["hidden"][..., None]  # (N, P, 1): where the other picture is
        own, other = (self._wanted(self.maps[rows[:, i]].to(values.device), batch["box"][:, i]) for i in range(2))
        wanted = torch.where(hidden, other, own)  # (N, P, K)
        share = hidden.float().mean(dim=1)  # (N, 1)
        places = self.places[rows].to(values.device)  # (N, 2, E)
        place_wanted = normalize(places[:, 0] * (1 - share) + places[:, 1] * share, dim=1)
        seen = wanted.gather(1, shown[..., None].expand(-1, -1, wanted.shape[2]))
        asked = self._hints(values[some])
        asked = [a.gather(1, shown[some, :, None].expand(-1, -1, a.shape[2])) for a in asked]
        hinted = torch.stack([missed(given[some].float(), a) for given, a in zip(hints, asked)])
        losses = {
            "hint": hinted.mean(),
            "dense": missed(dense.float(), seen),
            "pooled": missed(pooled.float(), wanted.mean(dim=1)),
            "place": apart(place.float(), place_wanted),
            "text": apart(text.float(), self.sentences[batch["caption"][some].cpu()]),
        }
        total = torch.stack([getattr(config, f"{name}_weight") * value for name, value in losses.items()]).sum()
        return total, losses | {f"hint_{number}": value.detach() for number, value in zip(HINTS, hinted)}

    def _hints(self, values: Tensor) -> list[Tensor]:
        """The hints for pixels (N, 3, S, S), each number with mean 0 and variance 1 -> a list of (N, P, C)."""
        answers = self.hints.to(values.device)(values)
        spread = [(m.to(values.device), s.to(values.device)) for m, s in zip(self.means, self.scales)]
        return [(answer - mean) / scale for answer, (mean, scale) in zip(answers, spread)]

    def _wanted(self, maps: Tensor, box: Tensor) -> Tensor:
        """The teacher's features at the centre of each patch of a crop.

        maps (N, h, w, K) of whole pictures; box (N, 4): left, top, width as shares of the side, mirrored -> (N, P, K).
        """
        side = self.config.size // self.config.patch
        centres = (torch.arange(side, device=box.device) + 0.5) / side  # (side,)
        left, top, width, flip = box[:, :, None].unbind(dim=1)  # (N, 1)
        across = torch.where(flip > 0.5, 1 - centres, centres)  # (N, side)
        x = (left + width * across)[:, None].expand(-1, side, -1)
        y = (top + width * centres)[:, :, None].expand(-1, -1, side)
        grid = torch.stack([x, y], dim=3) * 2 - 1  # (N, side, side, 2)
        sampled = grid_sample(
            maps.float().permute(0, 3, 1, 2), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return sampled.flatten(2).permute(0, 2, 1)

    def validate(self, samples: Path) -> dict[str, float]:
        """Recall on val, of a CLIP that has seen no pair, and how well features of val pictures are met."""
        del samples
        from limner.evaluation.features import caption_features
        from limner.evaluation.retrieval import ranks, recall

        device = next(self.network.parameters()).device
        captions = [caption for record in self.val for caption in record.captions]
        owners = torch.tensor([i for i, record in enumerate(self.val) for _ in record.captions])
        images, answers, asked = [], [], []
        for start in range(self.count, len(self.pictures), 128):
            stack = torch.from_numpy(np.asarray(self.pictures[start : start + 128])).permute(0, 3, 1, 2).float()
            size = (self.config.size, self.config.size)
            pixels = nn.functional.interpolate(stack, size=size, mode="bicubic", antialias=True).clamp(0, 255)
            values = (pixels / 127.5 - 1).to(device)
            whole = self.clip.network.vision_model(values).pooler_output
            images.append(normalize(self.clip.network.visual_projection(whole), dim=1).cpu())
            answers.append(self.network.pooled(whole).cpu())
            asked.append(self.maps[start : start + 128].float().mean(dim=(1, 2)))
        figures = recall(ranks(caption_features(self.clip, captions, 250), torch.cat(images), owners))
        pooled = missed(torch.cat(answers), torch.cat(asked)).item()
        return {"loss": pooled, "pooled": pooled, **figures}

    def save(self, folder: Path) -> None:
        """Write `folder/clip`."""
        with loading.quiet():
            self.clip.save(folder / "clip")


def main() -> None:
    """Train, or go on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("data", "dataset", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--images", type=int, default=355_000)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--dry-run", action="store_true", help="print what it would cost, and write nothing")
    given = parser.parse_args()
    defaults = {
        "batch_size": 128,
        "optimizer": "muon",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "warmup": 5_000,
        "ema_halflife": 10_000,
        "log_every": 5_000,
        "validate_every": 50_000,
        "checkpoint_every": 25_000,
    }
    sets = [f"{name}={value}" for name, value in defaults.items()] + given.set
    flags = {"data": given.data, "dataset": given.dataset, "out": given.out, "images": given.images}
    config = resolve(BaseClipConfig, flags, sets=sets)
    if given.dry_run:
        for name, value in plan_training(TrainBaseClip, config).items():
            print(f"{name:<10}  {value}")
    else:
        run_training(TrainBaseClip, config)


if __name__ == "__main__":
    run(main)
