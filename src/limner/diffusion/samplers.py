"""Schedulers by the names that people know: which of Diffusers' classes each is, and which fit a model.

Only `named` loads Diffusers; the rest reads a scheduler's configuration alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from limner.errors import ConfigError

SOLVER = "DPMSolverMultistepScheduler"


@dataclass(frozen=True)
class Sampler:
    """What a name stands for."""

    label: str
    """What stable-diffusion-webui (A1111) calls it."""
    cls: str
    """Diffusers' class."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Its settings, beside what says how the model was trained."""
    flow: tuple[str, dict[str, Any]] | None = None
    """Class and settings of the same method for a flow model; None where Diffusers has none."""


def _solver(algorithm: str, order: int) -> dict[str, Any]:
    return {"algorithm_type": algorithm, "solver_order": order}


# First-order DPM-Solver++ is DDIM (Lu et al. 2211.01095, section 4), which for a straight path is Euler's method; with
# noise it is the ancestral step of Ho et al. (section 5). Both hold for flow models as well.
DETERMINISTIC = (SOLVER, _solver("dpmsolver++", 1))
ANCESTRAL = (SOLVER, _solver("sde-dpmsolver++", 1))
DPMPP_2M, DPMPP_2M_SDE = _solver("dpmsolver++", 2), _solver("sde-dpmsolver++", 2)
DPMPP_2S = _solver("dpmsolver++", 2)

PLAIN = {
    "ddim": Sampler("DDIM", "DDIMScheduler", flow=DETERMINISTIC),
    "ddpm": Sampler("DDPM", "DDPMScheduler", flow=ANCESTRAL),
    "pndm": Sampler("PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": Sampler("LCM", "LCMScheduler"),
}
WITH_KARRAS = {
    "euler": Sampler("Euler", "EulerDiscreteScheduler", flow=DETERMINISTIC),
    "heun": Sampler("Heun", "HeunDiscreteScheduler"),
    "lms": Sampler("LMS", "LMSDiscreteScheduler"),
    "dpm2": Sampler("DPM2", "KDPM2DiscreteScheduler"),
    "dpm2_a": Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler"),
    "dpmpp_2m": Sampler("DPM++ 2M", SOLVER, DPMPP_2M, (SOLVER, DPMPP_2M)),
    "dpmpp_2m_sde": Sampler("DPM++ 2M SDE", SOLVER, DPMPP_2M_SDE, (SOLVER, DPMPP_2M_SDE)),
    "dpmpp_2s": Sampler(
        "DPM++ 2S", "DPMSolverSinglestepScheduler", DPMPP_2S, ("DPMSolverSinglestepScheduler", DPMPP_2S)
    ),
    "unipc": Sampler("UniPC", "UniPCMultistepScheduler", flow=("UniPCMultistepScheduler", {})),
    "deis": Sampler("DEIS", "DEISMultistepScheduler", flow=("DEISMultistepScheduler", {})),
}
"""Those that are also there with the noise levels of Karras et al. 2206.00364, equation 5."""

SAMPLERS: dict[str, Sampler] = {
    **PLAIN,
    "euler_a": Sampler("Euler a", "EulerAncestralDiscreteScheduler", flow=ANCESTRAL),
    **WITH_KARRAS,
    **{
        f"{name}_karras": replace(
            sampler,
            label=f"{sampler.label} Karras",
            settings={**sampler.settings, "use_karras_sigmas": True},
            flow=None,  # those levels are of the training that eps and v models have
        )
        for name, sampler in WITH_KARRAS.items()
    },
}
"""Every name, with what it stands for."""

OF_THE_MODEL = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "use_flow_sigmas",
    "flow_shift",
    "_use_default_values",
)
"""What stays of a model's own configuration under any name; the last tells Diffusers which of it nobody chose."""

AS_IN_STABLE_DIFFUSION = {"steps_offset": 1, "clip_sample": False}
"""Diffusers' StableDiffusionPipeline overrides these settings of any scheduler that has them."""

ZERO_TERMINAL_SNR = {
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
    "UniPCMultistepScheduler",
    SOLVER,
}
"""Classes that can begin at pure noise where a model was trained to."""


def canonical(name: str) -> str:
    """A name as the table has it; A1111's way to write it will do: `DPM++ 2M Karras` is `dpmpp_2m_karras`.

    Raises ConfigError, which names the nearest, where there is none.
    """
    plain = re.sub(r"[\s_-]+", "_", name.strip().lower().replace("++", "pp"))
    labels = {sampler.label.lower(): known for known, sampler in SAMPLERS.items()}
    found = labels.get(name.strip().lower(), plain)
    if found in SAMPLERS:
        return found
    near = [f"the nearest is {match}, and" for match in get_close_matches(plain, SAMPLERS, n=1)]
    raise ConfigError(f"There is no scheduler {name!r}; {' '.join([*near, 'all are:'])} {', '.join(SAMPLERS)}.")


def fitting(config: Mapping[str, Any]) -> list[str]:
    """The names that can draw with the model whose scheduler has this configuration."""
    if _is_flow(config):
        return [name for name, sampler in SAMPLERS.items() if sampler.flow]
    if config.get("prediction_type", "epsilon") not in {"epsilon", "v_prediction"}:
        return []
    if config.get("rescale_betas_zero_snr"):
        return [name for name, sampler in SAMPLERS.items() if sampler.cls in ZERO_TERMINAL_SNR]
    return list(SAMPLERS)


def checked(name: str, config: Mapping[str, Any]) -> str:
    """The name as the table has it. Raises ConfigError where there is none, or where it doesn't fit the model whose
    scheduler has this configuration; or where it needs a package that is not there.
    """
    found = canonical(name)
    fit = fitting(config)
    if found not in fit:
        what = "a flow" if _is_flow(config) else str(config.get("prediction_type", "epsilon"))
        if config.get("rescale_betas_zero_snr"):
            what += " from zero terminal SNR"
        those = f"those that fit are {', '.join(fit)}" if fit else "leave out --scheduler"
        raise ConfigError(f"The scheduler {found} can't draw with this model, which predicts {what}; {those}.")
    if SAMPLERS[found].cls == "LMSDiscreteScheduler" and find_spec("scipy") is None:
        raise ConfigError(f"The scheduler {found} needs SciPy; install with: pip install scipy.")
    return found


def named(name: str, given: Any) -> Any:
    """The scheduler of that name for the model that `given`, Diffusers' scheduler, belongs to.

    It keeps what says how the model was trained, as `from_config` does. Raises ConfigError as `checked`.
    """
    import diffusers

    config = {**given.config, "_class_name": type(given).__name__}
    sampler = SAMPLERS[checked(name, config)]
    kept = {key: config[key] for key in OF_THE_MODEL if key in config}
    cls, settings = sampler.cls, sampler.settings
    if _is_flow(config):
        assert sampler.flow is not None
        cls, settings = sampler.flow
        shift = config.get("flow_shift", config.get("shift", 1.0))
        kept = {"num_train_timesteps": config["num_train_timesteps"], "flow_shift": shift}
        settings = settings | {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    # By name, as Diffusers passes over what of a configuration its file left to defaults
    return as_in_stable_diffusion(getattr(diffusers, cls).from_config(kept, **settings))


def as_in_stable_diffusion(scheduler: Any) -> Any:
    """The same scheduler, with the settings that Diffusers' StableDiffusionPipeline overrides."""
    scheduler.register_to_config(**{k: v for k, v in AS_IN_STABLE_DIFFUSION.items() if k in scheduler.config})
    return scheduler


def label(name: str | None, config: Mapping[str, Any]) -> str:
    """What A1111 calls the scheduler of this name, or without a name the one of this configuration."""
    if name is not None:
        return SAMPLERS[name].label
    cls = str(config.get("_class_name"))
    for sampler in reversed(SAMPLERS.values()):  # those with most settings first
        own = sampler.flow if _is_flow(config) else (sampler.cls, sampler.settings)
        if own and own[0] == cls and all(config.get(key) == value for key, value in own[1].items()):
            return sampler.label
    return cls.removesuffix("Scheduler")


def _is_flow(config: Mapping[str, Any]) -> bool:
    """FlowMatch schedulers know no other and don't name it."""
    return config.get("prediction_type") == "flow_prediction" or str(config.get("_class_name")).startswith("FlowMatch")
