"""Every setting of every stage: one frozen model a stage, whose field docstrings are the `--help`.

A new knob goes here, not into a flag. `settings.py` puts a configuration together.
"""

from limner.config.base import Argument, CommandConfig, Flag, StageConfig
from limner.config.machine import (
    BenchConfig,
    DoctorConfig,
    ExportConfig,
    ListModelsConfig,
    PullModelConfig,
    ShowModelConfig,
)
from limner.config.serving import ServeConfig, TokenConfig
from limner.config.stages import (
    AssembleConfig,
    EncodeConfig,
    Engine,
    EvaluateConfig,
    Format,
    GenerateConfig,
    Precision,
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
    "BenchConfig",
    "CommandConfig",
    "DoctorConfig",
    "EncodeConfig",
    "Engine",
    "EvaluateConfig",
    "ExportConfig",
    "Flag",
    "Format",
    "GenerateConfig",
    "ListModelsConfig",
    "Precision",
    "PrepareConfig",
    "PullModelConfig",
    "ReplayConfig",
    "ServeConfig",
    "ShowModelConfig",
    "StageConfig",
    "TokenConfig",
    "TrainClipConfig",
    "TrainConfig",
    "TrainDistillConfig",
    "TrainLoraConfig",
    "TrainUnetConfig",
    "TrainVaeConfig",
]
