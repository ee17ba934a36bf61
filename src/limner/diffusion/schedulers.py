"""Diffusers' schedulers: a new one for an objective, and the objective of a given one."""

from __future__ import annotations

from typing import Any

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

    prediction_type = next(name for name, known in PREDICTION_TYPES.items() if known == objective)
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        use_flow_sigmas=objective == "flow",
        steps_offset=1,
    )


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


def for_few_steps(scheduler: Any) -> Any:
    """DDIM for a student of the U-Net beside this scheduler, with the same noise schedule, as plain Diffusers has it.

    First-order DPM-Solver++ is DDIM (Lu et al. 2211.01095, section 4). Its steps begin at pure noise and end at data,
    and the levels of more steps contain those of fewer. Raises ModelError as `objective_of`.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    objective = objective_of(scheduler)
    prediction_type = next(name for name, known in PREDICTION_TYPES.items() if known == objective)
    schedule = {name: scheduler.config[name] for name in SCHEDULE if name in scheduler.config}
    return DPMSolverMultistepScheduler(
        **schedule,
        num_train_timesteps=TIMESTEPS,
        prediction_type=prediction_type,
        use_flow_sigmas=objective == "flow",
        flow_shift=scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0)),
        solver_order=1,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
