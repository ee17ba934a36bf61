"""What people set on the page: a control for each setting of a job, and the request that they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from limner.diffusion.samplers import SAMPLERS, fitting
from limner.errors import ConfigError
from limner.generation import ranking
from limner.generation.jobs import Spec
from limner.serving.schemas import ImageView, JobRequest
from limner.serving.service import Service
from limner.serving.uploads import in_base64

PROMPT = "A golden retriever playing in a field."
AUTOMATIC = "automatic"

Update = dict[Any, Any]


class Controls:
    """The controls, made where Gradio is just making a page."""

    def __init__(self, service: Service) -> None:
        self.service = service
        most, specs = service.config, service.specs
        spec = self._spec("")
        row: dict[str, Any] = {"elem_classes": "numbers"}
        text: dict[str, Any] = {"lines": 1, "max_length": most.max_prompt}
        self.prompt = gr.Textbox(PROMPT, label="Prompt", max_lines=6, autofocus=True, elem_id="prompt", **text)
        with gr.Row(elem_id="go"):
            self.begin = gr.Button("Draw", variant="primary", elem_id="draw", scale=2, min_width=120)
            self.cancel = gr.Button("Cancel", interactive=False, elem_id="cancel", scale=1, min_width=90)
        with gr.Row(**row):
            self.n = gr.Number(1, label="Pictures", precision=0, minimum=1, maximum=most.max_count, min_width=90)
            self.seed = gr.Textbox("", label="Seed", placeholder="by lot", max_length=19, min_width=90, elem_id="seed")
        self.report = gr.HTML(self._report(next(iter(specs))), elem_id="report", apply_default_css=False)
        with gr.Accordion("More settings", open=False, elem_id="more"):
            self.model = gr.Dropdown(list(specs), value=next(iter(specs)), label="Model", visible=len(specs) > 1)
            self.negative = gr.Textbox("", label="Without", placeholder="what should not be seen", **text)
            with gr.Row(**row):
                self.steps = _number("Steps", 1, most.max_steps, spec.steps, precision=0)
                self.guidance = _number("Guidance", 1, 100, spec.guidance, step=0.5)
            with gr.Row(**row):
                self.size = gr.Dropdown(
                    _sizes(spec), value=AUTOMATIC, label="Size", allow_custom_value=True, min_width=120
                )
                self.scheduler = gr.Dropdown(_schedulers(spec), value="", label="Scheduler", min_width=120)
            with gr.Row(**row):
                self.best_of = _number("Best of", 0, most.max_count, None, precision=0, visible=_ranks(spec))
                self.loras = gr.Dropdown(
                    list(service.shelf.loras),
                    label="LoRA",
                    multiselect=True,
                    allow_custom_value=True,  # NAME:WEIGHT
                    visible=bool(service.shelf.loras),
                    min_width=120,
                    elem_id="loras",
                )
            with gr.Row(**row):
                self.guidance_rescale = _number("Guidance rescale", 0, 1, 0, step=0.1)
                self.variation = gr.Textbox(
                    "", label="Variation", placeholder="seed:strength", max_length=40, min_width=120
                )
        with gr.Accordion("Begin with a picture", open=False, elem_id="sources"):
            with gr.Row(**row):
                self.image = _picture("Picture", "image")
                self.mask = _picture("Mask: white is redrawn", "mask")
            self.strength = gr.Textbox(
                "", label="How much is new", placeholder="above 0, up to 1", max_length=10, elem_id="strength"
            )

    @property
    def fields(self) -> dict[str, Any]:
        """The control of each field of a JobRequest."""
        return {name: getattr(self, name) for name in JobRequest.model_fields}

    @property
    def by_model(self) -> list[Any]:
        """The controls that `of_model` sets."""
        return [self.report, self.best_of, self.steps, self.guidance, self.size, self.scheduler]

    def asked(self, values: Mapping[Any, Any]) -> JobRequest:
        """What the controls say, given their values. Raises ValidationError."""
        said = {name: values[control] for name, control in self.fields.items()}
        said = {name: value.strip() if isinstance(value, str) else value for name, value in said.items()}
        if said["size"] == AUTOMATIC:
            said["size"] = None
        for name in ("image", "mask"):
            if file := said[name]:  # in Gradio's folder, as it made sure
                said[name] = in_base64(Path(file).read_bytes())
        given = {name: value for name, value in said.items() if value}  # an empty number comes as 0
        return JobRequest.model_validate({"prompt": "", **given})

    def of_model(self, model: str) -> Update:
        """The settings that another model draws with when not told."""
        spec = self._spec(model)
        return {
            self.report: self._report(model),
            self.best_of: gr.update(visible=_ranks(spec), value=None),
            self.steps: spec.steps,
            self.guidance: spec.guidance,
            self.size: gr.update(choices=_sizes(spec), value=AUTOMATIC),
            self.scheduler: gr.update(choices=_schedulers(spec), value=""),
        }

    def of_picture(self, settings: Mapping[str, Any]) -> Update:
        """The settings of a picture; as they are they draw it again. Raises DataError where what it began with is gone.

        `settings` are `alone`'s.
        """
        updates = {control: settings.get(name) for name, control in self.fields.items()}
        model, spec, uploads = settings["model"], self._spec(settings["model"]), self.service.uploads
        return updates | {
            self.model: model if model in self.service.specs else next(iter(self.service.specs)),
            self.seed: str(settings["seed"]),
            self.size: gr.update(choices=_sizes(spec), value=settings["size"]),
            self.scheduler: gr.update(choices=_schedulers(spec), value=settings.get("scheduler") or ""),
            self.variation: settings.get("variation") or "",
            self.strength: str(settings.get("strength") or ""),
            self.loras: list(settings.get("loras", ())),
            self.image: uploads.read(image, mask=False)[1].image if (image := settings.get("image")) else None,
            self.mask: uploads.read(mask, mask=True)[1].image if (mask := settings.get("mask")) else None,
        }

    def alone(self, settings: Mapping[str, Any], image: ImageView) -> dict[str, Any]:
        """The settings of a job that draw one of its pictures alone, with those that were left to the model."""
        spec = self.service.specs.get(settings["model"])
        left = {name: settings[name] or getattr(spec, name, None) for name in ("steps", "guidance")} | {"best_of": None}
        own = {"n": 1, "size": f"{image.width}x{image.height}", "seed": image.seed, "variation": image.variation}
        return {**settings, **left, **own}

    def _report(self, model: str) -> str:
        """A link to the report of a model that has one."""
        url = self.service.report_url(model)
        return "" if url is None else f'<a href="{escape(url)}" target="_blank">How good {escape(model)} is</a>'

    def _spec(self, model: str) -> Spec:
        specs = self.service.specs
        return specs.get(model) or next(iter(specs.values()))


def _ranks(spec: Spec) -> bool:
    """Whether the model has what tells which picture is the best."""
    try:
        ranking.check(spec, 1, 1)
    except ConfigError:
        return False
    return True


def _number(label: str, least: float, most: float, value: float | None, **more: Any) -> gr.Number:
    return gr.Number(value, label=label, minimum=least, maximum=most, min_width=120, **more)


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label,
        type="filepath",
        image_mode=None,  # so that `Uploads` decodes it, within bounds, and not Gradio
        format="png",
        sources=["upload", "clipboard"],
        height=150,
        min_width=120,
        buttons=[],
        placeholder="Drop or choose a file",
        elem_id=name,
    )


def _sizes(spec: Spec) -> list[str]:
    """The model's own size, and one wider and one taller of about as many pixels."""
    if spec.size is None:
        return [AUTOMATIC]
    side, unit = (spec.size[0] * spec.size[1]) ** 0.5, spec.factor * 8  # as often as U-Nets halve, so that all fit
    long, short = (max(unit, round(side * ratio / unit) * unit) for ratio in (1.5**0.5, 1.5**-0.5))
    return list(dict.fromkeys([AUTOMATIC, "x".join(map(str, spec.size)), f"{long}x{short}", f"{short}x{long}"]))


def _schedulers(spec: Spec) -> list[tuple[str, str]]:
    """What a person reads, and the name, of each scheduler that fits the model."""
    fit = fitting(spec.scheduler) if spec.scheduler else []
    return [(AUTOMATIC, ""), *((SAMPLERS[name].label, name) for name in fit)]
