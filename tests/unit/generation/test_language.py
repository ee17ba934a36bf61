"""What prompts may say beside words, as stable-diffusion-webui (A1111) reads it, and that no text ends in a crash."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limner.errors import UserError
from limner.generation import language
from limner.generation.jobs import Spec, make_jobs

SCHEDULERS = [None, {"_class_name": "DDIMScheduler"}, {"prediction_type": "flow_prediction"}]

fragments = st.lists(
    st.sampled_from(
        [*r"()[]{}|:\ ,.-+09", "\\(", "::", ":1.3)", ": .5 )", " BREAK ", "2::", "dog", "cat", "\n", "{a|b}"]
    )
    | st.text(max_size=5),
    max_size=40,
).map("".join)


def spans(prompt: str) -> list[list[tuple[str, float]]]:
    """What `parse` finds, with weights rounded."""
    return [[(text, round(weight, 6)) for text, weight in part] for part in language.parse(prompt)]


# ---- weights


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        # as the documentation of A1111's parser has them
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        # and more
        ("[word]", [("word", 0.909091)]),
        ("(a:-1) (b: .5 ) (c:+2.)", [("a", -1.0), (" ", 1.0), ("b", 0.5), (" ", 1.0), ("c", 2.0)]),
        ("(a:0)", [("a", 0.0)]),
        ("at 10:30) (b)", [("at 10:30) ", 1.0), ("b", 1.1)]),
        ("a) b] c", [("a) b] c", 1.0)]),
        ("(1:2:1.5)", [("1:2", 1.5)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 0.909091)]),
        (r"C:\dogs \{a\|b\} \\", [("C:\\dogs {a|b} \\", 1.0)]),
    ],
)
def test_weights_are_those_of_a1111(prompt: str, found: list[tuple[str, float]]) -> None:
    assert spans(prompt) == [found]


def test_break_parts_a_prompt_wherever_it_stands() -> None:
    assert spans("a field BREAK a (dog BREAK\na cat:2)") == [[("a field", 1)], [("a ", 1), ("dog", 2)], [("a cat", 2)]]
    assert spans("BREAKFAST in bed, break") == [[("BREAKFAST in bed, break", 1)]]


@given(st.text(st.characters(exclude_characters="()[]\\", exclude_categories=["Cs"])))
def test_a_text_without_marks_is_itself(text: str) -> None:
    if not language.BREAK.search(text):
        assert "".join(span.text for part in language.parse(text) for span in part) == text


@pytest.mark.parametrize("prompt", ["(a:1000)", "(" * 60 + "a", "(a:" + "9" * 400 + ")", "((a:99999):0)" + "(a:-101)"])
def test_a_weight_beyond_all_sense_is_named(prompt: str) -> None:
    with pytest.raises(UserError, match=r"The weight of 'a' is .*; weights in a prompt go from -100 to 100"):
        language.parse(prompt)


@pytest.mark.parametrize(
    "prompt", [":" + "9" * 50_000, "(:" + " " * 50_000, " " * 50_000, "[a" * 5_000, ":9. " * 9_999]
)
def test_no_prompt_takes_long_to_read(prompt: str) -> None:
    started = time.process_time()
    language.parse(prompt)
    language.marked(prompt)
    assert time.process_time() - started < 10, "seconds; with a way back it is minutes"


# ---- alternatives


def shares(template: str, count: int = 2000) -> dict[str, float]:
    """How often each outcome comes, of all seeds below `count`."""
    drawn = Counter(language.chosen(template, seed) for seed in range(count))
    return {text: number / count for text, number in drawn.items()}


def test_each_alternative_comes_as_often_as_its_weight_says() -> None:
    assert shares("a {dog|cat}") == {"a dog": pytest.approx(0.5, abs=0.05), "a cat": pytest.approx(0.5, abs=0.05)}
    assert shares("{2::dog|cat|0::bird}") == {
        "dog": pytest.approx(2 / 3, abs=0.05),
        "cat": pytest.approx(1 / 3, abs=0.05),
    }
    assert shares("{0::a|0::b}") == {"a": pytest.approx(0.5, abs=0.05), "b": pytest.approx(0.5, abs=0.05)}
    nested = shares("{a {red|blue} ball|a dog}")
    assert nested == {
        "a dog": pytest.approx(0.5, abs=0.05),
        "a red ball": pytest.approx(0.25, abs=0.05),
        "a blue ball": pytest.approx(0.25, abs=0.05),
    }
    assert len(shares("{a|b} {c|d}")) == 4, "one choice does not decide the other"


def test_the_choice_stays_what_it_is() -> None:
    """A record's seed and template must mean the same in years to come."""
    drawn = [language.chosen("{a|b|c} {1::x|3::y}", seed) for seed in range(8)]
    assert drawn == ["a x", "a y", "a y", "a y", "a x", "c y", "b x", "a y"]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{dog}", "{dog}"),
        ("a|b", "a|b"),
        ("{a|b", "{a|b"),
        ("a|b}", "a|b}"),
        ("}{", "}{"),
        (r"\{a|b\}", r"\{a|b\}"),
        (r"{a\|b|a\|b}", r"a\|b"),
        ("{{a|a}", "{a"),
        ("{(dog:1.3)|(dog:1.3)}", "(dog:1.3)"),
        ("a\\", "a\\"),
    ],
)
def test_stray_braces_are_text(template: str, prompt: str) -> None:
    assert {language.chosen(template, seed) for seed in range(5)} == {prompt}


@given(fragments, st.integers(0, 2**63 - 1))
def test_choosing_again_changes_nothing(template: str, seed: int) -> None:
    once = language.chosen(template, seed)
    assert language.chosen(template, seed) == once
    assert language.chosen(once, seed + 1) == once


# ---- jobs


def spec(scheduler: dict[str, str] | None = None) -> Spec:
    """A model of 512x512 pixels."""
    return Spec("m", Path("m"), "StableDiffusionPipeline", (), True, 25, 7.5, (512, 512), 8, scheduler)


def test_each_picture_has_its_own_alternative_whatever_is_drawn_beside_it() -> None:
    template = "a {dog|cat|bird} on a {beach|hill}"
    together = make_jobs(spec(), [template], n=8, seed=7, negative="{snow|ice}")
    assert len({job.prompt for job in together}) > 2
    assert all(job.template == template and job.negative_template == "{snow|ice}" for job in together)
    assert together[3:4] == make_jobs(spec(), [template], seed=10, negative="{snow|ice}")
    job = make_jobs(spec(), ["A (dog:1.2)."])[0]
    assert (job.prompt, job.template, job.negative_template) == ("A (dog:1.2).", None, None)


def test_an_alternative_that_leaves_nothing_is_named() -> None:
    with pytest.raises(UserError, match="says nothing with seed 0; give each alternative words"):
        make_jobs(spec(), ["{|}"])


settings_of_jobs = st.fixed_dictionaries(
    {"prompts": st.lists(fragments, max_size=3)},
    optional={
        "n": st.integers(-1, 4) | st.just(10**9),
        "seed": st.integers(-1, 2**63),
        "steps": st.integers(-1, 1002) | st.just(10**9),
        "guidance": st.floats(),
        "guidance_rescale": st.floats(),
        "negative": fragments,
        "size": st.integers(-8, 10_000) | st.text(max_size=8) | st.from_regex(r"[0-9]{1,5}x[0-9]{1,5}", fullmatch=True),
        "scheduler": st.sampled_from(["euler", "DPM++ 2M Karras", "heun", "x"]) | st.text(max_size=12),
    },
)


@given(settings_of_jobs, st.sampled_from(SCHEDULERS))
def test_any_prompt_and_setting_makes_jobs_or_a_sentence(given_: dict, scheduler: dict[str, str] | None) -> None:
    try:
        jobs = make_jobs(spec(scheduler), **given_)
    except UserError as error:
        assert str(error).rstrip().endswith(".")
        return
    for job in jobs:
        for text in (job.prompt, job.negative):
            assert all(abs(span.weight) <= 100 for part in language.parse(text) for span in part)
            assert language.chosen(text, job.seed) == text


@given(fragments.filter(lambda text: "BREAK" not in text), st.integers(0, 9))
def test_a_literal_text_means_itself(text: str, seed: int) -> None:
    literal = language.literal(text)
    assert language.chosen(literal, seed) == literal
    said = [span for part in spans(literal) for span in part]
    assert "".join(words for words, _ in said) == language.unescaped(literal) == text
    assert {weight for _, weight in said} <= {1.0}
