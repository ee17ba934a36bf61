"""`limner evaluate` as a user calls it: figures that reproduce, a page that reads well, and refusals."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from browser import opened
from commands import limner
from limner.evaluation import plots
from limner.evaluation.attributes import PROMPTS
from limner.evaluation.sweeps import curves
from limner.generation import provenance
from limner.models.clip import HALF, Clip
from limner.stages import evaluate
from stages.conftest import prepared
from tiny import tiny_clip, tiny_model, tiny_text_encoder, tiny_tokenizer, tiny_unet
from trainings import shapes

ROOT = Path(__file__).parents[2]
SWEEP = "sweep-steps.png"
UNET = "diffusion_pytorch_model.safetensors"
FAST = ["--split", "val", "--steps", 2, "--device", "cpu", "--set", "attribute_seeds=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of this lies."""
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Path:
    """64 pictures of shapes, about a third in val."""
    return prepared(shapes(folder / "source", 64), folder / "data", val_share=0.3, test_share=0)


@pytest.fixture(scope="module")
def judge(folder: Path) -> Path:
    """A CLIP that no model reads its prompts with, of random weights that tell pictures apart."""
    return saved(folder / "judge", 7)


def saved(out: Path, seed: int, text: Any = None) -> Path:
    """The folder of a tiny CLIP, with that text tower where one is given."""
    network = tiny_clip(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)
    if text is not None:
        network.text_model.load_state_dict(text)
    Clip(network, tiny_tokenizer(out / "tokenizer"), HALF).save(out / "clip")
    return out


@pytest.fixture(scope="module")
def models(folder: Path) -> list[Path]:
    """Two models that differ in the U-Net."""
    return [tiny_model(folder / name, unet=tiny_unet(seed=seed)) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def evaluated(folder: Path, dataset: Path, judge: Path, models: list[Path]) -> Path:
    """Both models' evaluation."""
    out = folder / "out"
    assert limner("evaluate", *models, "--data", dataset, "--judge", judge, "--out", out, *FAST, *further(models)) == 0
    return out


def further(models: list[Path]) -> list[object]:
    """Another network that fidelity is measured by."""
    return ["--set", f'extractors=["clip:{saved(models[0].parent / "another", 8)}"]']


def metrics(out: Path) -> Any:
    """What an evaluation found."""
    return json.loads((out / "metrics.json").read_text())


def figures(row: Any) -> dict[str, dict[str, float]]:
    """Figures by name, those of the judge."""
    sections = {name: section for name, section in row["figures"].items() if not name.startswith("fidelity by")}
    return {name: figure for section in sections.values() for name, figure in section.items()}


def refused(capfd: pytest.CaptureFixture[str], *arguments: object, dry: bool = True) -> str:
    """The sentence with which a command is refused, and its dry run too."""
    sentences = set()
    for how in ([], ["--dry-run"]) if dry else ([],):
        capfd.readouterr()
        assert limner("evaluate", *arguments, *how) == 2
        sentences.add(capfd.readouterr().err.splitlines()[-1])
    (sentence,) = sentences
    assert sentence.startswith("limner: ")
    return sentence


# ---- figures


def test_every_figure_has_an_interval_around_it_and_its_count(evaluated: Path) -> None:
    found = metrics(evaluated)
    count = found["data"]["captions"]
    assert count > 12
    for row in found["contenders"]:
        (other,) = [of["name"] for of in found["extractors"]]
        sections = {"alignment", "fidelity", f"fidelity by {other}", "attributes", "copies", "vae", "cost"}
        assert set(row["figures"]) == sections
        for name, figure in figures(row).items():
            assert figure["low"] <= figure["value"] <= figure["high"], name
            assert figure["count"] >= 1
        assert {figure["count"] for figure in row["figures"]["alignment"].values()} == {count}
        assert len(row["sha256"]) == 64
        assert row["steps"] == 2
        assert row["width"] == 16
        assert row["figures"]["attributes"]["object"]["count"] == 9, "pictures, each of which is in two pairs"
        assert row["figures"]["attributes"]["all"]["count"] == len(PROMPTS)
    assert found["judge"]["network"]["filter"] == "lanczos"
    assert found["seeds"] == [0, count - 1]
    assert "alignment" in found["photographs"]["figures"]
    assert "fidelity" in found["photographs"]["figures"]


def test_two_models_are_compared_on_the_same_prompts(evaluated: Path) -> None:
    found = metrics(evaluated)
    (comparison,) = found["comparisons"]
    assert (comparison["one"], comparison["other"]) == ("two", "one")
    one, two = map(figures, found["contenders"])
    for name, difference in comparison["figures"].items():
        assert difference["value"] == pytest.approx(two[name]["value"] - one[name]["value"], abs=1e-9), name
        assert 0 < difference["p"] <= 1


def test_numbers_of_each_picture_are_kept(evaluated: Path) -> None:
    rows = [json.loads(line) for line in (evaluated / "scores.jsonl").read_text().splitlines()]
    found = metrics(evaluated)
    for row in found["contenders"]:
        own = [line["clip_score"] for line in rows if line["contender"] == row["label"]]
        assert sum(own) / len(own) == pytest.approx(figures(row)["clip_score"]["value"])


def test_drawn_anew_with_another_batch_the_figures_are_the_same(
    folder: Path, dataset: Path, judge: Path, models: list[Path], evaluated: Path
) -> None:
    out = folder / "anew"
    given = ["--data", dataset, "--judge", judge, "--out", out, *FAST, *further(models), "--set", "batch_size=5"]
    try:
        assert limner("evaluate", *models, *given, "--set", "threads=2") == 0
    finally:
        torch.set_num_threads(1)
    before, after = metrics(evaluated), metrics(out)
    for name in ("copies", "photographs", "contenders"):
        assert leaves(after[name]) == pytest.approx(leaves(before[name]), rel=1e-6, abs=1e-6), name
    # the difference of two figures of 3 or less, either of which may be off by 1e-6 of itself
    assert leaves(after["comparisons"]) == pytest.approx(leaves(before["comparisons"]), rel=1e-6, abs=6e-6)


def leaves(found: Any, path: str = "") -> dict[str, float]:
    """All numbers in what JSON holds, by where they stand, but for what depends on the machine."""
    if isinstance(found, float | int):
        return {path: found}
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    known = [leaves(value, f"{path}/{key}") for key, value in items if key not in ("cost", "device")]
    return {where: number for part in known for where, number in part.items()}


def test_again_with_another_batch_and_more_threads_draws_nothing_and_finds_the_same(
    folder: Path, dataset: Path, judge: Path, models: list[Path], evaluated: Path
) -> None:
    before = metrics(evaluated)
    drawn = {file: file.stat().st_mtime_ns for file in evaluated.rglob("*.png")}
    again = ["--set", "batch_size=3", "--set", "threads=2", "--set", f"cache={folder / 'fresh'}"]
    try:
        assert limner("evaluate", *models, "--data", dataset, "--judge", judge, "--out", evaluated, *FAST, *again) == 0
    finally:
        torch.set_num_threads(1)
    assert {file: file.stat().st_mtime_ns for file in evaluated.rglob("*.png")} == drawn
    for old, new in zip(before["contenders"], metrics(evaluated)["contenders"]):
        for name, figure in figures(old).items():
            assert figures(new)[name] == pytest.approx(figure, rel=1e-6, abs=1e-6), name


def test_the_first_captions_alone_have_the_rivals_and_the_threshold_of_all(
    folder: Path, dataset: Path, judge: Path, models: list[Path], evaluated: Path
) -> None:
    out = folder / "few"
    shutil.copytree(evaluated / "pictures" / "one", out / "pictures" / "one")
    shutil.copy(evaluated / "config.json", out)
    assert limner("evaluate", models[0], "--data", dataset, "--judge", judge, "--out", out, *FAST, "-n", 4) == 0
    few, all_of_them = metrics(out), metrics(evaluated)
    assert leaves(few["copies"]) == pytest.approx(leaves(all_of_them["copies"]))
    assert few["copies"]["copies_by_pixels"]["photographs"] == all_of_them["data"]["captions"]
    assert few["data"] == {**all_of_them["data"], "captions": 4}
    assert few["photographs"]["figures"]["fidelity"]["cmmd"]["count"] == 4
    some, whole = ((folder / name / "scores.jsonl").read_text().splitlines() for name in ("few", "out"))
    rows = [json.loads(line) for line in whole]
    wanted = [row for name in ("photographs", "one") for row in [row for row in rows if row["contender"] == name][:4]]
    found = [json.loads(line) for line in some]
    assert [row["caption"] for row in found] == [row["caption"] for row in wanted]
    assert leaves(found) == pytest.approx(leaves(wanted), rel=1e-5)


def test_a_picture_that_another_setting_drew_or_that_is_broken_is_drawn_again(
    folder: Path, dataset: Path, models: list[Path], evaluated: Path
) -> None:
    out = folder / "again"
    shutil.copytree(evaluated / "pictures" / "one", out / "pictures" / "one")
    shutil.copy(evaluated / "config.json", out)
    files = sorted((out / "pictures" / "one").glob("*.png"))
    contents = [file.read_bytes() for file in files]
    files[0].write_bytes(files[1].read_bytes())
    files[2].write_bytes(b"broken")
    assert limner("evaluate", models[0], "--data", dataset, "--out", out, *FAST, "--set", "copies=false") == 0
    assert [file.read_bytes() for file in files] == contents


def test_other_settings_leave_no_figures_of_those_before(
    folder: Path, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(evaluated, folder / "changed")
    given = ["--config", evaluated / "config.json", "--out", out]

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("limner.evaluation.drawing.draw", killed)
    assert limner("evaluate", *given) == 130
    assert metrics(out) == metrics(evaluated), "which the same settings found"
    assert limner("evaluate", *given, "-n", 4) == 130
    assert not [name for name in ("metrics.json", "scores.jsonl", "report.html") if (out / name).exists()]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX locks")
def test_no_two_processes_write_into_one_evaluation(
    folder: Path, evaluated: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(evaluated, folder / "busy")
    script = f"from pathlib import Path; from limner.artifacts import alone\nwith alone(Path({str(out)!r})): "
    command = [sys.executable, "-c", f"{script}print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        given = ["--config", evaluated / "config.json", "--out", out, "-n", 4]
        assert "Another process is at work in" in refused(capfd, *given, dry=False)
        process.kill()
    for name in ("config.json", "metrics.json"):
        assert (out / name).read_bytes() == (evaluated / name).read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs OpenVINO")
def test_another_engine_draws_what_torch_drew_anew(
    folder: Path, dataset: Path, models: list[Path], evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMNER_CACHE", str(folder / "cache"))
    out = folder / "openvino"
    shutil.copytree(evaluated / "pictures" / "one", out / "pictures" / "one")
    shutil.copy(evaluated / "config.json", out)
    given = ["--data", dataset, "--out", out, *FAST, "--set", "copies=false", "--engine", "openvino"]
    assert limner("evaluate", models[0], *given) == 0
    engines = {provenance.read(file)["device"]["engine"] for file in out.rglob("pictures/**/*.png")}
    assert engines == {"openvino"}


def test_a_sweep_of_steps_is_one_contender_each_and_a_plot(folder: Path, dataset: Path, models: list[Path]) -> None:
    out = folder / "sweep"
    steps = ["--steps", 1, "--steps", 3, "--device", "cpu", "--split", "val", "-n", 4]
    sets = ["--set", "attribute_seeds=0", "--set", "copies=false"]
    assert limner("evaluate", models[0], "--data", dataset, "--out", out, *steps, *sets) == 0
    assert [row["label"] for row in metrics(out)["contenders"]] == ["one, 1 step", "one, 3 steps"]
    assert [file.name for file in out.glob("sweep-*.png")] == ["sweep-steps.png"]
    assert metrics(out)["left_out"][0].startswith("There is no judge")


def test_models_whose_names_differ_in_signs_have_folders_and_curves_of_their_own(
    folder: Path, dataset: Path, models: list[Path], evaluated: Path
) -> None:
    named = [shutil.copytree(model, folder / name) for model, name in zip(models, ("run_1", "run-1"))]
    out, sets = folder / "signs", ["--set", "attribute_seeds=0", "--set", "copies=false"]
    steps = ["--steps", 1, "--steps", 3, "--steps", 3, "--device", "cpu", "--split", "val", "-n", 4]
    assert limner("evaluate", *named, "--data", dataset, "--out", out, *steps, *sets) == 0
    rows = metrics(out)["contenders"]
    assert [row["label"] for row in rows] == [
        f"{name}, {n}" for name in ("run_1", "run-1") for n in ("1 step", "3 steps")
    ]
    drawn = [file.read_bytes() for file in sorted(out.glob("pictures/*/mission/1.png"))]
    assert len(drawn) == len(set(drawn)) == 4
    found = [(label, [x for x, _ in curve]) for label, curve in curves("steps", rows, None)]
    assert found == [("run_1", [1, 3]), ("run-1", [1, 3])]
    assert [label for label, _ in curves("steps", rows, "steps")] == [""], "where the models differ in it, all are one"
    assert curves("steps", rows[::3], None) == []


# ---- the page


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1440, False)])
def test_the_page_reads_well_in_a_browser(evaluated: Path, width: int, dark: bool) -> None:
    with opened(evaluated / "report.html", width=width, dark=dark) as shown:
        assert shown.said == []
        assert shown.missing == []
        assert shown.too_wide == 0
        text = shown.page.inner_text("body")
        smallest = shown.page.evaluate(
            "Math.min(...[...document.querySelectorAll('body *')].filter(one => one.innerText)"
            ".map(one => parseFloat(getComputedStyle(one).fontSize)))"
        )
        unnamed = shown.page.evaluate("[...document.images].filter(i => !i.alt.trim()).length")
        paper, ink = (
            shown.page.evaluate(f"getComputedStyle(document.body).{of}") for of in ("backgroundColor", "color")
        )
    assert smallest >= 11
    assert unnamed == 0
    assert brightness(paper) > brightness(ink) + 100 if not dark else brightness(ink) > brightness(paper) + 100
    assert text.index("A golden retriever playing in a field.") < text.index("A toddler playing in a sandbox.")
    assert text.index("A toddler playing in a sandbox.") < text.index("A dot is the value")
    assert "two, compared with one" in text
    value = figures(metrics(evaluated)["contenders"][0])["clip_score"]["value"]
    assert f"{value:.3g}" in text


def brightness(colour: str) -> float:
    """Of a colour as browsers tell it, from 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_the_page_needs_nothing_from_elsewhere(evaluated: Path) -> None:
    html = (evaluated / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert "<script" not in html


# ---- the built-in model's report


def test_the_report_of_the_documentation_tells_what_was_found(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("docs_report", ROOT / "docs" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "docs_report", made)
    spec.loader.exec_module(made)
    monkeypatch.setattr(made, "FOLDER", tmp_path)
    rows = metrics(evaluated)["contenders"]
    plots.plot_sweep("steps", [("", [(1.0, figures(row)) for row in rows])], evaluated / SWEEP)
    part = made.Part("clip", "Base against tuned", "One and two.", [], ["clip_score", "cmmd", "psnr"])
    text = made.section(part, "limner evaluate one two", evaluated)
    (evaluated / SWEEP).unlink()
    assert "| figure | photographs | one | two |" in text
    for row in metrics(evaluated)["contenders"]:
        assert f"| {figures(row)['cmmd']['value']:.3g} (" in text
    assert "two differs from one in " in text
    for name in re.findall(r"\]\((.+?)\)", text):
        with Image.open(tmp_path / name) as image:
            assert image.format == "WEBP"
    assert {file.name for file in tmp_path.iterdir()} == {"clip.webp", "sweep-steps.webp"}


# ---- checkpoints


def test_checkpoints_of_a_training_are_drawn_with_and_plotted(
    data: Path, unet: Path, clip: Path, vae: Path, judge: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [unet, "--checkpoints", "--data", data, "--judge", judge, "--out", tmp_path / "out", *FAST, "-n", 4]
    assert limner("evaluate", *given, "--dry-run") == 0
    assert "after 16, 32 images" in capfd.readouterr().out
    assert not (tmp_path / "out").exists()
    assert limner("evaluate", *given, "--set", "copies=false") == 0
    rows = metrics(tmp_path / "out")["contenders"]
    assert [row["settings"]["images seen"] for row in rows] == [16, 32]
    assert figures(rows[0])["clip_score"]["value"] != figures(rows[1])["clip_score"]["value"]
    assert (tmp_path / "out" / "sweep-images-seen.png").is_file()
    models = sorted((tmp_path / "out" / "checkpoints").iterdir())
    ends = [load_file(folder / "unet" / UNET) for folder in (models[1], unet / "model")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), "the last checkpoint is the result"
    assert any(not torch.equal(ends[1][name], weight) for name, weight in load_file(models[0] / "unet" / UNET).items())

    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "checkpoints").rglob("*")}
    assert limner("evaluate", "--config", tmp_path / "out" / "config.json") == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "checkpoints").rglob("*")} == written


def test_what_has_no_checkpoints_is_refused(
    capfd: pytest.CaptureFixture[str], given: list[object], clip: Path, unet: Path, tmp_path: Path
) -> None:
    assert "is no finished run of limner train unet" in refused(capfd, clip, "--checkpoints", *given)
    assert "is no finished run of limner train unet" in refused(capfd, "builtin", "--checkpoints", *given)
    assert "name its run alone" in refused(capfd, unet, clip, "--checkpoints", *given)
    shutil.copytree(unet, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "keeps no checkpoints" in refused(capfd, tmp_path / "run", "--checkpoints", *given)


# ---- folders of pictures


def test_real_photographs_as_pictures_reach_the_ceiling(folder: Path, dataset: Path, judge: Path) -> None:
    out = folder / "real"
    given = ["--images", dataset / "val", "--data", dataset, "--split", "val", "--judge", judge, "--out", out]
    assert limner("evaluate", *given) == 0
    (row,), real = metrics(out)["contenders"], metrics(out)["photographs"]
    assert row["figures"]["alignment"] == real["figures"]["alignment"]
    assert figures(row)["frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert figures(row)["precision"]["value"] == 1


def test_training_photographs_as_pictures_are_all_copies(folder: Path, dataset: Path, judge: Path) -> None:
    out = folder / "train"
    given = ["--images", dataset / "train", "--data", dataset, "--split", "val", "--judge", judge, "--out", out]
    assert limner("evaluate", *given) == 0
    (row,) = metrics(out)["contenders"]
    assert figures(row)["copies_by_features"]["value"] == 1
    assert figures(row)["copies_by_pixels"]["value"] == 1


def test_training_photographs_written_anew_and_smaller_are_copies_too(
    folder: Path, dataset: Path, judge: Path, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = [json.loads(line) for line in (dataset / "train" / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        with Image.open(dataset / "train" / row["file_name"]) as image:
            smaller = image.convert("RGB").resize((image.width * 3 // 4, image.height * 3 // 4))
        smaller.save(pictures / f"{Path(row['file_name']).stem}.jpg", quality=95, subsampling=0)
        (pictures / f"{Path(row['file_name']).stem}.txt").write_text(row["captions"][0])
    given = ["--images", pictures, "--data", dataset, "--split", "val", "--judge", judge, "--out", tmp_path / "out"]
    assert limner("evaluate", *given) == 0
    (row,) = metrics(tmp_path / "out")["contenders"]
    assert figures(row)["copies_by_pixels"]["value"] >= 0.99
    assert figures(row)["copies_by_features"]["value"] >= 0.9, "of random weights, to which shapes are much alike"


@pytest.fixture
def pictures(evaluated: Path, tmp_path: Path) -> Path:
    """Pictures that are named as the photographs, without anything beside them."""
    out = tmp_path / "pictures"
    out.mkdir()
    for file in (evaluated / "pictures" / "one").glob("*.png"):
        shutil.copy(file, out)
    return out


def test_broken_pictures_and_other_sizes_are_counted_and_named(
    dataset: Path, judge: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, *rest = sorted(pictures.iterdir())
    first.write_bytes(second.read_bytes()[:80])
    with Image.open(second) as image:
        image.resize((40, 24)).save(second)
    out = tmp_path / "out"
    given = ["--images", pictures, "--data", dataset, "--split", "val", "--judge", judge, "--out", out]
    assert limner("evaluate", *given, "--set", "copies=false") == 0
    (row,) = metrics(out)["contenders"]
    assert row["pictures"] == 1 + len(rest)
    assert [line["file"] for line in row["skipped"]] == [first.name]
    assert row["remarks"][0] == f"1 picture can't be read and is left out: {first.name}."
    assert row["remarks"][1].startswith(f"1 of {1 + len(rest)} pictures are not 16x16")
    assert f"pictures: {row['remarks'][0]}" in caplog.messages
    assert metrics(out)["copies"] == {}
    assert metrics(out)["photographs"]["figures"]["fidelity"]["cmmd"]["count"] == metrics(out)["data"]["captions"]
    assert row["remarks"][0].replace("'", "&#39;") in (out / "report.html").read_text()


# ---- refusals


@pytest.fixture
def given(dataset: Path, tmp_path: Path) -> Iterator[list[object]]:
    """What every command below has, after which nothing is there."""
    yield ["--data", dataset, "--split", "val", "--out", tmp_path / "out"]
    assert not (tmp_path / "out").exists()


def test_pictures_without_captions_are_refused(
    capfd: pytest.CaptureFixture[str], given: list[object], pictures: Path
) -> None:
    first, *rest = sorted(pictures.iterdir())
    first.rename(pictures / "stranger.png")
    sentence = refused(capfd, "--images", pictures, *given)
    assert f"{1 + len(rest)} pictures, of which 1 have no caption (stranger.png); write them" in sentence


def test_an_empty_folder_is_refused(capfd: pytest.CaptureFixture[str], given: list[object], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused(capfd, "--images", tmp_path / "empty", *given)
    assert "There is no folder" in refused(capfd, "--images", tmp_path / "nowhere", *given)


def test_the_same_twice_is_refused(capfd: pytest.CaptureFixture[str], given: list[object], models: list[Path]) -> None:
    roundabout = models[0].parent / "." / models[0].name / ".." / models[0].name
    assert "is given twice" in refused(capfd, models[0], roundabout, *given)
    assert "is given twice" in refused(capfd, "builtin", "builtin", *given)
    twice = ["--set", 'extractors=["clip:builtin", "clip:builtin"]']
    assert "have one name" in refused(capfd, "builtin", *twice, *given)


def test_nothing_to_score_is_refused(capfd: pytest.CaptureFixture[str], given: list[object]) -> None:
    assert "There is nothing to score; name a model" in refused(capfd, *given)


def test_settings_that_do_not_fit_are_refused(
    capfd: pytest.CaptureFixture[str], given: list[object], models: list[Path]
) -> None:
    assert "steps must be from 1 to 1000" in refused(capfd, *models, "--steps", 0, *given)
    assert "x has 1 numbers for 2 models" in refused(capfd, *models, "--set", "x=[1]", *given)
    assert "0 captioned pictures in test; 4 are" in refused(capfd, *models, *given, "--split", "test")


def test_a_judge_of_nan_is_named(
    capfd: pytest.CaptureFixture[str], dataset: Path, models: list[Path], pictures: Path, tmp_path: Path
) -> None:
    network = tiny_clip(7)
    with torch.no_grad():
        network.visual_projection.weight.fill_(torch.nan)
    Clip(network, tiny_tokenizer(tmp_path / "nan" / "tokenizer"), HALF).save(tmp_path / "nan" / "clip")
    given = ["--images", pictures, "--data", dataset, "--split", "val", "--out", tmp_path / "out"]
    assert "sees no numbers in the picture" in refused(capfd, *given, "--judge", tmp_path / "nan", dry=False)
    assert "sees no numbers in the picture" in refused(
        capfd, models[0], *given[2:], "--judge", tmp_path / "nan", dry=False
    )
    assert not (tmp_path / "out" / "pictures").exists(), "it is told before anything is drawn"


def test_what_the_report_needs_is_asked_for_at_once(
    capfd: pytest.CaptureFixture[str], given: list[object], models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    assert "The report needs jinja2; install with: pip install 'limner[eval]'" in refused(capfd, models[0], *given)


def test_the_clip_that_conditions_a_model_is_no_judge(
    capfd: pytest.CaptureFixture[str], dataset: Path, models: list[Path], tmp_path: Path
) -> None:
    text = {name: weight.bfloat16().float() for name, weight in tiny_text_encoder().state_dict().items()}
    own = saved(tmp_path / "own", 3, text)
    given = [models[0], "--data", dataset, "--judge", own, "--out", tmp_path / "out", *FAST, "-n", 4]
    assert f"The judge is the very CLIP that {models[0]} reads" in refused(capfd, *given)
    allowed = ["--set", "allow_conditioning_judge=true", "--set", "copies=false"]
    assert limner("evaluate", *given, *allowed) == 0
    assert [row["judge_is_condition"] for row in metrics(tmp_path / "out")["contenders"]] == [True]
    assert "is judged by the very CLIP" in (tmp_path / "out" / "report.html").read_text()


def test_another_folder_is_not_written_into(capfd: pytest.CaptureFixture[str], dataset: Path, pictures: Path) -> None:
    given = ["--images", pictures, "--data", dataset, "--split", "val", "--out", pictures]
    assert "exists and holds no evaluation" in refused(capfd, *given)


def test_a_dry_run_tells_and_writes_nothing(
    capfd: pytest.CaptureFixture[str], given: list[object], models: list[Path]
) -> None:
    assert limner("evaluate", *models, *given, "-n", 4, "--dry-run") == 0
    told = capfd.readouterr().out
    assert "4 of val" in told
    assert "one, two" in told
