"""The prompt-sensitivity test knows pictures that hear the prompt from those that don't."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from torch.nn.functional import normalize

from limner.evaluation.attributes import CAPTIONS, CONTRASTS, PROMPTS, owners, preferred

ASPECTS = {"object", "place", "colour", "count", "negation"}


def text_features() -> torch.Tensor:
    return normalize(torch.randn(len(CAPTIONS), 64, generator=torch.Generator().manual_seed(0)), dim=1)


def test_contrasts_go_both_ways_and_name_other_captions() -> None:
    assert {contrast.aspect for contrast in CONTRASTS} == ASPECTS
    pairs = {(c.aspect, c.right, c.wrong) for c in CONTRASTS}
    assert len(pairs) == len(CONTRASTS)
    assert all((aspect, wrong, right) in pairs and right != wrong for aspect, right, wrong in pairs)
    assert Counter(c.aspect for c in CONTRASTS) == {"object": 18, "place": 18, "colour": 22, "count": 6, "negation": 6}


def test_dog_cat_and_child_are_asked_for_at_every_place_in_red_and_in_blue() -> None:
    asked = {contrast.prompt for contrast in CONTRASTS if contrast.aspect == "colour"}
    for thing, place in product(("dog", "cat", "child"), ("on the beach", "in the snow", "on the grass")):
        assert f"A {thing} {place}." in PROMPTS
        assert {f"A {thing} in a {colour} jacket {place}." for colour in ("red", "blue")} <= asked


@pytest.mark.parametrize(("sign", "share"), [(1, 1), (-1, 0), (0, 0.5)])
def test_pictures_that_are_what_was_asked_for_are_preferred(sign: int, share: float) -> None:
    """And those of the opposite never, and those of nothing by half."""
    text = text_features()
    told = {contrast.prompt: contrast.right for contrast in CONTRASTS}
    images = sign * torch.stack([text[CAPTIONS.index(told[prompt])] for prompt in PROMPTS])
    found = preferred(images[:, None].expand(-1, 3, -1), text)
    assert set(found) == ASPECTS
    assert len(found["object"]) == 18 * 3
    assert all(hits.eq(share).all() for hits in found.values())


def test_the_pairs_of_a_picture_are_known() -> None:
    """One picture of three of a prompt is the opposite of what was asked for."""
    text = text_features()
    told = {contrast.prompt: contrast.right for contrast in CONTRASTS}
    images = torch.stack([text[CAPTIONS.index(told[prompt])] for prompt in PROMPTS])[:, None].repeat(1, 3, 1)
    number = PROMPTS.index("A cat in the snow.")
    images[number, 1] *= -1
    hits, own = preferred(images, text), owners(3)
    failed = {aspect: own[aspect][hits[aspect] == 0].tolist() for aspect in ASPECTS}
    pairs = {"object": 2, "place": 2, "colour": 0, "count": 0, "negation": 0}
    assert failed == {aspect: [3 * number + 1] * count for aspect, count in pairs.items()}


def test_pictures_that_do_not_hear_the_prompt_are_right_in_half_of_the_pairs() -> None:
    """The same pictures for every prompt: as each pair goes both ways, exactly half where captions are the prompts."""
    one = normalize(torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)), dim=2)
    found = preferred(one.expand(len(PROMPTS), -1, -1), text_features())
    assert {aspect: hits.mean().item() for aspect, hits in found.items()} == dict.fromkeys(ASPECTS, 0.5)
