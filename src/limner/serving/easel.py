"""The picture that the page shows of a job: what is done, what is being drawn, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from limner.serving import schemas
from limner.serving.schemas import JobView

EMPTY = '<div class="easel empty"><p>Your picture appears here.</p></div>'


@dataclass
class Clock:
    """Tells how long a job still takes, from the pace of the steps seen so far."""

    first: tuple[float, int] | None = None
    """When the first step was seen, and which one it was."""

    def left(self, job: JobView) -> float | None:
        """Seconds; None as long as nothing can be said."""
        if job.state != "running":
            return None
        now = time.monotonic()
        if self.first is None:
            self.first = now, job.step
        since, step = self.first
        return (now - since) / (job.step - step) * (job.steps - job.step) if job.step > step else None


@dataclass
class Easel:
    """A job as the page shows it while it is drawn."""

    clock: Clock = field(default_factory=Clock)
    preview: str | None = None
    """Of the picture that is being drawn: a JPEG in base64."""

    def show(self, job: JobView) -> str:
        """HTML: a place for each picture, side by side with their seeds, and how the job stands."""
        done = {image.number: image for image in job.images}
        prompt = escape(str(job.settings["prompt"]), quote=True)
        ended, n, best_of = job.finished is not None, int(job.settings.get("n", 1)), job.settings.get("best_of")
        places, preview = [], self.preview
        # Of the best of several it is only known at the end which they are, and in which order
        for number in done if best_of and ended else range(1 if best_of else n):
            image = done.get(number)
            if image is not None:
                inner = f'<a href="{image.url}" target="_blank"><img src="{image.url}" alt="{prompt}"></a>'
            elif ended:
                continue
            elif preview is not None:
                inner, preview = f'<img class="preview" src="data:image/jpeg;base64,{preview}" alt="Preview">', None
            else:
                inner = '<div class="blank"></div>'
            own = schemas.own(job.settings, number)
            caption = f"best {n} of {best_of}" if best_of and not ended else f"seed {own['seed']}"
            if own["variation"]:
                caption += f", variation {own['variation']}"
            places.append(f"<figure>{inner}<figcaption>{caption}</figcaption></figure>")
        bar = "" if ended else _bar(job)
        pictures = f'<div class="easel n{min(len(places), 4)}">{"".join(places)}</div>' if places else EMPTY
        return pictures + bar + f'<p class="status {job.state}" role="status">{escape(self.say(job))}</p>'

    def say(self, job: JobView) -> str:
        """How the job stands, in a sentence."""
        if job.state == "queued":
            before = job.place or 0
            return "Next in line." if not before else f"{before} {'job' if before == 1 else 'jobs'} before this one."
        if job.state == "running":
            left = self.clock.left(job)
            rest = "" if left is None else f", {duration(left)} left"
            return f"Step {job.step} of {job.steps}{rest}."
        if job.state == "done":
            took = job.finished - job.started if job.finished and job.started else 0
            return f"Drawn in {duration(took)}."
        return f"{job.error}" if job.state == "failed" else "Cancelled."


def refused(sentence: str) -> str:
    """HTML that says why nothing is drawn."""
    return EMPTY + f'<p class="status failed" role="alert">{escape(sentence)}</p>'


def _bar(job: JobView) -> str:
    return f'<progress max="{max(job.steps, 1)}" value="{job.step}" aria-label="Steps"></progress>'


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 5 s`, `2 h 4 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def facts(settings: Mapping[str, Any]) -> str:
    """HTML: the settings that a picture was drawn with."""
    named = {"Seed": settings["seed"], "Size": settings["size"]}
    shown = {
        "Model": "model",
        "Steps": "steps",
        "Guidance": "guidance",
        "Scheduler": "scheduler",
        "Variation": "variation",
    }
    named |= {label: settings[key] for label, key in shown.items() if settings.get(key) is not None}
    if settings.get("loras"):
        named["LoRA"] = ", ".join(settings["loras"])
    if settings.get("negative"):
        named["Without"] = settings["negative"]
    if settings.get("image"):
        named["Begun with"] = "a picture and a mask" if settings.get("mask") else "a picture"
    rows = "".join(f"<div><dt>{label}</dt> <dd>{escape(str(value))}</dd></div>" for label, value in named.items())
    return f'<p class="prompt">{escape(str(settings["prompt"]))}</p><dl class="facts">{rows}</dl>'
