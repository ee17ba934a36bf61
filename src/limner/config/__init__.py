"""Every setting of every stage: one frozen model a stage, whose field docstrings are the `--help`.

A new knob goes here, not into a flag. `settings.py` puts a configuration together.
"""

from limner.config.base import Argument, Flag, StageConfig
from limner.config.stages import (
    AssembleConfig,
    EncodeConfig,
    EvaluateConfig,
    Format,
    GenerateConfig,
    PrepareConfig,
    ReplayConfig,
)
from limner.config.training import (
    TrainClipConfig,
    TrainConfig,
    TrainDistillConfig,
    TrainLoraConfig,
    TrainUnetConfig,
    TrainVaeConfig,
)

__all__ = [
    "Argument",
    "AssembleConfig",
    "EncodeConfig",
    "EvaluateConfig",
    "Flag",
    "Format",
    "GenerateConfig",
    "PrepareConfig",
    "ReplayConfig",
    "StageConfig",
    "TrainClipConfig",
    "TrainConfig",
    "TrainDistillConfig",
    "TrainLoraConfig",
    "TrainUnetConfig",
    "TrainVaeConfig",
]
