"""What a training of CLIP gained, and what it moved: the report of a `train clip` run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from limner.artifacts import atomic_folder, identity, read_json, write_json
from limner.config import TrainClipConfig
from limner.data.dataset import SPLITS, Record, Split, read_split
from limner.errors import ModelError
from limner.evaluation import plots
from limner.evaluation.drift import drift
from limner.evaluation.features import caption_features, captions_of, picture_features
from limner.evaluation.mixing import ALPHAS, choose, mixed
from limner.evaluation.retrieval import KS, Ranks, intervals, mean_recall, ranks, recall
from limner.evaluation.watch import Watch
from limner.evaluation.yardstick import Yardstick
from limner.evaluation.zeroshot import zero_shot
from limner.generation.engine import paint
from limner.generation.jobs import Spec, read_spec
from limner.models import adapter as adapters
from limner.models import gate, loading
from limner.models.clip import Clip
from limner.models.tuning import Adapted
from limner.progress import progress
from limner.settings import MISSION

REPORT = "retrieval.json"
PICTURES = ("drift.png", "alpha.png", "grid.png")
TUNED = "tuned"  # within the model of a swept run: what was trained, beside the mix that was chosen
WAYS = {"t→i": "text_to_image", "i→t": "image_to_text"}
MOST_PICTURES = 1_000  # of a split, so that all splits are judged among as many, and in minutes
DRAWN, SHOWN = 32, 6  # dev captions that are drawn for each mix, and those of them that are shown
BATCH = 64


@dataclass(frozen=True)
class Judged:
    """Captioned pictures, and how well a CLIP finds them by their captions and their captions by them."""

    records: Sequence[Record]

    @classmethod
    def of(cls, folder: Path, split: Split) -> Self:
        """The first thousand captioned pictures of a split. Raises DataError."""
        return cls([record for record in read_split(folder, split) if record.captions][:MOST_PICTURES])

    @property
    def captions(self) -> list[str]:
        """The first caption of each picture, on which drift is measured."""
        return [record.captions[0] for record in self.records]

    def images(self, clip: Clip) -> Tensor:
        """Features of the pictures (N, E). Raises DataError where one can't be read."""
        return picture_features(clip, [record.path for record in self.records], BATCH)

    def ranks(self, clip: Clip) -> Ranks:
        """How well all captions and pictures find each other. Raises DataError where a picture can't be read."""
        captions, owners = captions_of(self.records)
        return ranks(caption_features(clip, captions, BATCH), self.images(clip), owners)

    def row(self, clip: Clip, base: Clip | None) -> dict[str, Any]:
        """Figures of a CLIP, ready for JSON.

        The six recalls, each {"value", "low", "high"} with its 95 % interval; the median ranks; "mean_recall" with
        its standard error; and where there is a base "drift", the mean cosine of both layers' token states to it.
        """
        found = self.ranks(clip)
        ends = intervals(found)
        row: dict[str, Any] = {
            name: {"value": value, "low": ends[name].low, "high": ends[name].high} if name in ends else value
            for name, value in recall(found).items()
        }
        row["mean_recall"] = mean_recall(found)
        if base is not None:
            moved = drift(base, clip, self.captions, BATCH)
            row["drift"] = {layer: figures["mean_cosine"] for layer, figures in moved.items()}
        return row


def skipped(data: Path) -> dict[str, int]:
    """Pictures of each split that have no caption, which nothing here looks at. Raises DataError."""
    return {split: sum(not record.captions for record in read_split(data, split)) for split in SPLITS}


def write_report(folder: Path, config: TrainClipConfig) -> None:
    """Judge a finished run before and after, on dev, test and train pictures; mix the two where that is asked for.

    Writes `retrieval.json`; where the run began with a CLIP `drift.png`; of a sweep `alpha.png` and perhaps
    `grid.png`, and then the chosen mix becomes `model/clip` and the tuned weights are kept in `model/tuned`. Dev alone
    chooses; test only tells. What was reported before is left as it is. Raises DataError, ModelError.
    """
    model, file = folder / "model", folder / REPORT
    is_mix = (model / TUNED).is_dir()
    settings = config.model_dump(mode="json", include={"sweep_alpha", "min_cosine", "unet", "labelled"})
    known = read_json(file) if file.is_file() else None
    is_told = known is not None and known["clip"] == identity(model / "clip") and known["settings"] == settings
    if is_told and is_mix == config.sweep_alpha:  # a mix at alpha 1 has the very weights that were tuned
        return
    for name in (REPORT, *PICTURES):  # or else a kill would leave what no longer belongs together
        (folder / name).unlink(missing_ok=True)
    tuned = model / TUNED if is_mix else model
    report, mix = _judge(folder, config, tuned)
    report = {"settings": settings, "skipped": skipped(config.data), **report}
    if mix is None and not is_mix:
        write_json(file, {"clip": identity(model / "clip"), **report})
    else:
        with loading.quiet(), atomic_folder(model) as partial:
            if mix is None:
                shutil.copytree(tuned, partial, dirs_exist_ok=True)
            else:
                mix.save(partial / "clip")
                shutil.copytree(tuned, partial / TUNED)
            # Before the model is in its place: after a kill in between, it is not the one told of, and judged again
            write_json(file, {"clip": identity(partial / "clip"), **report})
    print(_summary(report))


def _judge(folder: Path, config: TrainClipConfig, model: Path) -> tuple[dict[str, Any], Clip | None]:
    """The report on the tuned CLIP of `model`, and the mix that a sweep chose."""
    splits = {split: judged for split in SPLITS if (judged := Judged.of(config.data, split)).records}
    base, tuned, mix = None, _load(str(model)), None
    if (adapter := adapters.find(str(model))) is not None:
        width = tuned.network.config.text_config.hidden_size
        tuned = Adapted(**vars(tuned), weight=adapters.load(adapter, width))
    clips: dict[str, Clip] = {"tuned": tuned}
    report: dict[str, Any] = {"alpha": None}
    if config.model is not None:
        base = _load(config.model)
        clips = {"base": base, **clips}
        report["drift"] = drift(base, tuned, splits["val"].captions, BATCH)
        plots.plot_drift(report["drift"], folder / "drift.png")
        if config.sweep_alpha:
            report["alpha"] = _sweep(folder, config, base, tuned, splits["val"])
            mix = clips["alpha"] = mixed(base, tuned, report["alpha"]["chosen"])
    report["splits"] = {
        split: {name: judged.row(clip, base) for name, clip in clips.items()} for split, judged in splits.items()
    }
    if config.labelled is not None:
        report["zero_shot"] = {name: zero_shot(clip, config.labelled, BATCH) for name, clip in clips.items()}
    return report, mix


def _load(ref: str) -> Clip:
    """The CLIP of `ref`, where it is judged soonest."""
    clip = loading.load_clip(ref)
    clip.network.to(_device())
    return clip


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _sweep(folder: Path, config: TrainClipConfig, base: Clip, tuned: Clip, val: Judged) -> dict[str, Any]:
    """Figures of every mix on dev pictures, "rows", and the alpha that `choose` takes; writes plot and grid."""
    painter = None
    if config.unet is not None:
        assert config.model is not None  # as in any sweep
        painter = Painter(config.unet, base, config.model, Yardstick.of(config.model, base), val)
    rows, drawn = [], {}
    with progress("mixes", len(ALPHAS)) as advance:
        for alpha in ALPHAS:
            mix = mixed(base, tuned, alpha)
            row = {"alpha": alpha, **val.row(mix, base)}
            if config.labelled is not None:
                row |= zero_shot(mix, config.labelled, BATCH)
            if painter is not None:
                pixels = painter(mix)
                drawn[alpha] = pixels[:SHOWN]
                row |= painter.watch.score(pixels)
            rows.append(row)
            advance(1)
    chosen = choose(rows, config.min_cosine)
    plots.plot_alpha(rows, chosen, folder / "alpha.png")
    if painter is not None:
        shown = {f"alpha {alpha:g}": drawn[alpha] for alpha in sorted({*ALPHAS[::2], chosen})}
        plots.grid(shown, painter.captions[:SHOWN], folder / "grid.png")
    return {"chosen": chosen, "rows": rows}


def drawable(ref: str, base: Clip, clip: str) -> Spec:
    """What `ref` is, which is to draw behind mixes of `base`, the CLIP of `clip`.

    Raises ModelError where it is no Stable Diffusion, or where its U-Net can't read the base's token states.
    """
    spec = read_spec(ref)
    if not spec.own_loop:
        raise ModelError(f"{ref} is a {spec.pipeline}; name a StableDiffusionPipeline as unet, or leave it out.")
    if not base.causal:
        raise ModelError("No U-Net of Stable Diffusion reads the text tower of a SigLIP; leave out unet.")
    facts = gate.TextFacts.of(base.network.config.text_config.to_dict(), base.tokenizer)
    gate.check(facts, gate.wanted(ref), clip=clip, unet=ref)
    return spec


class Painter:
    """Draws the same captions with the same seeds behind any text tower, before the base CLIP.

    Which is not independent of what it judges: a mix near it may please it for that alone. Its figures rank the mixes
    of one pair and say nothing beside; for more there is the judge of `limner evaluate`.
    """

    def __init__(self, ref: str, base: Clip, clip: str, judge: Yardstick, val: Judged) -> None:
        """Load the VAE and the U-Net of `ref`; the judge is the base, that of `clip`. Raises ModelError as
        `drawable` does.
        """
        self.spec = drawable(ref, base, clip)
        self.unet, self.vae = loading.load_unet(ref), loading.load_vae(ref)
        self.scheduler = loading.load_scheduler(ref)
        self.captions = [*MISSION, *val.captions][:DRAWN]
        self.watch = Watch(judge, self.captions, val.images(base))

    def __call__(self, clip: Clip) -> Tensor:
        """Pictures of all captions, seeds 0, 1, ... -> (N, 3, H, W) in [-1, 1]."""
        assert self.spec.steps is not None  # as in any model of its own loop
        assert self.spec.guidance is not None
        with loading.quiet():
            return paint(
                self.unet.to(_device()),
                self.scheduler,
                self.vae.to(_device()),
                clip.network.text_model,
                clip.tokenizer,
                self.captions,
                seeds=range(len(self.captions)),
                steps=self.spec.steps,
                guidance=self.spec.guidance,
            )


def _summary(report: dict[str, Any]) -> str:
    """The recalls on dev in per cent, with their intervals, one line a CLIP; and what was skipped and chosen."""
    lines = [f"{'dev, %':<6}" + "".join(f"{f'{way} R@{k}':>17}" for way in WAYS for k in KS)]
    for name, row in report["splits"]["val"].items():
        cells = [row[f"{way}_r@{k}"] for way in WAYS.values() for k in KS]
        texts = [f"{100 * c['value']:.1f} ({100 * c['low']:.0f}–{100 * c['high']:.0f})" for c in cells]
        lines.append(f"{name:<6}" + "".join(f"{text:>17}" for text in texts))
    if report["alpha"] is not None:
        lines.append(f"alpha is {report['alpha']['chosen']:g}")
    if count := sum(report["skipped"].values()):
        lines.append(f"{count} pictures have no caption; they were skipped.")
    return "\n".join(lines)
