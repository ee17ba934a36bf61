"""Whatever `limner generate` is called with, it draws, or says in a sentence why not, and no half of a picture is left.

`python tests/e2e/test_generate_anything.py CALLS` tries as many as are wanted.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from commands import limner
from faults import header_bomb
from limner.artifacts import PARTIAL
from limner.diffusion.samplers import SAMPLERS
from limner.generation import provenance
from limner.models.clip import HALF, Clip
from tiny import tiny_clip, tiny_model, tiny_tokenizer

BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))  # what a shell hands over that is no UTF-8
WORDS = (
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
    | st.text("(){}[]|:,.1 \\adogBREAK", max_size=40)
    | st.text(f"dog{BYTES}", max_size=5)
    | st.integers(70, 400).map(lambda count: "dog " * count)
)
NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["", "0", "-1", "1e9", "1000000000", "nan", "-inf", "0x10", "1_000", "٣", "1;2", " 7"]),
    WORDS,
)
FEW = st.sampled_from(["1", "2", "3"])
FILES = st.sampled_from(["photo.png", "mask.png", "text.png", "half.png", "bomb.png", "none.png", ".", "x" * 300])
VALUES = {
    "--steps": FEW
    | st.just("1000")  # more than the model's scheduler takes
    | NUMBERS.filter(lambda text: not (text.strip().isdecimal() and 3 < int(text) <= 1000)),
    "-n": FEW | st.sampled_from(["0", "-5", "x", "", "100001", "1000000000"]),
    "--seed": NUMBERS,
    "--guidance": NUMBERS,
    "--negative": WORDS,
    "--size": st.sampled_from(["16", "8x12", "16×16", "0", "15", "0x0", "-16", "16x", "1e3", "8194", "9" * 30, "x"])
    | WORDS,
    "--scheduler": st.sampled_from(list(SAMPLERS)) | WORDS,
    "--image": FILES,
    "--mask": FILES,
    "--strength": st.sampled_from(["0", "0.5", "1", "1.1", "nan"]) | NUMBERS,
    "--variation": st.tuples(NUMBERS, NUMBERS).map(":".join),
    "--best-of": FEW | st.sampled_from(["0", "x", "1000000000"]),
    "--grid": st.tuples(st.sampled_from(["steps", "guidance", "seed", "size", "prompt", ""]), WORDS).map("=".join)
    | st.sampled_from(["steps=1,2", "guidance=1,3 steps=1,2", "steps=", "="]),
    "--lora": st.sampled_from(["other.safetensors", "text.png", "none.safetensors", "other.safetensors:nan"]),
    "--embedding": st.sampled_from(["other.safetensors", "none.safetensors:x", "text.png"]),
    "--out": st.sampled_from(["out", "ö/ü", "photo.png", "photo.png/out", "y" * 300]),
    "--format": st.sampled_from(["png", "jpeg", "webp", "gif", ""]),
    "--preview": st.sampled_from(["preview.png", "photo.png/x.png"]),
    "--device": st.sampled_from(["cpu", "abacus", "cuda:99", "", "meta"]),
    "--precision": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
    "--engine": st.sampled_from(["torch", "abacus"]),
    "--prompts": st.sampled_from(["text.png", "half.png", "none.txt", "."]),
    "--set": st.tuples(st.sampled_from(["guidance_rescale", "quality", "x", ""]), NUMBERS).map("=".join) | WORDS,
}
SWITCHES = st.lists(st.sampled_from(["--sheet", "--show", "--low-memory", "--nothing", "--dry-run"]), max_size=2)


@st.composite
def calls(draw: st.DrawFn) -> list[str]:
    """Arguments of `limner generate`, some of which may be right."""
    options = draw(st.lists(st.sampled_from(list(VALUES)), max_size=4, unique=True))
    values = [word for option in options for word in (option, draw(VALUES[option]))]
    return [*values, *draw(SWITCHES), "--", *draw(st.lists(st.just("A dog.") | WORDS, max_size=2))]


def furnish(folder: Path) -> None:
    """A model, and files good and bad."""
    tiny_model(folder / "model", "ddim")
    Clip(tiny_clip(), tiny_tokenizer(folder / "model" / "clip"), HALF).save(folder / "model" / "clip")
    (folder / "model" / "manifest.json").write_text('{"defaults": {"steps": 2, "guidance": 4.0}}')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "photo.png")
    Image.new("L", (32, 32), 255).save(folder / "mask.png")
    (folder / "text.png").write_text("A dog.")
    (folder / "half.png").write_bytes((folder / "photo.png").read_bytes()[:500])
    (folder / "bomb.png").write_bytes(header_bomb(30_000))
    save_file({"unet.conv_in.lora_A.weight": torch.ones(2, 99)}, folder / "other.safetensors")


def check(arguments: list[str], furnished: Path) -> int:
    """Assert what the module says of a call in a folder of its own. -> its exit code."""
    with tempfile.TemporaryDirectory() as name, chdir(name):
        for file in furnished.iterdir():
            Path(file.name).symlink_to(file)
        out, err = (TextIOWrapper(BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        with (
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
            Path(os.devnull).open(encoding="utf-8") as nothing,
        ):
            patch.setattr("sys.stdin", nothing)
            code = limner("generate", "--model", "./model", *arguments)
        said = err.buffer.getvalue().decode()
        written = out.buffer.getvalue().decode()
        drawn = [path for path in Path().rglob("*") if path.is_file() and not path.is_symlink()]
        assert not list(Path().rglob(f"*{PARTIAL}*"))
        for path in drawn:
            with Image.open(path) as image:
                image.load()
        if code == 0:
            assert "--dry-run" in arguments or all(Path(line).is_file() for line in written.splitlines())
        else:
            assert code == 2, said
            others = [line for line in said.splitlines() if not line.startswith(("Drawing", "./model was trained at"))]
            assert [line[:8] for line in others] == ["limner: "], said
            assert all(provenance.read(path) for path in drawn if path.name != "preview.png")
    return code


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `furnish`."""
    folder = tmp_path_factory.mktemp("furnished")
    furnish(folder)
    return folder


@given(calls())
@settings(max_examples=100)
def test_any_call_ends_well(furnished: Path, arguments: list[str]) -> None:
    check(arguments, furnished)


if __name__ == "__main__":
    codes = []

    @given(calls())
    @settings(deadline=None, max_examples=int(sys.argv[1]), database=None)
    def many(furnished: Path, arguments: list[str]) -> None:
        codes.append(check(arguments, furnished))
        if len(codes) % 500 == 0:
            print(f"{len(codes)} calls, {codes.count(0)} of them went well", flush=True)

    with tempfile.TemporaryDirectory() as place:
        furnish(Path(place))
        many(Path(place))
