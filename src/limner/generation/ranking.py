"""Which of several pictures fits the prompt best, by the CLIP in the model's own folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from limner.data.pictures import centre_box, to_pixels
from limner.errors import ConfigError
from limner.generation import language
from limner.generation.jobs import Spec
from limner.models import loading

if TYPE_CHECKING:
    from PIL.Image import Image


def check(spec: Spec, n: int, best_of: int) -> None:
    """Raise ConfigError where `n` of `best_of` pictures can't be chosen, or the model has no CLIP to choose by."""
    if n < 1:
        raise ConfigError(f"n must be 1 or more, not {n}.")
    if best_of < n:
        raise ConfigError(f"best_of {best_of} is less than the {n} pictures to keep; draw more or keep fewer.")
    if not loading.fits(spec.folder / "clip", "clip"):
        raise ConfigError(f"{spec.ref} has no clip/ to rank pictures by; leave out best_of, or add one by assemble.")


class Ranker:
    """A CLIP that compares pictures with a prompt."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        """Load `clip/` of a model folder. Raises ModelError."""
        self.clip = loading.load_clip(str(spec.folder / "clip"))
        self.clip.network.to(device)
        self.device = device

    @torch.no_grad()
    def score(self, prompt: str, image: Image) -> float:
        """Cosine of the features of a prompt, its brackets left out, and of the middle of a picture.

        Long prompts count up to their 77th token.
        """
        words = " ".join(span.text for part in language.parse(prompt) for span in part)
        text = self.clip.text_features(self.clip.tokenize([words]).to(self.device))  # (1, E)
        size = (self.clip.size, self.clip.size)
        pixels = to_pixels(image, centre_box(image, size), size)[None].to(self.device)
        return float(self.clip.image_features(pixels) @ text.T)
