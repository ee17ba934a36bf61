"""With each scheduler, our U-Net sees and answers what it does in Diffusers' StableDiffusionPipeline, to the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.testing import assert_close

from libraries import load_with_libraries
from limner.diffusion import samplers
from limner.generation.model import Model
from limner.generation.painters import LatentDiffusion
from limner.models import loading
from tiny import tiny_model

MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
KARRAS = {"use_karras_sigmas": True}
EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": (MULTI, {}),
    "dpmpp_2m_sde": (MULTI, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2s": (SINGLE, {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}
"""What the documentation of Diffusers names for each, with the settings that it names."""

OF_FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": (MULTI, {"solver_order": 1}),
    "ddpm": (MULTI, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
    "euler": (MULTI, {"solver_order": 1}),
    "euler_a": (MULTI, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
    **{name: EXPECTED[name] for name in ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc", "deis")},
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "eps": {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "skip_prk_steps": True},  # as SD 1.5's
    "v": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"},
    "zero-snr": {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "karras": {"_class_name": MULTI, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    "flow": {"_class_name": MULTI, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0},
}


def expected(objective: str, name: str) -> tuple[str, dict[str, Any]]:
    """Class and settings of a name for a model that predicts so."""
    table = OF_FLOW if objective == "flow" else EXPECTED
    plain = {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False} if objective == "karras" else {}
    base = name.removesuffix("_karras")
    cls, settings = table[base]
    return cls, plain | settings | (KARRAS if base != name else {})


def names(objective: str) -> list[str]:
    """What is compared: everything for eps and flow; for the others what differs there."""
    fit = samplers.fitting(CONFIGURATIONS[objective])
    if objective == "karras":
        return ["ddim", "euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_karras", "unipc"]
    return fit if objective in {"eps", "flow"} else [name for name in fit if not name.endswith("_karras")]


CASES = [(objective, name) for objective in CONFIGURATIONS for name in names(objective)]

Passes = list[tuple[Tensor, float, Tensor]]
"""What went into a network, the timestep that a U-Net was told, and what came out, at each pass."""


@contextmanager
def watched(painter: LatentDiffusion) -> Iterator[Passes]:
    """The passes of the U-Net, and then that of the VAE's first layer, which the latents drawn go into."""
    passes: Passes = []

    def note(_: Any, given: tuple[Any, ...], answer: Any) -> None:
        passes.append((given[0].clone(), float(given[1]) if len(given) > 1 else -1.0, answer[0].clone()))

    hooks = [network.register_forward_hook(note) for network in (painter.unet, painter.vae.post_quant_conv)]
    yield passes
    for hook in hooks:
        hook.remove()


def compare(model: Model, scheduler: Any, settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Draw at the same noise with our `settings`, and with that scheduler and these `options` of the pipeline."""
    painter = model.painter
    assert isinstance(painter, LatentDiffusion)
    with watched(painter) as ours:
        model("A brown dog.", seed=3, steps=5, guidance=4.0, negative="snow", **settings)
    pipeline = StableDiffusionPipeline(
        painter.vae, painter.text_encoder, painter.tokenizer, painter.unet, scheduler, None, None, None, False
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(3)]
    arguments = {"num_inference_steps": 5, "guidance_scale": 4.0, "negative_prompt": "snow", "output_type": "np"}
    with watched(painter) as theirs:
        pipeline("A brown dog.", generator=generator, **arguments, **options)
    assert len(ours) == len(theirs) >= 5
    for mine, other in zip(ours, theirs):
        assert mine[1] == other[1]
        assert_close(mine[0], other[0], atol=1e-5, rtol=0)
        assert_close(mine[2], other[2], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A model for each kind of scheduler that may lie in a folder, whose U-Net is left whole.

    What is compared is the loop and the schedulers; test_staged.py has the U-Net taken apart, which rounds otherwise.
    """
    made = {}
    for name, config in CONFIGURATIONS.items():
        folder = tiny_model(tmp_path_factory.mktemp("models") / name)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        made[name] = load_with_libraries(folder)
        made[name].painter.taken_apart = None  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(("objective", "name"), CASES, ids=[" ".join(case) for case in CASES])
def test_all_passes_are_those_of_diffusers(models: dict[str, Model], objective: str, name: str) -> None:
    cls, settings = expected(objective, name)
    given = loading.load_scheduler(str(models[objective].spec.folder)).config
    compare(models[objective], getattr(diffusers, cls).from_config(given, **settings), {"scheduler": name}, {})


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(models: dict[str, Model], rescale: float) -> None:
    scheduler = loading.load_scheduler(str(models["v"].spec.folder))
    compare(models["v"], scheduler, {"guidance_rescale": rescale}, {"guidance_rescale": rescale})
    with pytest.raises(AssertionError):
        compare(models["v"], scheduler, {"guidance_rescale": rescale}, {})
