"""What a prompt may say beside words: weights, BREAK, and alternatives of which each picture gets one.

    (word)  (word:1.3)  [word]     weight 1.1, weight 1.3, weight 1/1.1; nested weights multiply
    a field BREAK a dog            what follows begins a new piece of 77 tokens
    {dog|cat}  {2::dog|cat}        one of them, the first twice as often as the second; may be nested
    \\( \\) \\[ \\] \\{ \\| \\} \\\\        the character itself

Weights and BREAK are those of stable-diffusion-webui (A1111), since prompts go round in its notation: a bracket that is
never closed reaches to the end, one that was never opened is plain text. Braces without a `|` are plain text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import accumulate
from random import Random
from typing import NamedTuple

from limner.errors import ConfigError

ROUND, SQUARE = 1.1, 1 / 1.1
MOST_WEIGHT = 100.0  # far beyond what draws anything, far below what a float can't hold

MARKS = re.compile(
    r"\\[\\()\[\]{}|]"  # an escaped character
    r"|:\s*+(?P<weight>[+-]?(?:[0-9]++\.?[0-9]*+|\.[0-9]++))\s*+\)"  # `+` behind: no way back, so that time is linear
    r"|[()\[\]]"
    r"|[^\\()\[\]:]+|[\\:]"
)
BREAK = re.compile(r"(?:(?<!\s)\s++)?\bBREAK\b\s*+")
ALTERNATIVES = re.compile(r"\\.|[{|}]|[^\\{|}]+|\\", re.DOTALL)
OFTEN = re.compile(r"\s*(?P<times>[0-9]{1,6}(?:\.[0-9]{1,6})?)::")


class Span(NamedTuple):
    """Text of one weight."""

    text: str
    weight: float


def parse(prompt: str) -> list[list[Span]]:
    """The spans between one BREAK and the next, without brackets and escapes; neighbours differ in weight.

    Raises ConfigError where nested weights leave [-100, 100].
    """
    texts: list[str | None] = []  # None is a BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def add(text: str | None) -> None:
        texts.append(text)
        weights.append(1.0)

    def close(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for found in MARKS.finditer(prompt):
        mark = found[0]
        if mark in opened:
            opened[mark].append(len(texts))
        elif found["weight"] and opened["("]:
            close(opened["("].pop(), float(found["weight"]))
        elif mark == ")" and opened["("]:
            close(opened["("].pop(), ROUND)
        elif mark == "]" and opened["["]:
            close(opened["["].pop(), SQUARE)
        elif len(mark) == 2 and mark[0] == "\\":
            add(mark[1])
        else:
            for i, text in enumerate(BREAK.split(mark)):
                if i > 0:
                    add(None)
                add(text)
    for start in opened["("]:
        close(start, ROUND)
    for start in opened["["]:
        close(start, SQUARE)
    return _merged([None if text is None else Span(text, weight) for text, weight in zip(texts, weights)])


def _merged(spans: list[Span | None]) -> list[list[Span]]:
    parts: list[list[Span]] = [[]]
    for span in spans:
        if span is None:
            parts.append([])
            continue
        if not abs(span.weight) <= MOST_WEIGHT:
            raise ConfigError(
                f"The weight of {span.text.strip()[:40]!r} is {span.weight:g}; weights in a prompt go from "
                f"-{MOST_WEIGHT:g} to {MOST_WEIGHT:g}."
            )
        alike = parts[-1] and parts[-1][-1].weight == span.weight
        before = parts[-1].pop().text if alike else ""
        parts[-1].append(Span(before + span.text, span.weight))
    return parts


def marked(prompt: str) -> bool:
    """Whether the prompt says what only this notation can mean: a weight by number, or BREAK."""
    numbered = any(found["weight"] for found in MARKS.finditer(prompt))
    return numbered or BREAK.search(prompt) is not None


def literal(text: str) -> str:
    """A prompt that says the text as it is, whatever marks are in it, but for BREAK; brackets mean nothing."""
    return re.sub(r"[\\()\[\]{}|]", r"\\\g<0>", text)


def unescaped(prompt: str) -> str:
    """The prompt for what reads it as it is: brackets stay, and escaped characters are themselves."""
    return re.sub(r"\\([\\()\[\]{}|])", r"\1", prompt)


def chosen(template: str, seed: int) -> str:
    """The prompt with one of each of its alternatives, which (template, seed) alone decides.

    The seed is the picture's own, so that the fourth of seed 7 says the same as the first of seed 10. The result has no
    alternatives left: choosing again changes nothing.
    """
    random = Random(f"{seed} {template}")
    groups: list[list[list[str]]] = [
        [[]]
    ]  # of those that are open, options, and text of each; the outermost is no group
    for found in ALTERNATIVES.finditer(template):
        mark = found[0]
        if mark == "{":
            groups.append([[]])
        elif mark == "|" and len(groups) > 1:
            groups[-1].append([])
        elif mark == "}" and len(groups) > 1:
            options = ["".join(option) for option in groups.pop()]
            groups[-1][-1].append(_one_of(options, random) if len(options) > 1 else f"{{{options[0]}}}")
        else:
            groups[-1][-1].append(mark)
    return "{".join("|".join("".join(option) for option in group) for group in groups)


def _one_of(options: list[str], random: Random) -> str:
    """One option, as often as the number before its `::` says, or else once; equally often where all say 0."""
    found = [OFTEN.match(option) for option in options]
    texts = [option[match.end() :] if match else option for option, match in zip(options, found)]
    times = [float(match["times"]) if match else 1.0 for match in found]
    ends = list(accumulate(times if any(times) else [1.0] * len(times)))
    # `random` is, unlike `choices`, promised to stay the same in later Pythons
    return texts[min(bisect_right(ends, random.random() * ends[-1]), len(texts) - 1)]
