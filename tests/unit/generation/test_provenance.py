"""What is written into a picture comes back, and no picture takes another's place."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from limner.errors import ConfigError, DataError
from limner.generation import provenance
from records import IMAGE, MODEL, any_text, record


@given(prompt=any_text, negative=any_text, seed=st.integers(0, 2**63 - 1), guidance=st.floats(1, 100))
def test_any_record_comes_back(prompt: str, negative: str, seed: int, guidance: float) -> None:
    written = record(prompt=prompt, negative=negative, seed=seed, guidance=guidance)
    with TemporaryDirectory() as folder:
        path = provenance.save(IMAGE, written, Path(folder))
        assert provenance.read(path) == written
        with Image.open(path) as image:
            assert image.info["parameters"] == provenance.parameters(written)
            assert image.tobytes() == IMAGE.tobytes()
        assert [entry.name for entry in Path(folder).iterdir()] == [path.name]
        assert len(os.fsencode(path.name)) < 200


def test_parameters_are_those_of_a1111() -> None:
    """The regular expressions are those that stable-diffusion-webui reads its own pictures with."""
    text = provenance.parameters(record(prompt="A dog,\nrunning.", negative="snow, ice"))
    *lines, last = text.split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert lines == ["A dog,", "running.", "Negative prompt: snow, ice"]
    assert (
        dict(found).items()
        >= {
            "Steps": "25",
            "Sampler": "DDIM",
            "CFG scale": "7.5",
            "Seed": "7",
            "Size": "16x16",
            "Model hash": "abcdef0000",
            "Model": "builtin",
        }.items()
    )


def test_a_model_name_with_a_comma_is_quoted() -> None:
    text = provenance.parameters({**record(), "model": {**MODEL, "ref": "a, b"}})
    assert 'Model: "a, b", Version' in text


def test_loras_are_among_the_parameters() -> None:
    loras = [{"ref": "runs/snow.safetensors", "weight": 0.5}, {"ref": "ice", "weight": 1.0}]
    text = provenance.parameters({**record(), "model": {**MODEL, "loras": loras}})
    assert text.endswith(', Loras: "snow.safetensors:0.5, ice:1"')
    assert "Loras" not in provenance.parameters(record())


def test_what_is_drawn_in_another_way_is_among_the_parameters() -> None:
    changed = record(scheduler="dpmpp_2m_karras", guidance_rescale=0.7, template="{a|b}", negative_template="{c|d}")
    text = provenance.parameters(changed)
    assert "Sampler: DPM++ 2M Karras, " in text
    assert text.endswith(", CFG rescale: 0.7, Template: {a|b}, Negative Template: {c|d}")
    assert not re.search("rescale|emplate", provenance.parameters(record()))


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A golden retriever, in a field!", "a-golden-retriever-in-a-field-7.png"),
        ("../../etc/passwd", "etc-passwd-7.png"),
        ("Ein Hünd 犬", "ein-hünd-犬-7.png"),
        ("🐕", "picture-7.png"),
        ("x" * 300, "x" * 100 + "-7.png"),
        ("犬" * 100, "犬" * 33 + "-7.png"),
    ],
)
def test_files_are_named_after_prompt_and_seed(tmp_path: Path, prompt: str, name: str) -> None:
    assert provenance.save(IMAGE, record(prompt=prompt), tmp_path).name == name


def test_an_earlier_picture_stays(tmp_path: Path) -> None:
    paths = [
        provenance.save(Image.new("RGB", (4, 4), colour), record(), tmp_path) for colour in ("red", "lime", "blue")
    ]
    assert [path.name for path in paths] == ["a-dog-7.png", "a-dog-7-2.png", "a-dog-7-3.png"]
    pixels = [Image.open(path).getpixel((0, 0)) for path in paths]
    assert pixels == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_a_format_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The format 'jpg' is none of png, jpeg, webp; choose one of them"):
        provenance.save(IMAGE, record(), tmp_path, "jpg")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def _save_many(folder: Path) -> list[str]:
    return [provenance.save(IMAGE, record(), folder).name for _ in range(10)]


def test_processes_do_not_take_each_other_s_names(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        names = [name for own in pool.map(_save_many, [tmp_path] * 4) for name in own]
    assert len(set(names)) == 40
    assert all(provenance.read(path) == record() for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 40


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    first = provenance.save(IMAGE, record(), tmp_path)
    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        provenance.save(IMAGE, record(), tmp_path)
    assert list(tmp_path.iterdir()) == [first]


def _damaged(file: Path) -> None:
    file.write_bytes(provenance.save(IMAGE, record(), file.parent).read_bytes()[:-40])


def _foreign(file: Path) -> None:
    IMAGE.save(file)


def _with_record(text: str) -> Any:
    def write(file: Path) -> None:
        info = PngInfo()
        info.add_text("limner", text)
        IMAGE.save(file, pnginfo=info)

    return write


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (lambda file: None, "can't be read"),
        (lambda file: file.mkdir(), "can't be read"),
        (lambda file: file.write_bytes(b""), "not a whole picture"),
        (lambda file: file.write_text("A dog."), "not a whole picture"),
        (_damaged, "not a whole picture"),
        (_foreign, "does not say how it was drawn"),
        (_with_record("{"), "does not say how it was drawn"),
        (_with_record("[1]"), "does not say how it was drawn"),
        (_with_record('"format"'), "does not say how it was drawn"),
        (_with_record("{}"), "does not say how it was drawn"),
        (_with_record('{"format": 2}'), "another version"),
    ],
)
def test_files_without_a_record_are_named(tmp_path: Path, write: Any, complaint: str) -> None:
    write(tmp_path / "x.png")
    with pytest.raises(DataError, match=complaint) as caught:
        provenance.read(tmp_path / "x.png")
    assert "\n" not in str(caught.value)
