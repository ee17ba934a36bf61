"""The three kinds of file say the same of a picture, to Limner and to others, and are whole or not there."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from limner.artifacts import write_new
from limner.config import Format
from limner.errors import ConfigError, DataError
from limner.generation import files, provenance
from limner.generation.jobs import Variation
from records import IMAGE, any_text, record

KINDS: tuple[Format, ...] = get_args(Format)


@given(prompt=any_text, negative=any_text, kind=st.sampled_from(KINDS))
def test_any_record_comes_back_from_any_kind(prompt: str, negative: str, kind: Format) -> None:
    written = record(prompt=prompt, negative=negative)
    with TemporaryDirectory() as folder:
        path = provenance.save(IMAGE, written, Path(folder), kind, 90)
        assert path.suffix == files.SUFFIXES[kind]
        quality = {} if kind == "png" else {"quality": 90}
        assert provenance.read(path) == {**written, **quality}
        image, found, _ = files.read(path)
    assert found == kind
    if kind != "png":
        image = image.convert("RGB")
        assert image.tobytes() == files.reencoded(IMAGE, kind, 90).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_another_program_reads_the_parameters(tmp_path: Path, kind: Format) -> None:
    from sd_parsers import ParserManager

    said = record(prompt="A dög 犬,\nrunning.", negative="snow, ice", variation=Variation(9, 0.25), strength=0.5)
    found = ParserManager().parse(provenance.save(IMAGE, said, tmp_path, kind))
    assert found is not None
    assert [prompt.value for prompt in found.prompts] == ["A dög 犬,\nrunning."]
    assert [prompt.value for prompt in found.negative_prompts] == ["snow, ice"]
    [sampler] = found.samplers
    assert sampler.parameters == {"cfg_scale": "7.5", "seed": "7", "steps": "25"}
    assert sampler.name.startswith("DDIM")
    assert sampler.model is not None
    assert (sampler.model.name, sampler.model.hash) == ("builtin", "abcdef0000")
    others = {"Denoising strength": "0.5", "Variation seed": "9", "Variation seed strength": "0.25", "Size": "16x16"}
    assert others.items() <= found.metadata.items()


def test_the_record_is_found_where_another_program_wrote_the_packet_anew(tmp_path: Path) -> None:
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        "<r:Description xmlns:l='urn:limner' l:record='{\"format\": 1}'/></r:RDF></x:xmpmeta>"
    )
    IMAGE.save(tmp_path / "x.webp", xmp=packet.encode())
    assert provenance.read(tmp_path / "x.webp") == {"format": 1}


@pytest.mark.parametrize("xmp", [b"<", b"\xff", b"<a/>", b""])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_packets_hold_no_record(tmp_path: Path, kind: str, xmp: bytes) -> None:
    IMAGE.save(tmp_path / "x", kind, **({"xmp": xmp} if xmp else {}))
    with pytest.raises(DataError, match="does not say how it was drawn"):
        provenance.read(tmp_path / "x")


def test_a_prompt_that_a_jpeg_has_no_room_for_is_refused_and_fits_elsewhere(tmp_path: Path) -> None:
    said = record(prompt="dog " * 10_000)
    with pytest.raises(ConfigError, match="choose --format png"):
        provenance.check_fits(said, "jpeg")
    with pytest.raises(ConfigError, match="choose --format png"):
        provenance.save(IMAGE, said, tmp_path, "jpeg")
    assert list(tmp_path.iterdir()) == []
    for kind in ("png", "webp"):
        provenance.check_fits(said, kind)


@pytest.mark.parametrize("link", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_files_never_replace_each_other_even_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: int | None
) -> None:
    def refuse(*_: object) -> None:
        assert link is not None
        raise OSError(link, "not here")

    if link is not None:
        monkeypatch.setattr("os.link", refuse)
    names = [write_new(provenance.free_names(tmp_path / "a.png"), touched).name for _ in range(3)]
    assert names == ["a.png", "a-2.png", "a-3.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def touched(path: Path) -> None:
    """Write something."""
    path.write_text("A dog.")


def _save_and_die(folder: Path, at: int, kind: Format) -> None:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in {"open", "os.link", "os.rename", "os.remove"} and str(arguments[0]).startswith(str(folder)):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    provenance.save(IMAGE, record(), folder, kind)


@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL and fork")
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_moment_a_picture_is_whole_or_not_there(tmp_path: Path, kind: Format) -> None:
    context, killed, kept = multiprocessing.get_context("fork"), 0, 0
    for at in range(1, 30):
        folder = tmp_path / str(at)
        folder.mkdir()
        process = context.Process(target=_save_and_die, args=(folder, at, kind))
        process.start()
        process.join()
        named = [path for path in folder.iterdir() if not path.name.startswith(".")]
        for path in named:
            assert provenance.read(path)["prompt"] == "A dog."
        kept += bool(named)
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    assert killed >= 3
    assert kept >= 2


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.gif")
    with pytest.raises(DataError, match="not a whole picture"):
        files.read(tmp_path / "x.gif")
