"""Every setting of every stage: one frozen model a stage, whose field docstrings are the `--help`.

A new knob goes here, not into a flag. `settings.py` puts a configuration together.
"""

from limner.config.base import Argument, Flag, StageConfig
from limner.config.stages import AssembleConfig, EncodeConfig, EvaluateConfig, GenerateConfig, PrepareConfig
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
    "GenerateConfig",
    "PrepareConfig",
    "StageConfig",
    "TrainClipConfig",
    "TrainConfig",
    "TrainDistillConfig",
    "TrainLoraConfig",
    "TrainUnetConfig",
    "TrainVaeConfig",
]
