"""limner bench: seconds a picture against how well it fits, over steps, schedulers, precisions and engines."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limner import artifacts
from limner.config import BenchConfig
from limner.errors import ConfigError, DataError, ModelError
from limner.generation.jobs import Spec, make_jobs, read_spec
from limner.generation.language import literal
from limner.models import loading

if TYPE_CHECKING:
    from PIL.Image import Image

    from limner.config import Engine, Precision

Score = Callable[[Sequence["Image"], Sequence[str]], list[float]]
"""How good each picture is for its prompt; more is better."""
OWN = "the model's own"


def run(config: BenchConfig) -> Path:
    """Write `bench.json` and `bench.png` into `config.out`. Raises ConfigError, DataError and ModelError."""
    _check(config)
    spec = read_spec(config.model)
    prompts = _prompts(config)
    axis, score = _own_clip(spec) if config.judge is None else _judge(config.judge, spec)
    from limner.evaluation import plots

    rows = measure(config, spec, prompts, score)
    for row in rows:
        what = f"{row['engine']}, {row['precision']}, {row['scheduler']}, {row['steps']} steps"
        print(f"{what}: {row['seconds']:.3f} s a picture, score {row['score']:.4f}")
    facts = {"model": spec.ref, "score": axis, "prompts": prompts, "hardware": artifacts.hardware()}
    artifacts.write_json(config.out / "bench.json", {**facts, "rows": rows})
    plots.plot_bench(rows, axis, config.out / "bench.png")
    return config.out


def plan(config: BenchConfig) -> dict[str, Any]:
    """What `run` would measure; nothing is fetched. Raises as `run` does."""
    _check(config)
    models, settings = len(_models(config)), len(_settings(config))
    there = loading.resolve_here(config.model)
    return {
        "model": f"{config.model}, to be fetched" if there is None else read_spec(config.model, there).ref,
        "settings": models * settings,
        "pictures": models * (settings * len(_prompts(config)) + 1),
        "out": config.out,
    }


def _models(config: BenchConfig) -> list[tuple[Precision, Engine]]:
    """The precisions and engines that a model is loaded for, each pair once."""
    return list(dict.fromkeys(itertools.product(config.precisions, config.engines)))


def _settings(config: BenchConfig) -> list[tuple[str | None, int]]:
    """The schedulers and steps that each of those draws with, each pair once."""
    return list(dict.fromkeys(itertools.product(config.schedulers or (None,), config.steps)))


def measure(config: BenchConfig, spec: Spec, prompts: Sequence[str], score: Score) -> list[dict[str, Any]]:
    """Each setting's seconds a picture, a median, and mean score. Raises ConfigError and ModelError.

    The settings of a precision and engine take turns prompt by prompt, so that a busy moment hits all alike.
    """
    from limner.generation.model import Model

    rows = []
    settings = _settings(config)
    texts = prompts if config.data is None else list(map(literal, prompts))  # captions have no weights
    for precision, engine in _models(config):
        model = Model(spec, config.device, precision=precision, engine=engine)
        jobs = {
            (scheduler, steps): make_jobs(spec, texts, steps=steps, scheduler=scheduler)
            for scheduler, steps in settings
        }
        next(model.draw(jobs[settings[0]][:1]))  # the first picture of a process waits for libraries
        times: dict[Any, list[float]] = {setting: [] for setting in settings}
        images: dict[Any, list[Image]] = {setting: [] for setting in settings}
        for number, setting in itertools.product(range(len(prompts)), settings):
            started = time.perf_counter()
            picture = next(model.draw([jobs[setting][number]]))
            times[setting].append(time.perf_counter() - started)
            images[setting].append(picture.image)
        rows += [
            {
                "engine": engine,
                "precision": model.setup.precision,
                "scheduler": scheduler or OWN,
                "steps": steps,
                "seconds": round(statistics.median(times[scheduler, steps]), 4),
                "score": round(statistics.fmean(score(images[scheduler, steps], prompts)), 5),
            }
            for scheduler, steps in settings
        ]
    return rows


def _check(config: BenchConfig) -> None:
    """Raise ConfigError for what would fail, or could not be written, after the rest was measured."""
    if find_spec("matplotlib") is None:
        raise ConfigError("The plot needs matplotlib; install with: pip install 'limner[eval]'.")
    artifacts.check_writable(config.out, "--out")
    from limner.generation import setup

    device = setup.choose_device(config.device)
    for precision, engine in _models(config):
        setup.choose(device, precision, engine=engine)


def _prompts(config: BenchConfig) -> Sequence[str]:
    """Those of the settings, or the first captions of the first photographs of the split that one chooses by.

    Raises DataError.
    """
    if config.data is None:
        return config.prompts
    from limner.data.dataset import read_split
    from limner.evaluation.contenders import photographs

    if not (found := photographs(read_split(config.data, "val"), config.n)):
        raise DataError(
            f"{config.data} has no captioned pictures in its val split; prepare it with --val-share above 0."
        )
    return [record.captions[0] for record in found]


def _own_clip(spec: Spec) -> tuple[str, Score]:
    """Cosines in the CLIP that lies in the model's folder. Raises ModelError where there is none."""
    if not (spec.folder / "clip").is_dir():
        raise ModelError(f"{spec.ref} has no clip folder to judge its pictures with; name a --judge.")
    from limner.evaluation.yardstick import Yardstick

    own = Yardstick.of(spec.ref, loading.load_clip(str(spec.folder)))

    def score(pictures: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        cosines: list[float] = (own.look(pictures) * own.text_features(prompts)).sum(dim=1).tolist()  # (N,)
        return cosines

    return "cosine of prompt and picture in the model's own CLIP", score


def _judge(ref: str, spec: Spec) -> tuple[str, Score]:
    """CLIPScores of a judge. Raises ModelError, and ConfigError where it is what the model reads its prompts with."""
    from limner.evaluation.agreement import clip_score
    from limner.evaluation.yardstick import Yardstick, refuse_conditioning

    judge = Yardstick.find(ref)
    if refuse_conditioning(judge, [spec.ref], allowed=True):
        raise ConfigError(f"The judge is the very CLIP that {spec.ref} reads its prompts with; name another --judge.")

    def score(pictures: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        scores: list[float] = clip_score(judge.text_features(prompts), judge.look(pictures)).tolist()  # (N,)
        return scores

    return f"CLIPScore by {judge.name}", score
