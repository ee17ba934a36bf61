"""limner evaluate: figures on what models draw, with the photographs and the pictures beside them."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch

from limner import __version__, artifacts, settings
from limner.config import EvaluateConfig
from limner.data.dataset import Record, read_split, split_identity
from limner.data.findings import json_line
from limner.errors import ConfigError, DataError, RunError
from limner.evaluation import attributes, drawing, parts, report, scores, sweeps, trajectory
from limner.evaluation.agreement import CANDIDATES
from limner.evaluation.assessment import Assessment, Result
from limner.evaluation.contenders import LEAST, Contender, from_folder, labels, photographs
from limner.evaluation.extractors import Extractor, load_extractor
from limner.evaluation.intervals import Difference
from limner.evaluation.kinds import GLANCE, KINDS, by_name
from limner.evaluation.scores import Figures
from limner.evaluation.yardstick import Yardstick, extractor_facts, refuse_conditioning
from limner.generation import provenance
from limner.generation.jobs import Job, Spec, make_jobs, read_spec
from limner.generation.language import literal
from limner.generation.model import Model
from limner.generation.provenance import slug
from limner.models import loading

log = logging.getLogger(__name__)

METRICS, SCORES, PICTURES, CHECKPOINTS = "metrics.json", "scores.jsonl", "pictures", "checkpoints"
RESULTS = (METRICS, SCORES, report.PAGE)
MISSION, ATTRIBUTES = "mission", "attributes"  # within a contender's folder, beside the pictures for the captions
NO_JUDGE = (
    "There is no judge, so fidelity, alignment, prompt sensitivity and copies by features are left out; make one with "
    "`python recipes/judge.py --data DATASET --out FOLDER` and name that folder as --judge."
)


@dataclass(frozen=True)
class Entry:
    """A model and how it is to draw; None leaves a setting to the model."""

    label: str
    spec: Spec
    steps: int | None
    guidance: float | None
    settings: dict[str, float]
    """What it differs in from others, for the plots."""
    folder: Path

    def jobs(
        self, prompts: Sequence[str], seeds: Sequence[int], names: Sequence[str], within: str = ""
    ) -> dict[Path, Job]:
        """What to draw, by the file that it belongs into."""
        made = make_jobs(self.spec, [literal(prompt) for prompt in prompts], steps=self.steps, guidance=self.guidance)
        files = [self.folder / within / f"{name}.png" for name in names]
        return {file: replace(job, seed=seed) for file, job, seed in zip(files, made, seeds, strict=True)}


def run(config: EvaluateConfig) -> Path:
    """Draw what is not there yet, score it, and write metrics.json, scores.jsonl and report.html. -> the folder.

    Raises ConfigError, DataError or ModelError in one sentence, before anything is drawn where that can be told, and
    RunError where another process is at work in the folder.
    """
    _require_report()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with ExitStack() as work:
        asked = config
        if config.checkpoints:
            config = _with_checkpoints(config, work)
        real, entries, folders = _read(config)
        yardstick, further, conditioned = _judges(config, entries)
        if yardstick is None:
            log.warning(NO_JUDGE)
        _open(asked, work)
        assessment = _assessment(config, yardstick, further)
        extra = [
            figures
            for _, alike in groupby(entries, key=lambda entry: entry.spec.ref)
            for figures in _draw_all(config, list(alike), real, yardstick)
        ]
        contenders = [_drawn(entry, real) for entry in entries] + folders
        results = []
        for number, contender in enumerate(contenders):
            for remark in contender.remarks:
                log.warning("%s: %s", contender.label, remark)
            result = assessment.judge(contender)
            if number < len(entries):
                result.conditioned = entries[number].spec.ref in conditioned
                result.figures |= extra[number] | _sensitivity(config, entries[number], yardstick)
            results.append(result)
        comparisons = [(results[0], other, assessment.compare(other, results[0])) for other in results[1:]]
        missions = [
            (prompt, [(entry.label, entry.folder / MISSION / f"{number}.png") for entry in entries])
            for number, prompt in enumerate(settings.MISSION, start=1)
            if entries
        ]
        _write(config, assessment, results, comparisons, missions)
        return config.out


def _with_checkpoints(config: EvaluateConfig, work: ExitStack) -> EvaluateConfig:
    """The same with the models that a training went through, which are written into the folder."""
    (ref,) = config.models
    found = trajectory.find(Path(ref))
    _open(config, work)
    folders = trajectory.assemble(Path(ref), found, config.out / CHECKPOINTS)
    models = {"models": tuple(map(str, folders.values())), "x": tuple(map(float, folders)), "x_name": "images seen"}
    return config.model_copy(update={**models, "checkpoints": False})


def plan(config: EvaluateConfig) -> dict[str, Any]:
    """What `run` would draw and score; nothing is written. Raises as `run` does."""
    _require_report()
    _is_ours(config)
    if config.checkpoints:
        (ref,) = config.models
        found = ", ".join(f"{images:,}" for images in trajectory.find(Path(ref)))
        return {"to be drawn": f"the checkpoints of {ref} after {found} images", "out": config.out}
    real, entries, folders = _read(config)
    _judges(config, entries)
    prompts = len(real) + len(settings.MISSION) + config.attribute_seeds * len(attributes.PROMPTS)
    return {
        "captions": f"{len(real)} of {config.split} in {config.data}",
        "to be drawn": ", ".join(entry.label for entry in entries) or "nothing",
        "pictures": f"{prompts * len(entries)} ({prompts} each)",
        "given": ", ".join(f"{one.label} ({len(one.records)} pictures)" for one in folders) or "nothing",
        "judge": config.judge or NO_JUDGE,
        "out": config.out,
    }


def _require_report() -> None:
    for name in ("jinja2", "matplotlib"):
        if find_spec(name) is None:
            raise ConfigError(f"The report needs {name}; install with: pip install 'limner[eval]'.")


def _read(config: EvaluateConfig) -> tuple[list[Record], list[Entry], list[Contender]]:
    """The photographs with their captions, what is to be drawn, and the folders of pictures that are given."""
    split = read_split(config.data, config.split)
    real = photographs(split, config.n)
    if len(real) < LEAST:
        raise DataError(f"{config.data} has {len(real)} captioned pictures in {config.split}; {LEAST} are the least.")
    refs = [*config.models, *map(str, config.images)]
    names = labels(refs)
    entries: list[Entry] = []
    for number, (ref, name) in enumerate(zip(config.models, names)):
        spec = read_spec(ref)
        x = {config.x_name: config.x[number]} if config.x else {}
        for steps, guidance in dict.fromkeys(product(config.steps or (None,), config.guidance or (None,))):
            make_jobs(spec, settings.MISSION, steps=steps, guidance=guidance)  # which refuses what can't be drawn
            entry = _entry(config, name, spec, steps, guidance, x)
            entries.append(_apart(entry, [other.folder for other in entries]))
    others = {record.path.stem for record in split}
    folders = [from_folder(path, name, real, others) for path, name in zip(config.images, names[len(config.models) :])]
    return real, entries, folders


def _judges(config: EvaluateConfig, entries: Sequence[Entry]) -> tuple[Yardstick | None, Sequence[Extractor], set[str]]:
    """The judge, if there is one, further extractors, and those of the models that the judge itself conditions."""
    yardstick = None if config.judge is None else Yardstick.find(config.judge)
    conditioned: set[str] = set()
    if yardstick is not None:
        refs = list(dict.fromkeys(entry.spec.ref for entry in entries))
        conditioned = refuse_conditioning(yardstick, refs, allowed=config.allow_conditioning_judge)
    further = [load_extractor(spec) for spec in config.extractors]
    if len({extractor.name for extractor in further}) < len(further):
        raise ConfigError(f"Two of {', '.join(config.extractors)} have one name, and so would their figures; name one.")
    return yardstick, further, conditioned


def _entry(
    config: EvaluateConfig, name: str, spec: Spec, steps: int | None, guidance: float | None, x: dict[str, float]
) -> Entry:
    told = [f"{steps} step{'s' * (steps > 1)}"] if steps is not None and len(config.steps) > 1 else []
    told += [f"guidance {guidance:g}"] if guidance is not None and len(config.guidance) > 1 else []
    varied = {"steps": steps, "guidance": guidance}
    known = {key: float(value) for key, value in varied.items() if value is not None}
    label = ", ".join([name, *told])
    return Entry(label, spec, steps, guidance, known | x, config.out / PICTURES / slug(label))


def _apart(entry: Entry, taken: Sequence[Path]) -> Entry:
    """The same in a folder of its own: names that differ in capitals or signs alone fall together."""
    own = [entry.folder, *(entry.folder.with_name(f"{entry.folder.name}-{n}") for n in range(2, len(taken) + 2))]
    return replace(entry, folder=next(folder for folder in own if folder not in taken))


def _is_ours(config: EvaluateConfig) -> bool:
    """Whether the folder is an evaluation's already. Raises RunError where it is something else."""
    file = config.out / "config.json"
    is_ours = file.is_file() and artifacts.read_json(file).keys() >= {"models", "images", "judge"}
    if not is_ours and config.out.is_dir() and not artifacts.is_empty(config.out):
        raise RunError(f"{config.out} exists and holds no evaluation; choose another --out.")
    return is_ours


def _open(config: EvaluateConfig, work: ExitStack) -> None:
    """Make the folder an evaluation's, or come back to one, and lock it for as long as `work` goes on.

    Raises RunError where it is something else, or another process is at work in it.
    """
    _is_ours(config)  # before a lock is written into it
    work.enter_context(artifacts.alone(config.out))
    file = config.out / "config.json"
    said = json.loads(config.model_dump_json())
    if _is_ours(config) and artifacts.read_json(file) | {"out": said["out"]} != said:  # it may have been moved
        for name in RESULTS:  # of other settings, should this end before it has its own
            (config.out / name).unlink(missing_ok=True)
    artifacts.write_json(file, said)


def _draw_all(
    config: EvaluateConfig, entries: Sequence[Entry], real: Sequence[Record], yardstick: Yardstick | None
) -> list[dict[str, Figures]]:
    """Draw the pictures of entries of one model, and tell what each cost; with the first also what its parts do, which
    doesn't depend on how it draws."""
    gc.collect()  # the model before, which otherwise stays beside this one for a while
    model = Model(entries[0].spec, config.device, engine=config.engine)
    figures = [_draw(config, model, entry, real) for entry in entries]
    figures[0] |= _parts(config, model, real, yardstick)
    return figures


def _draw(config: EvaluateConfig, model: Model, entry: Entry, real: Sequence[Record]) -> dict[str, Figures]:
    seeds = range(config.seed, config.seed + len(real))
    jobs = entry.jobs([record.captions[0] for record in real], seeds, [record.path.stem for record in real])
    jobs |= entry.jobs(settings.MISSION, [config.seed] * 2, ["1", "2"], MISSION)
    prompts = [prompt for prompt in attributes.PROMPTS for _ in range(config.attribute_seeds)]
    own_seeds = [config.seed + i for _ in attributes.PROMPTS for i in range(config.attribute_seeds)]
    jobs |= entry.jobs(prompts, own_seeds, [file.stem for file in _attribute_files(config, entry)], ATTRIBUTES)
    drawing.draw(model, jobs, entry.folder, batch_size=config.batch_size)
    return {"cost": parts.cost_figures(drawing.cost(entry.folder))}


def _parts(
    config: EvaluateConfig, model: Model, real: Sequence[Record], yardstick: Yardstick | None
) -> dict[str, Figures]:
    """Figures of the VAE and the CLIP of a model, where it has such."""
    spec, paths = model.spec, [record.path for record in real]
    if not spec.own_loop or spec.size is None:
        return {}
    extractor = None if yardstick is None else yardstick.extractor
    captioned = {record.path: record for record in read_split(config.data, config.split)}
    found = {
        "vae": parts.vae_figures(
            loading.load_vae(str(spec.folder)).to(model.device), min(spec.size), paths, extractor, config.batch_size
        ),
        "clip": parts.clip_figures(spec.ref, [captioned[path] for path in paths]),
    }
    return {section: figures for section, figures in found.items() if figures}


def _attribute_files(config: EvaluateConfig, entry: Entry) -> list[Path]:
    """Where the pictures of the prompt-sensitivity test lie, prompt by prompt."""
    names = [f"{slug(prompt)}-{i}" for prompt in attributes.PROMPTS for i in range(config.attribute_seeds)]
    return [entry.folder / ATTRIBUTES / f"{name}.png" for name in names]


def _sensitivity(config: EvaluateConfig, entry: Entry, yardstick: Yardstick | None) -> dict[str, Figures]:
    if yardstick is None or not config.attribute_seeds:
        return {}
    how = {"batch_size": config.batch_size, "cache": _cache(config)}
    return {"attributes": scores.sensitivity(yardstick, _attribute_files(config, entry), **how)}


def _drawn(entry: Entry, real: Sequence[Record]) -> Contender:
    """The pictures that an entry drew for the captions."""
    records = [Record(entry.folder / f"{record.path.stem}.png", record.captions) for record in real]
    first = provenance.read(records[0].path)
    facts = {name: first[name] for name in ("steps", "guidance", "width", "height", "device")}
    facts |= {"model": first["model"]["ref"], "sha256": first["model"]["sha256"]}
    return Contender(entry.label, records, facts, {"steps": first["steps"], **entry.settings})


def _cache(config: EvaluateConfig) -> Path:
    return config.cache or config.out / "features"


def _assessment(config: EvaluateConfig, yardstick: Yardstick | None, further: Sequence[Extractor]) -> Assessment:
    split, train = read_split(config.data, config.split), [one.path for one in read_split(config.data, "train")]
    how: dict[str, Any] = {"copies": config.copies, "batch_size": config.batch_size, "cache": _cache(config)}
    return Assessment(split, config.n, train, yardstick, further, **how)


def _write(
    config: EvaluateConfig,
    assessment: Assessment,
    results: Sequence[Result],
    comparisons: Sequence[tuple[Result, Result, Mapping[str, Difference]]],
    missions: Sequence[report.Mission],
) -> None:
    """Write the figures, the numbers of each picture, the plots and the page."""
    yardstick, real = assessment.yardstick, assessment.photographs
    facts = artifacts.read_json(config.data / "dataset.json")
    metrics: dict[str, Any] = {
        "limner": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"limner evaluate --config {config.out / 'config.json'}",
        "data": {
            "name": facts["name"],
            "folder": str(config.data),
            "split": config.split,
            "sha256": split_identity(config.data, config.split),
            "captions": len(real.contender.records),
            "candidates": min(CANDIDATES, len(set(assessment.rivals))),
        },
        "seeds": [config.seed, config.seed + len(real.contender.records) - 1],
        "judge": None if yardstick is None else yardstick.facts(),
        "extractors": [extractor_facts(extractor) for extractor in assessment.further],
        "left_out": [NO_JUDGE] if yardstick is None else [],
        "hardware": artifacts.hardware(),
        "copies": {name: training.baseline() for name, (_, training) in assessment.ways.items()},
        "photographs": _row(real),
        "contenders": [_row(result) for result in results],
        "comparisons": [
            {"one": other.contender.label, "other": first.contender.label, "figures": scores.as_json(found)}
            for first, other, found in comparisons
            if found
        ],
    }
    artifacts.write_json(config.out / METRICS, metrics)
    artifacts.write_text(config.out / SCORES, "".join(_score_lines([real, *results])))
    sweeps.plot(metrics["contenders"], config.out, config.x_name if config.x else None)
    report.write(config.out, metrics, results, missions)
    for result in results:
        print(_summary(result))
    print(config.out / report.PAGE)


def _row(result: Result) -> dict[str, Any]:
    one = result.contender
    return {
        "label": one.label,
        **one.facts,
        "settings": one.settings,
        "pictures": len(one.records),
        "skipped": [finding.row() for finding in one.skipped],
        "remarks": list(one.remarks),
        "judge_is_condition": result.conditioned,
        "figures": {section: scores.as_json(figures) for section, figures in result.figures.items()},
    }


def _score_lines(results: Sequence[Result]) -> list[str]:
    lines = []
    for result in results:
        values = {} if result.seen is None else result.seen.values
        for number, record in enumerate(result.contender.records):
            row = {"contender": result.contender.label, "file": str(record.path), "caption": record.captions[0]}
            lines.append(json_line(row | {name: value[number].item() for name, value in values.items()}))
    return lines


def _summary(result: Result) -> str:
    found = by_name(result.figures)
    told = [f"{KINDS[name].title} {KINDS[name].shown(found[name].value)}" for name in GLANCE if name in found]
    return f"{result.contender.label}: {', '.join(told) or 'no figure'}"
