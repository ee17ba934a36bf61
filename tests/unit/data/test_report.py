"""The report states what was counted, and shows captions as text, whatever they hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from limner.data.decode import Outcome
from limner.data.duplicates import Pair
from limner.data.findings import Finding
from limner.data.report import Item, write_report
from photos import jpeg, put

HOSTILE = '<script>alert("x")</script> & {{ 7 * 7 }}'
FACTS: dict[str, Any] = {
    "name": "Set <b>",
    "licence": "none",
    "source": {"layout": "pictures", "sha256": "0" * 64},
    "splits": {"by": "hand"},
    "quarantined": {"too small": 70},
    "duplicates": {"near_across_splits": 1_234},
}


class Text(HTMLParser):
    """The words of a page, and whether every element that was opened is closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(out: Path, captions: dict[str, tuple[str, ...]], *findings: Finding) -> tuple[str, str]:
    """Write a report on pictures of these captions. -> its HTML, and its text on one line."""
    items = []
    for number, (file, texts) in enumerate(captions.items()):
        put(out, {file: jpeg(number)})
        changes = ("turned upright",) if number == 0 else ()
        items.append(Item(Outcome(file, file, 1_000_000, 64, 48 + number, "", 0, changes), texts))
    files = list(captions)
    write_report(out, FACTS, items, findings, [Pair(3, files[0], files[-1])])
    html = (out / "report.html").read_text(encoding="utf-8")
    page = Text()
    page.feed(html)
    assert page.open == []
    return html, " ".join(" ".join(page.words).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A report on three pictures."""
    captions = {
        "train/a.jpg": ("A dog runs.", "The dog's bone and the dog", HOSTILE),
        "train/b.jpg": ("dog " * 40,),
        "val/c.jpg": (),
    }
    findings = [Finding("d.png", "empty file"), *(Finding(f"{n}.png", "too small", "1x1") for n in range(70))]
    return report(tmp_path_factory.mktemp("report"), captions, *findings, Finding("<i>.jpg", "remarkable", kept=True))


def test_counts_are_stated(page: tuple[str, str]) -> None:
    _, text = page
    assert "2 train 1 val 0 test 4 captions 70 quarantined 1,234 near-duplicates" in text
    assert "train 2 4 1–3 val 1 0 0 test 0 0 –" in text
    assert "Shorter side 48 to 50, median 49 pixels; 3 sizes; 3.0 MB in all" in text
    assert "Done to files: turned upright (1). All others are as they were." in text


def test_words_and_lengths_are_counted(page: tuple[str, str]) -> None:
    html, text = page
    assert "3 to 40, median 6." in text  # of 3, 6, 7 and 40 words
    bars = {label: int(n) for label, n in re.findall(r'title="(\S+) words: (\d+)"', html)}
    assert {label: n for label, n in bars.items() if n} == {"3": 1, "6": 1, "7": 1, "30+": 1}
    assert "dog 42" in text
    assert "dog's 1" in text
    assert not re.search(r"\bthe \d", text), "articles tell nothing"


def test_the_closest_pairs_and_the_first_findings_are_shown(page: tuple[str, str]) -> None:
    _, text = page
    assert "perceptual hash: 1,234. They stay; judge whether they flatter a measurement. The closest 1:" in text
    assert "train/a.jpg val/c.jpg 3 bits apart" in text
    assert text.index("too small: 70") < text.index("empty file: 1"), "the most frequent first"
    assert "59.png (1x1)" in text
    assert "60.png" not in text
    assert "The first 60; all are in quarantine.jsonl." in text


def test_what_captions_and_names_hold_is_text(page: tuple[str, str]) -> None:
    html, text = page
    assert HOSTILE in text
    assert "Set <b>" in text
    assert "<i>.jpg" in text
    assert "<script" not in html


def test_it_opens_offline(page: tuple[str, str]) -> None:
    html, _ = page
    assert not re.search(r'(src|href)="(?!data:image/)', html)
    assert "@import" not in html
    assert "url(" not in html


def test_pictures_without_captions_have_a_report_too(tmp_path: Path) -> None:
    _, text = report(tmp_path, {"train/a.jpg": ()})
    assert "Words a caption" not in text
    assert "train/a.jpg" in text
