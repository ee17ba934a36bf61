"""What the page shows of a job, without a browser."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limner.serving import easel, schemas
from limner.serving.easel import Easel
from limner.serving.schemas import ImageView, JobView

SETTINGS = {"prompt": "A dog.", "seed": 7, "n": 3, "model": "builtin", "size": "16x16"}


def image(id_: str, number: int) -> ImageView:
    """One of the job's."""
    own = schemas.own(SETTINGS, number)
    return ImageView(id=id_, url=f"/v1/images/{id_}", number=number, width=16, height=16, score=None, **own)


def job(**changed: Any) -> JobView:
    """A job of three pictures, of which one is done."""
    facts: dict[str, Any] = {
        "id": "0" * 32,
        "number": 1,
        "state": "running",
        "place": None,
        "step": 5,
        "steps": 12,
        "settings": SETTINGS,
        "images": [image("a", 0)],
        "error": None,
        "fault": False,
        "created": 0.0,
        "started": 1.0,
        "finished": None,
    }
    return JobView(**(facts | changed))


def test_each_picture_has_its_place_beside_the_others() -> None:
    shown = Easel(preview="abcd").show(job())
    assert re.findall(r"seed \d+", shown) == ["seed 7", "seed 8", "seed 9"]
    assert shown.index("/v1/images/a") < shown.index("base64,abcd") < shown.index('class="blank"')
    assert shown.count("base64,") == 1, "one is drawn at a time"
    assert '<progress max="12" value="5"' in shown


def test_of_variations_it_is_theirs_that_count_on() -> None:
    shown = Easel().show(job(settings=SETTINGS | {"variation": "20:0.25"}))
    assert re.findall("<figcaption>(.*?)</figcaption>", shown) == [
        "seed 7, variation 20:0.25",
        "seed 7, variation 21:0.25",
        "seed 7, variation 22:0.25",
    ]


def test_what_a_cancelled_job_never_drew_has_no_place() -> None:
    shown = Easel(preview="abcd").show(job(state="cancelled", finished=3.0))
    assert re.findall(r"seed \d+", shown) == ["seed 7"]
    assert "<progress" not in shown
    assert "Cancelled." in shown


def test_of_the_best_of_several_only_the_end_shows_which_they_are() -> None:
    settings = SETTINGS | {"n": 2, "best_of": 5}
    shown = Easel(preview="abcd").show(job(settings=settings, images=[]))
    assert re.findall("<figcaption>(.*?)</figcaption>", shown) == ["best 2 of 5"]
    best = [image(str(number), number) for number in (2, 0)]
    shown = Easel().show(job(settings=settings, images=best, state="done", finished=3.0))
    assert re.findall(r"seed \d+", shown) == ["seed 9", "seed 7"]
    assert "LoRA" in easel.facts(settings | {"loras": ["wild:0.5"]})


def test_the_time_left_goes_by_the_pace_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(easel.time, "monotonic", lambda: now)
    shown = Easel()
    assert shown.say(job(step=2)) == "Step 2 of 12."
    now = 104.0  # two steps in four seconds, eight to go
    assert shown.say(job(step=4)) == "Step 4 of 12, 16 s left."


@pytest.mark.parametrize(
    ("place", "said"),
    [(0, "Next in line."), (1, "1 job before this one."), (12, "12 jobs before this one.")],
)
def test_the_place_in_the_queue_is_said(place: int, said: str) -> None:
    assert Easel().say(job(state="queued", place=place)) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7440, "2 h 4 min")],
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert easel.duration(seconds) == said


@given(st.text(max_size=40))
def test_no_text_becomes_markup(text: str) -> None:
    for html in (
        Easel().show(job(settings=SETTINGS | {"prompt": text})),
        Easel().show(job(state="failed", error=text, finished=3.0)),
        easel.facts(SETTINGS | {"prompt": text, "negative": text}),
        easel.refused(text),
    ):
        tags = set(re.findall(r"</?(\w+)", html))
        assert tags <= {"div", "figure", "a", "img", "figcaption", "progress", "p", "dl", "dt", "dd"}
        assert text in unescape(html)
        assert not re.search(r'alt="[^"]*"[^ >]', html)
