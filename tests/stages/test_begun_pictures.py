"""Pictures in and out as a user calls for them: begun with a picture, the best of several, grids, and drawn again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from commands import limner
from limner.artifacts import sha256
from limner.errors import DataError
from limner.generation import provenance
from limner.generation.model import Model
from limner.models.clip import HALF, Clip
from tiny import WIDTH, tiny_clip, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that draws 16x16 pixels in 3 steps, with a CLIP of both towers."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny", "dpm-flow")
    (folder / "manifest.json").write_text(json.dumps({"defaults": {"steps": 3, "guidance": 4.0}}))
    Clip(tiny_clip(), tiny_tokenizer(folder / "clip"), HALF).save(folder / "clip")
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder_with_a_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save("photo.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save("mask.png")
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield


def drawn(capfd: pytest.CaptureFixture[str], *arguments: object) -> list[Path]:
    """The files that a command says it wrote."""
    capfd.readouterr()
    assert limner("generate", *arguments) == 0
    return [Path(line) for line in capfd.readouterr().out.splitlines()]


def replayed(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """Exit code and lines of `limner replay`."""
    capfd.readouterr()
    code = limner("replay", *arguments)
    return code, capfd.readouterr().out.splitlines()


# ---- begun with a picture


def test_a_picture_is_begun_with_and_named_in_the_record(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--image", "photo.png", "--mask", "mask.png", "--strength", 0.7, "--variation", "5:0.2"]
    [path] = drawn(capfd, "A dog.", "--model", folder, "--size", 32, *flags)
    said = provenance.read(path)
    assert said["image"] == {"file": "photo.png", "sha256": sha256(Path("photo.png"))}
    assert said["mask"] == {"file": "mask.png", "sha256": sha256(Path("mask.png"))}
    assert (said["strength"], said["variation"]) == (0.7, {"seed": 5, "strength": 0.2})
    kept = np.asarray(Image.open(path))[:, 16:] == np.asarray(Image.open("photo.png"))[:, 16:]
    assert kept.all()
    assert replayed(capfd, path)[0] == 0


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--strength", 0.5], "needs a picture to begin with"),
        (["--mask", "mask.png"], "needs a picture to begin with"),
        (["--image", "none.png"], "can't be read"),
        (["--image", "text.png"], "not a picture"),
        (["--image", "photo.png", "--mask", "text.png"], "not a picture"),
        (["--image", "photo.png", "--strength", 0], "strength"),
        (["--image", "photo.png", "--strength", 0.1], "not one step"),
        (["--variation", "x"], "not SEED:STRENGTH"),
        (["--variation", "3:2"], "not SEED:STRENGTH"),
        (["--variation", "-3:0.5"], "not SEED:STRENGTH"),
        (["--variation", "3:nan"], "not SEED:STRENGTH"),
        (["--best-of", 1, "-n", 2], "less than the 2"),
        (["--best-of", 2, "--grid", "steps=1,2"], "leave one out"),
        (["--grid", "steps"], "no axis"),
        (["--grid", "steps=1,x"], "steps"),
        (["--show"], "no terminal"),
        (["--format", "gif"], "gif"),
        (["--set", "quality=0"], "quality"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(
    folder: Path, capfd: pytest.CaptureFixture[str], flags: list[object], complaint: str
) -> None:
    Path("text.png").write_text("A dog.")
    capfd.readouterr()
    assert limner("generate", "A dog.", "--model", folder, *flags) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert complaint in err
    assert not Path("pictures").exists()


# ---- many pictures


def test_the_best_of_several_is_that_of_the_model_s_own_clip(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = drawn(capfd, "(A dog:1.2)", "A cat.", "--model", folder, "--best-of", 5, "-n", 2)
    said = [provenance.read(path) for path in paths]
    assert [record["prompt"] for record in said] == ["(A dog:1.2)"] * 2 + ["A cat."] * 2
    assert all(record["best_of"] == 5 for record in said)
    clip = tiny_clip()
    tokenizer = tiny_tokenizer(Path("tokenizer"))
    for prompt, words, records in (("(A dog:1.2)", "A dog", said[:2]), ("A cat.", "A cat.", said[2:])):
        images = Model.load(str(folder), "cpu")(prompt, n=5).images
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
        ids = tokenizer(words, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            wanted = clip(input_ids=ids, pixel_values=pixels).logits_per_image[:, 0] / clip.logit_scale.exp()
        order = wanted.argsort(descending=True)
        assert [record["seed"] for record in records] == order[:2].tolist()
        assert [record["score"] for record in records] == pytest.approx(wanted[order[:2]].tolist(), abs=1e-5)
    assert replayed(capfd, paths[0]) == (0, ["identical"])


def test_without_a_clip_of_its_own_a_model_ranks_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(folder, "model", ignore=shutil.ignore_patterns("clip"))
    assert limner("generate", "A dog.", "--model", "./model", "--best-of", 2) == 2
    assert "no clip/ to rank pictures by" in capfd.readouterr().err


def test_a_grid_and_a_contact_sheet_come_with_the_pictures(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--grid", "steps=1,2,3 scheduler=euler,ddim", "--sheet"]
    paths = drawn(capfd, "A dog.", "--model", folder, "--format", "webp", *flags)
    assert [path.name for path in paths[-2:]] == ["grid.png", "sheet.png"]
    said = [provenance.read(path) for path in paths[:-2]]
    assert [(record["steps"], record["scheduler"]) for record in said] == [
        (steps, name) for steps in (1, 2, 3) for name in ("euler", "ddim")
    ]
    again = drawn(capfd, "A dog.", "--model", folder, "--grid", "seed=1,2")
    assert [path.name for path in again] == ["a-dog-1.png", "a-dog-2.png", "grid-2.png"]


def test_a_preview_is_there_while_the_picture_is_drawn(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = drawn(capfd, "A dog.", "--model", folder, "--preview", "now.png")
    with Image.open("now.png") as preview, Image.open(paths[0]) as picture:
        assert preview.size == picture.size
    assert sorted(path.name for path in Path().iterdir()) == ["mask.png", "now.png", "photo.png", "pictures"]


def test_pictures_are_shown_in_a_terminal(folder: Path) -> None:
    pytest.importorskip("textual_image")
    termios = pytest.importorskip("termios")
    shown, inner = os.openpty()
    termios.tcsetwinsize(inner, (40, 80))
    script = "from limner.cli import main; main()"
    command = [sys.executable, "-c", script, "generate", "A dog.", "--model", str(folder), "--show"]
    done = subprocess.run(command, stdin=inner, stdout=inner, stderr=subprocess.PIPE, check=False, timeout=300)
    text = os.read(shown, 1_000_000).decode()
    os.close(inner)
    os.close(shown)
    assert done.returncode == 0, done.stderr
    assert "pictures/a-dog-0.png" in text
    assert "▀" in text


# ---- drawn again


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_fresh_picture_is_identical(folder: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    flags = ["--negative", "snow", "--size", "24x32", "--scheduler", "euler_a", "--set", "quality=80"]
    [path] = drawn(capfd, "A {dog|cat}.", "--model", folder, "--format", kind, *flags)
    assert replayed(capfd, path) == (0, ["identical"])
    assert not Path("replayed").exists()


def test_a_token_with_a_colon_is_drawn_with_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file({"<a:toy>": torch.ones(1, WIDTH)}, "toy.safetensors")
    [path] = drawn(capfd, "A <a:toy>.", "--model", folder, "--embedding", "toy.safetensors")
    assert replayed(capfd, path) == (0, ["identical"])
    assert replayed(capfd, path, "--dry-run")[0] == 0


def test_weights_that_changed_are_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    [path] = drawn(capfd, "A dog.", "--model", folder)
    shutil.copytree(folder, "model")
    file = Path("model/unet/diffusion_pytorch_model.safetensors")
    weights = load_file(file)
    save_file({name: weight * 1.05 for name, weight in weights.items()}, file, {"format": "pt"})
    code, lines = replayed(capfd, path, "--model", "./model")
    assert code == 1
    assert lines[0].startswith("differs: in ")
    assert lines[1:] == ["  weights unet/diffusion_pytorch_model.safetensors has changed", "replayed/a-dog-0.png"]
    assert provenance.read(Path(lines[-1]))["model"]["ref"] == "./model"


def test_other_versions_and_pictures_to_begin_with_are_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    [path] = drawn(capfd, "A dog.", "--model", folder, "--image", "photo.png")
    said = provenance.read(path)
    said["versions"]["torch"] = "1.0"
    said["device"]["name"] = "abacus"
    with Image.open(path) as image:
        changed = provenance.save(image, said, Path("other"))
    code, lines = replayed(capfd, changed)
    assert (code, lines[0]) == (0, "identical")
    assert any(line.startswith("  version of torch: 1.0 then, ") for line in lines)
    assert any(line.startswith("  device name: abacus then, ") for line in lines)
    Image.new("RGB", (32, 32), "red").save("photo.png")
    code, lines = replayed(capfd, path)
    assert code == 1
    assert "  picture of image has changed" in lines
    Path("photo.png").unlink()
    assert limner("replay", path) == 2
    assert "photo.png can't be read" in capfd.readouterr().err


def test_a_picture_that_was_painted_over_differs_for_no_known_reason(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    [path] = drawn(capfd, "A dog.", "--model", folder)
    with Image.open(path) as image:
        image.putpixel((3, 3), (1, 2, 3))
        changed = provenance.save(image, provenance.read(path), Path("other"))
    code, lines = replayed(capfd, changed)
    assert (code, lines[0].split(",")[0]) == (1, "differs: in 0.4% of the pixels")
    assert "the file was changed" in lines[1]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "many"},
        {"steps": -1},
        {"seed": None},
        {"width": []},
        {"model": 3},
        {"model": {"ref": 7, "loras": []}},
        {"model": {"ref": "./none", "loras": [1]}},
        {"variation": [1]},
        {"image": "x"},
        {"prompt": ["A dog."]},
        {"strength": 0.5},
        {"steps": 3.5},
        {"seed": 7.0},
        {"quality": "best"},
        {"device": None},
        {"device": {"precision": "fp17"}},
        {"device": {"engine": "abacus"}},
        {"versions": 1},
        {"model": {"ref": "./none", "loras": [{"ref": "x", "weight": 1.0}]}},
    ],
)
def test_a_record_that_was_tampered_with_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], change: dict[str, object]
) -> None:
    [path] = drawn(capfd, "A dog.", "--model", folder)
    said = {**provenance.read(path), **change}
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("limner", json.dumps(said))
    Image.new("RGB", (4, 4)).save("x.png", pnginfo=info)
    capfd.readouterr()
    assert limner("replay", "x.png") == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("missing", ["model.weights", "model.scheduler", "device", "versions", "seed"])
def test_a_record_that_lacks_something_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], missing: str
) -> None:
    [path] = drawn(capfd, "A dog.", "--model", folder)
    said = provenance.read(path)
    *outer, last = missing.split(".")
    del (said[outer[0]] if outer else said)[last]
    with pytest.raises(DataError, match=f"can't be used \\({missing}: field required\\); another program changed it"):
        provenance.checked(path, said)


def test_a_replay_is_planned_without_drawing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    [path] = drawn(capfd, "A dog.", "--model", folder)
    code, lines = replayed(capfd, path, "--dry-run")
    assert code == 0
    assert any(line.split() == ["prompt", "A", "dog."] for line in lines)
    assert limner("replay", "photo.png") == 2
    assert "does not say how it was drawn" in capfd.readouterr().err
