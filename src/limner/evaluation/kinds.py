"""What each figure is called, in which unit it is read, which way is better, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Kind:
    """How a figure is told."""

    title: str
    says: str
    better: Literal["more", "less", ""]
    unit: Literal["%", "dB", "s", "MiB", ""] = ""

    def shown(self, value: float) -> str:
        """A value with its unit, in as many digits as mean something."""
        if self.unit == "%":
            return f"{100 * value:.1f} %"
        digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{digits} {self.unit}".strip()


KINDS = {
    "r_precision": Kind(
        "R-precision", "Pictures nearer to their own caption than to 99 others; by chance 1 %.", "more", "%"
    ),
    "clip_score": Kind("CLIPScore", "2.5 times the cosine of a picture and its caption, for the judge.", "more"),
    "caption_r@1": Kind("Caption found, first", "Pictures whose caption is the nearest of all captions.", "more", "%"),
    "caption_r@5": Kind("Caption among 5", "Pictures whose caption is among the 5 nearest of all.", "more", "%"),
    "caption_r@10": Kind("Caption among 10", "Pictures whose caption is among the 10 nearest of all.", "more", "%"),
    "frechet": Kind("Fréchet distance", "Of Gaussians around drawn pictures and photographs.", "less"),
    "kernel_distance": Kind("Kernel distance", "Squared discrepancy with a cubic kernel; 0 for equal sets.", "less"),
    "cmmd": Kind("CMMD", "Squared discrepancy of the judge's embeddings, times 1000.", "less"),
    "precision": Kind("Precision", "Drawn pictures that lie among the photographs.", "more", "%"),
    "recall": Kind("Recall", "Photographs that lie among the drawn pictures.", "more", "%"),
    "density": Kind("Density", "Photographs around a drawn picture, as a share of those expected.", "more", "%"),
    "coverage": Kind("Coverage", "Photographs that have a drawn picture near them.", "more", "%"),
    "all": Kind(
        "All aspects", "Pairs of captions of which the judge prefers the right one; by chance 50 %.", "more", "%"
    ),
    "object": Kind("Object", "Dog, cat or child.", "more", "%"),
    "place": Kind("Place", "Beach, snow or grass.", "more", "%"),
    "colour": Kind("Colour", "Red or blue.", "more", "%"),
    "count": Kind("Count", "One or several.", "more", "%"),
    "negation": Kind("Negation", "With or without.", "more", "%"),
    "copies_by_features": Kind(
        "Copies by features", "Nearer to a training photograph than 99.9 % of real test photographs are.", "less", "%"
    ),
    "copies_by_pixels": Kind("Copies by pixels", "The same, for pictures of 32x32 pixels.", "less", "%"),
    "psnr": Kind("PSNR", "Photographs through the VAE and back: signal to noise.", "more", "dB"),
    "ssim": Kind("SSIM", "Their structural similarity; 1 for equal pictures.", "more"),
    "vae_distance": Kind("Feature distance", "One minus the cosine of features before and after.", "less"),
    "text_to_image_r@1": Kind("Caption finds picture, R@1", "Among all photographs of this evaluation.", "more", "%"),
    "text_to_image_r@5": Kind("Caption finds picture, R@5", "The same, among the 5 nearest.", "more", "%"),
    "text_to_image_r@10": Kind("Caption finds picture, R@10", "The same, among the 10 nearest.", "more", "%"),
    "image_to_text_r@1": Kind("Picture finds caption, R@1", "Any of its captions, among all captions.", "more", "%"),
    "image_to_text_r@5": Kind("Picture finds caption, R@5", "The same, among the 5 nearest.", "more", "%"),
    "image_to_text_r@10": Kind("Picture finds caption, R@10", "The same, among the 10 nearest.", "more", "%"),
    "seconds": Kind("Time a picture", "Mean, the first batch left out; whatever else the machine did.", "less", "s"),
    "memory": Kind("Memory", "The most that drawing held: the process, or on a GPU its tensors.", "less", "MiB"),
}

SECTIONS = {
    "alignment": "Alignment with captions",
    "fidelity": "Fidelity to photographs",
    "attributes": "Prompt sensitivity",
    "copies": "Copies of training photographs",
    "vae": "VAE",
    "clip": "The model's CLIP",
    "cost": "Cost",
}
GLANCE = ("r_precision", "clip_score", "frechet", "cmmd", "all", "copies_by_features", "psnr", "seconds")
"""What stands first, and in the line that the command prints."""


def by_name(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Figures by name, without those of further networks, whose names are the same."""
    return {name: figure for section in SECTIONS for name, figure in figures.get(section, {}).items()}
