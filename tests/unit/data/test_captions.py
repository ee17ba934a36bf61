"""What a caption becomes, which ones say nothing, and how many CLIP tokens they have."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limner.data.archives import Entry
from limner.data.checks import clean_caption, estimate_tokens, is_junk
from limner.data.sources import Picture, Source, prepare_captions

TEXT = st.text(st.one_of(st.characters(), st.sampled_from(" .,'\"()!?\n\tns\ufeff")), max_size=60)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A black dog is running .", "A black dog is running."),
        ("  A dog ,  a cat ; and \t a bird !\n", "A dog, a cat; and a bird!"),
        ("The dog 's ball isn 't here , is n't it ?", "The dog's ball isn 't here, isn't it?"),
        ('A sign says " stop " .', 'A sign says "stop".'),
        ("A man ( in red ) waits", "A man (in red) waits"),
        ("A\x00 man\u2028waits\x7f\ud800", "A man waits"),
        ("\ufeffEin Hund läuft .", "Ein Hund läuft."),
        ("A dog", "A dog"),
        (" . ", ""),
        ("", ""),
        ("狗在跑 。", "狗在跑 。"),
        ('Boards of 12" by 24" each .', 'Boards of 12" by 24" each.'),
        ("It costs .50 , or 1 .", "It costs .50, or 1."),
    ],
)
def test_captions_are_cleaned(raw: str, clean: str) -> None:
    assert clean_caption(raw) == clean


@given(TEXT)
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    assert clean_caption(clean_caption(text)) == clean_caption(text)


@given(TEXT)
def test_cleaning_only_takes_away(text: str) -> None:
    left = iter(text)
    assert all(character in left for character in clean_caption(text) if character != " ")


@given(TEXT)
def test_a_clean_caption_is_one_line_that_can_be_written(text: str) -> None:
    clean = clean_caption(text)
    assert len(clean.splitlines()) <= 1
    assert clean == clean.strip()
    assert "  " not in clean
    assert not clean or clean.encode("utf-8")


@pytest.mark.parametrize("caption", ["A", "a.", "broken image", "Broken image.", "The", "N/A", "null"])
def test_junk_is_found(caption: str) -> None:
    assert is_junk(caption)


@pytest.mark.parametrize("caption", ["Dog", "dogs racing", "A skier", "A broken image frame hangs on a wall.", "犬"])
def test_short_is_not_junk(caption: str) -> None:
    assert not is_junk(caption)


@pytest.mark.parametrize(
    ("caption", "tokens"),  # as CLIP's own tokenizer counts them, with start and end
    [
        ("A dog.", 5),
        ("A golden retriever playing in a field.", 10),
        ("A toddler playing in a sandbox.", 10),
        ("The boy's kite is 25 feet up, isn't it?!", 16),
        ("Two snowboarders and a dachshund", 9),
        ("dog " * 298, 300),
    ],
)
def test_tokens_of_english_are_estimated_within_one(caption: str, tokens: int) -> None:
    assert abs(estimate_tokens(caption) - tokens) <= 1


@pytest.mark.parametrize(("caption", "tokens"), [("ein Hund läuft über die Straße", 16), ("一只狗", 9)])
def test_tokens_of_other_languages_are_not_estimated_too_low(caption: str, tokens: int) -> None:
    assert tokens <= estimate_tokens(caption) <= 1.5 * tokens


def picture(*captions: str) -> Picture:
    """A picture of which only the captions count here."""
    return Picture(Entry(Path("a.jpg"), "a.jpg", 1), "a.jpg", captions)


def test_captions_are_kept_listed_or_dropped() -> None:
    source = Source("set", "pictures", [picture("A dog .", " .", "A", "dog " * 90)])
    (kept,), findings = prepare_captions(source, uncaptioned=False)
    assert kept.captions == ("A dog.", "A", ("dog " * 90).strip())
    assert [(f.reason, f.kept) for f in findings] == [
        ("empty caption", False),
        ("caption says nothing", True),
        ("caption over 77 CLIP tokens", True),
    ]


@pytest.mark.parametrize(("tokens", "listed"), [(77, False), (78, True)])
def test_77_tokens_are_the_most_that_clip_reads(tokens: int, listed: bool) -> None:
    _, findings = prepare_captions(Source("set", "", [picture("dog " * (tokens - 2))]), uncaptioned=False)
    assert bool(findings) == listed


@pytest.mark.parametrize("captions", [(), ("",), (" . ", "\n")])
def test_a_picture_without_caption_is_dropped_or_kept_as_asked(captions: tuple[str, ...]) -> None:
    source = Source("set", "", [picture(*captions)])
    pictures, findings = prepare_captions(source, uncaptioned=False)
    assert pictures == []
    assert findings[-1].reason == "picture without caption"
    (kept,), findings = prepare_captions(source, uncaptioned=True)
    assert kept.captions == ()
    assert [f.reason for f in findings] == ["empty caption"] * len(captions)
