"""The prompt-sensitivity test: prompts that differ in one thing, and whether the pictures differ in it too.

Each prompt is drawn with the same seeds. A judge sees a picture with two captions, of which one fits the prompt. The
share of such pairs in which it prefers the right one is 0.5 for pictures that don't hear the prompt, and 1 for those
that always do, as far as the judge can tell.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contrast:
    """A prompt that is drawn, what the judge should find in the picture, and what it should not."""

    aspect: str
    prompt: str
    right: str
    wrong: str


OBJECTS, PLACES = ("dog", "cat", "child"), ("on the beach", "in the snow", "on the grass")
COLOURED = ("A person in a {} jacket.", "A {} car on the street.")
WORN, COLOURS = "A {} in a {} jacket {}.", ("red", "blue")
COUNTED = (
    ("One dog runs on the grass.", "Three dogs run on the grass."),
    ("One person stands on the beach.", "Four people stand on the beach."),
    ("One child plays in the snow.", "Two children play in the snow."),
)
NEGATED = (
    ("A street with people.", "A street without people.", "An empty street."),
    ("A beach with people.", "A beach without people.", "An empty beach."),
    ("A dog with a ball.", "A dog without a ball.", "A dog with nothing in its mouth."),
)
"""With, without, and how the judge is told of "without": a sentence's embedding hardly knows a negation."""


def _contrasts() -> list[Contrast]:
    placed = {(thing, place): f"A {thing} {place}." for thing, place in product(OBJECTS, PLACES)}
    objects = [
        Contrast("object", placed[one, place], placed[one, place], placed[other, place])
        for place in PLACES
        for one, other in permutations(OBJECTS, 2)
    ]
    places = [
        Contrast("place", placed[thing, one], placed[thing, one], placed[thing, other])
        for thing in OBJECTS
        for one, other in permutations(PLACES, 2)
    ]
    coloured = [[sentence.format(colour) for colour in COLOURS] for sentence in COLOURED]
    coloured += [[WORN.format(thing, colour, place) for colour in COLOURS] for thing, place in placed]
    colours = [Contrast("colour", one, one, other) for pair in coloured for one, other in permutations(pair)]
    counts = [Contrast("count", one, one, other) for pair in COUNTED for one, other in permutations(pair)]
    negations = [
        contrast
        for present, absent, told in NEGATED
        for contrast in (Contrast("negation", present, present, told), Contrast("negation", absent, told, present))
    ]
    return [*objects, *places, *colours, *counts, *negations]


CONTRASTS = tuple(_contrasts())
PROMPTS = tuple(dict.fromkeys(contrast.prompt for contrast in CONTRASTS))
"""What is to be drawn, each with the same seeds."""
CAPTIONS = tuple(dict.fromkeys(caption for contrast in CONTRASTS for caption in (contrast.right, contrast.wrong)))
"""What the judge reads."""


def preferred(images: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Whether the judge prefers the right caption, by aspect: 1, 0, or a half for a tie, (pairs times S,).

    images (P, S, E), features of S pictures of each of `PROMPTS`; text (C, E), those of `CAPTIONS`.
    """
    assert (len(images), len(text)) == (len(PROMPTS), len(CAPTIONS))
    similarity = torch.einsum("pse,ce->psc", images.double(), text.double()).float()  # (P, S, C)
    found = defaultdict(list)
    for contrast in CONTRASTS:
        seen = similarity[PROMPTS.index(contrast.prompt)]  # (S, C)
        right, wrong = seen[:, CAPTIONS.index(contrast.right)], seen[:, CAPTIONS.index(contrast.wrong)]  # (S,) each
        found[contrast.aspect].append((right > wrong).double() + (right == wrong).double() / 2)
    return {aspect: torch.cat(hits) for aspect, hits in found.items()}


def owners(count: int) -> dict[str, Tensor]:
    """The number of the picture that each of the pairs of `preferred` is of, by aspect, (pairs times count,).

    There are `count` pictures a prompt, prompt by prompt.
    """
    found = defaultdict(list)
    for contrast in CONTRASTS:
        found[contrast.aspect].append(PROMPTS.index(contrast.prompt) * count + torch.arange(count))
    return {aspect: torch.cat(numbers) for aspect, numbers in found.items()}
