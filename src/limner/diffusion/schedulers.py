"""Diffusers' schedulers: a new one for an objective, and the objective of a given one."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from limner.diffusion import objectives
from limner.diffusion.distillation import data_of
from limner.diffusion.objectives import TIMESTEPS, Objective
from limner.errors import ModelError

PREDICTION_TYPES: dict[str, Objective] = {"flow_prediction": "flow", "epsilon": "eps", "v_prediction": "v"}
"""Diffusers' names for the objectives."""
SCHEDULE = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
"""Settings of a scheduler that say at which noise levels a U-Net was trained."""


def new(objective: Objective) -> Any:
    """DPM-Solver++ of second order (Lu et al. 2211.01095) for a U-Net of this objective.

    eps and v take Stable Diffusion's noise schedule.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        **_predicting(objective),
        steps_offset=1,
    )


def with_zero_terminal_snr(scheduler: Any) -> Any:
    """The same scheduler, rescaled to end in pure noise and to sample from there.

    Its betas become those of Lin et al. 2305.08891, algorithm 1, and its timesteps are spaced as "trailing" in their
    table 2. Raises ModelError where its U-Net predicts something else than v, which alone says something about pure
    noise (section 3.2), or where its class does not know how.
    """
    name, objective = type(scheduler).__name__, objective_of(scheduler)
    if objective != "v":
        raise ModelError(
            f"zero_terminal_snr is for U-Nets that predict v, and this one predicts {objective}; leave it out."
        )
    if not {"rescale_betas_zero_snr", "timestep_spacing"} <= inspect.signature(type(scheduler)).parameters.keys():
        raise ModelError(
            f"A {name} can't sample from zero terminal SNR; put a DDIMScheduler's or DPMSolverMultistepScheduler's "
            "configuration beside the U-Net, or leave out zero_terminal_snr."
        )
    return type(scheduler).from_config(scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")


def objective_of(scheduler: Any) -> Objective:
    """What the U-Net beside this scheduler predicts. Raises ModelError where Limner can't train that."""
    if type(scheduler).__name__.startswith("FlowMatch"):  # those know no other, and don't name it
        return "flow"
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    objective = PREDICTION_TYPES.get(prediction_type)
    if objective is None or (objective != "flow" and not hasattr(scheduler, "betas")):
        name = type(scheduler).__name__
        raise ModelError(
            f"Limner can't train a U-Net with a {name} that predicts {prediction_type}; choose another model."
        )
    return objective


def x0_of(scheduler: Any, given: Tensor, predicted: Tensor, timestep: Tensor) -> Tensor:
    """The data that a U-Net sees in noised latents, whatever it predicts.

    given (N, C, h, w) as `scale_model_input` makes it, predicted (N, C, h, w), timestep () -> (N, C, h, w). As all
    schedulers give a U-Net what it was trained on, the noise level follows from the timestep alone.
    """
    if scheduler.config.get("prediction_type") == "sample":
        return predicted
    objective = objective_of(scheduler)
    nearest = 0 if objective == "flow" else 0.5  # the middle of a step's share, so that rounding finds it again
    t = (timestep.reshape(1).to(given) + nearest) / TIMESTEPS  # (1,)
    betas = None if objective == "flow" else scheduler.betas.to(given.device)
    return data_of(objective, predicted, given, objectives.level(objective, t, betas))


def for_few_steps(scheduler: Any) -> Any:
    """DDIM for a student of the U-Net beside this scheduler, with the same noise schedule, as plain Diffusers has it.

    First-order DPM-Solver++ is DDIM (Lu et al. 2211.01095, section 4). Its steps begin at pure noise and end at data,
    and the levels of more steps contain those of fewer. Raises ModelError as `objective_of`.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    objective = objective_of(scheduler)
    schedule = {name: scheduler.config[name] for name in SCHEDULE if name in scheduler.config}
    return DPMSolverMultistepScheduler(
        **schedule,
        num_train_timesteps=TIMESTEPS,
        **_predicting(objective),
        flow_shift=scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0)),
        solver_order=1,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )


def _predicting(objective: Objective) -> dict[str, Any]:
    """Settings of a DPMSolverMultistepScheduler for a U-Net of this objective."""
    prediction_type = next(name for name, known in PREDICTION_TYPES.items() if known == objective)
    return {"prediction_type": prediction_type, "use_flow_sigmas": objective == "flow"}
