"""Schedulers by name: what each stands for, which fit a model, and what is said where one doesn't."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch.testing import assert_close

from limner.config import GenerateConfig
from limner.diffusion import samplers, schedulers
from limner.errors import ConfigError
from limner.generation.engine import denoise, generators, initial_noise
from tiny import WIDTH, tiny_scheduler, tiny_unet

FLOW = schedulers.new("flow")
OF_FLOW = ["ddim", "ddpm", "euler_a", "euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc", "deis"]


def config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration as its file has it."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("euler_a", "euler_a"),
        ("Euler a", "euler_a"),
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("dpm++ 2m sde", "dpmpp_2m_sde"),
        (" DPMPP-2M ", "dpmpp_2m"),
        ("PLMS", "pndm"),
        ("UniPC", "unipc"),
    ],
)
def test_names_are_known_as_people_write_them(written: str, name: str) -> None:
    assert samplers.canonical(written) == name


@pytest.mark.parametrize(
    ("written", "near"), [("eulr", "euler"), ("dpmpp_sde", "dpmpp_2m_sde"), ("unipcc", "unipc"), ("karras", "")]
)
def test_a_name_that_is_none_gets_the_nearest_and_all(written: str, near: str) -> None:
    with pytest.raises(
        ConfigError, match=f"There is no scheduler '{written}'; .*{near}.*all are: ddim, ddpm, .*karras"
    ):
        samplers.canonical(written)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_what_a_file_leaves_to_defaults_is_no_choice_against_a_name(kind: str, name: str) -> None:
    cls = getattr(diffusers, kind)
    short = cls.from_config({"_class_name": kind, "beta_schedule": "scaled_linear"})
    one, other = (samplers.named(name, given).config for given in (short, cls.from_config(dict(cls().config))))
    settings = samplers.SAMPLERS[name].settings
    assert {key: one[key] for key in settings} == {key: other[key] for key in settings} == settings


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_the_label_of_a_configuration_is_that_of_its_name(name: str) -> None:
    sampler = samplers.SAMPLERS[name]
    made = samplers.named(name, tiny_scheduler("pndm"))
    assert samplers.label(None, config(made)) == samplers.label(name, {}) == sampler.label
    assert samplers.canonical(sampler.label) == name
    knows_zero_snr = "rescale_betas_zero_snr" in inspect.signature(type(made)).parameters
    assert (sampler.cls in samplers.ZERO_TERMINAL_SNR) == knows_zero_snr


def test_the_help_names_them_all() -> None:
    text = GenerateConfig.model_fields["scheduler"].description or ""
    words = set(text.replace(",", " ").replace(";", " ").split())
    assert {name for name in samplers.SAMPLERS if not name.endswith("_karras")} <= words


def test_labels_of_what_has_no_name() -> None:
    assert samplers.label(None, config(FLOW)) == "DPM++ 2M"
    assert samplers.label(None, config(schedulers.for_few_steps(FLOW))) == "Euler"
    assert samplers.label(None, config(tiny_scheduler("flow-match"))) == "FlowMatchEulerDiscrete"


# ---- which fit


def test_flow_models_take_those_that_can() -> None:
    assert samplers.fitting(config(FLOW)) == OF_FLOW
    assert samplers.fitting(config(tiny_scheduler("flow-match"))) == OF_FLOW
    with pytest.raises(
        ConfigError, match=f"heun can't draw .* predicts a flow; those that fit are {', '.join(OF_FLOW)}"
    ):
        samplers.named("heun", FLOW)


def test_zero_terminal_snr_is_kept_or_refused() -> None:
    given = schedulers.with_zero_terminal_snr(schedulers.new("v"))
    for name in samplers.SAMPLERS:
        if name in samplers.fitting(config(given)):
            made = samplers.named(name, given)
            assert made.config.rescale_betas_zero_snr, name
            assert made.config.timestep_spacing == "trailing", name
        else:
            with pytest.raises(
                ConfigError, match="predicts v_prediction from zero terminal SNR; those that fit are ddim"
            ):
                samplers.named(name, given)
    assert {"euler", "dpmpp_2m_karras", "ddim"} <= set(samplers.fitting(config(given)))


def test_what_is_not_known_keeps_its_own() -> None:
    given = diffusers.DDIMScheduler(prediction_type="sample")
    with pytest.raises(ConfigError, match="predicts sample; leave out --scheduler"):
        samplers.named("euler", given)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    with pytest.raises(ConfigError, match="lms_karras needs SciPy; install with: pip install scipy"):
        samplers.checked("lms_karras", {})
    assert samplers.checked("euler", {}) == "euler"


# ---- what they draw


def drawn(scheduler: Any, steps: int, seed: int = 0) -> torch.Tensor:
    """Latents of a tiny U-Net (1, 4, 8, 8)."""
    sources = generators([seed])
    states = torch.randn(1, 77, WIDTH, generator=torch.Generator().manual_seed(1))
    noise = initial_noise(sources, (4, 8, 8))
    return denoise(tiny_unet(), scheduler, noise, states, steps=steps, guidance=1, generators=sources)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("objective", ["eps", "flow"])
def test_every_name_draws_with_any_number_of_steps(objective: Any, steps: int) -> None:
    given = schedulers.new(objective)
    for name in samplers.fitting(config(given)):
        assert drawn(samplers.named(name, given), steps).isfinite().all(), name


def test_noise_of_a_scheduler_is_the_seed_s() -> None:
    for name in ("ddpm", "euler_a", "dpmpp_2m_sde"):
        made = samplers.named(name, FLOW)
        assert torch.equal(drawn(made, 4, 1), drawn(made, 4, 1))
        assert not torch.equal(drawn(made, 4, 1), drawn(samplers.named("euler", FLOW), 4, 1))


def test_the_paths_of_a_flow_are_euler_s() -> None:
    """Euler's method on dx/dt = v, from t = 1 to 0, with the network told whole timesteps as Diffusers does."""
    scheduler = samplers.named("euler", FLOW)
    scheduler.set_timesteps(6)
    states = torch.randn(1, 77, WIDTH, generator=torch.Generator().manual_seed(1))
    latents, unet = initial_noise([0], (4, 8, 8)), tiny_unet()
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            step = scheduler.sigmas[i + 1] - scheduler.sigmas[i]
            latents = latents + step * unet(latents, t, encoder_hidden_states=states).sample
    assert_close(drawn(scheduler, 6), latents, atol=1e-4, rtol=1e-4)
