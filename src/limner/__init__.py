"""Limner turns captions into pictures with a latent diffusion model around your own fine-tuned CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from limner.errors import LimnerError, UserError

if TYPE_CHECKING:
    from limner.config import Engine, Precision
    from limner.generation.model import Model

__version__ = "0.1.0"
__all__ = ["LimnerError", "UserError", "__version__", "load"]


def load(
    model: str = "builtin",
    *,
    device: str | None = None,
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    precision: Precision = "auto",
    low_memory: bool = False,
    engine: Engine = "torch",
) -> Model:
    """Load a text-to-image model: `builtin`, a Diffusers folder or a hub id, with LoRAs, each FILE or FILE:WEIGHT, and
    textual inversions, each FILE or FILE:TOKEN.

    >>> limner.load("builtin")("A dog on a beach.", seed=7).save("pictures")

    Raises ModelError when one can't be found, fetched or read, or when what is added doesn't fit the model.
    """
    from limner.generation.model import Model

    return Model.load(model, device, loras, embeddings, precision, low_memory, engine)
