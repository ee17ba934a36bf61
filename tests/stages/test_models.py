"""`limner models`, `doctor` and `bench` as a user calls them, on tiny real models."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from commands import limner
from limner.artifacts import read_json, sha256
from limner.data.dataset import read_split
from limner.evaluation.agreement import clip_score
from limner.evaluation.extractors import features_of
from limner.evaluation.yardstick import Yardstick
from limner.generation import catalogue
from limner.generation.language import literal
from limner.generation.model import Model
from limner.models import export, loading
from tiny import tiny_clip, tiny_model, tiny_text_encoder, tiny_tokenizer, tiny_unet

FORMATS = {"onnx": ("onnxruntime", "onnxscript"), "openvino": ("openvino",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a card, a CLIP and defaults."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny", "dpm-flow")
    (folder / "manifest.json").write_text(json.dumps({"defaults": {"steps": 3, "guidance": 4.0}}))
    (folder / "README.md").write_text("---\nlicense: openrail\ntags:\n- x\n---\n# Tiny")
    tiny_clip().save_pretrained(folder / "clip")
    tiny_tokenizer(folder / "clip")
    return folder


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def said(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What a command prints, or says where it fails."""
    capfd.readouterr()
    assert limner(*arguments) == code
    out, err = capfd.readouterr()
    return out if code == 0 else err


# ---- list and show


def test_models_of_a_folder_are_listed_also_broken_ones(folder: Path, capfd: Any, tmp_path: Path) -> None:
    good, broken = tmp_path / "deep" / "er" / "good", tmp_path / "broken"
    shutil.copytree(folder, good)
    shutil.copytree(folder, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 100)
    rows = {row["model"]: row for row in json.loads(said(capfd, "models", "list", tmp_path, "--json"))}
    weights = [p for part in ("unet", "vae", "text_encoder") for p in (folder / part).glob("*.safetensors")]
    found = rows[str(good)]
    assert found["bytes"] == sum(p.stat().st_size for p in weights)
    assert (found["licence"], found["pixels"], found["fits"]) == ("openrail", "16x16", "yes")
    assert "can't be read" in rows[str(broken)]["error"]
    shown = said(capfd, "models", "list", tmp_path)
    assert "openrail" in shown
    assert "can't be used" in shown


def test_a_model_is_shown_with_hashes_and_counts(folder: Path, capfd: Any) -> None:
    facts = json.loads(said(capfd, "models", "show", folder, "--json"))
    assert facts["parts"]["unet"]["parameters"] == sum(p.numel() for p in tiny_unet().parameters())
    for part, about in facts["parts"].items():
        assert about["sha256"] == {file.name: sha256(file) for file in (folder / part).glob("*.safetensors")}
    assert set(facts["parts"]) == {"text_encoder", "unet", "vae", "clip"}
    assert (facts["steps"], facts["guidance"], facts["licence"]) == (3, 4.0, "openrail")
    assert facts["needs"]["low_memory"] < facts["needs"]["bf16"] < facts["needs"]["fp32"]
    shown = said(capfd, "models", "show", folder)
    assert facts["parts"]["unet"]["sha256"]["diffusion_pytorch_model.safetensors"] in shown


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ('---\nlicense: other\nlicense_name: "my-terms"\n---\n', "my-terms"),
        ("# Model\n\n## Data and licence\n\nAsk.", "see README.md"),
        ("license: mit", "unknown"),
    ],
)
def test_licences_are_read_off_cards(tmp_path: Path, card: str, expected: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert catalogue.licence(tmp_path) == expected


def test_what_fits_follows_from_what_is_free(folder: Path) -> None:
    found = catalogue.look_into("tiny", folder)
    needs = [found.memory("fp32"), found.memory("bf16"), found.memory("bf16", low_memory=True)]
    assert needs == sorted(needs, reverse=True)
    verdicts = [found.fitting(need) for need in [*needs, needs[-1] - 1]]
    assert verdicts == ["yes", "with --precision bf16", "with --low-memory", "no"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["list", "nowhere"], "There is no folder nowhere"),
        (["show", "nobody/nothing"], "limner models pull nobody/nothing"),
        (["show", "./nowhere"], "There is no model folder"),
        (["pull", "builtin"], "is here already, or no hub id"),
    ],
)
def test_what_is_not_there_is_said(capfd: Any, arguments: list[str], complaint: str) -> None:
    assert complaint in said(capfd, "models", *arguments, code=2)


def test_plans_fetch_nothing(capfd: Any, tmp_path: Path) -> None:
    for arguments in (["bench"], ["models", "export", "--to", "openvino"]):
        plan = said(capfd, *arguments, "nobody/nothing", "--out", tmp_path / "out", "--dry-run")
        assert "nobody/nothing, to be fetched" in plan
    assert not list(tmp_path.iterdir())


# ---- export


def theirs(to: str, file: Path, inputs: dict[str, Tensor]) -> Tensor:
    """What the other program computes of an exported network."""
    arrays = {name: value.numpy() for name, value in inputs.items()}
    if to == "onnx":
        from onnxruntime import InferenceSession

        return torch.from_numpy(InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, arrays)[0])
    core = export.import_openvino().Core()
    compiled = core.compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(arrays)[0])


@pytest.mark.parametrize("to", FORMATS)
def test_exported_networks_agree_with_torch(folder: Path, capfd: Any, tmp_path: Path, to: Any) -> None:
    if absent := [name for name in FORMATS[to] if find_spec(name) is None]:
        pytest.skip(f"needs {absent[0]}")
    out = tmp_path / "exported"
    said(capfd, "models", "export", folder, "--to", to, "--out", out, "--size", "24x32")
    about = read_json(out / "export.json")
    assert about["weights"]["unet"] == loading.identity(str(folder), "unet")
    assert about["networks"]["unet"]["inputs"]["latents"] == [2, 4, 16, 12]
    for network in export.networks(str(folder), (24, 32), guided=True):
        torch.manual_seed(1)  # other numbers than those that were traced
        inputs = {
            name: torch.randint_like(value, 500) if value.dtype == torch.int64 else torch.randn_like(value)
            for name, value in network.inputs.items()
        }
        with torch.no_grad():
            ours = network.module.eval()(*inputs.values())
        found = theirs(to, out / about["networks"][network.name]["file"], inputs)
        assert ours.std() > 1e-3
        assert_close(found, ours, atol=1e-4, rtol=1e-3)
    assert sys.modules.get("openvino_telemetry") is None, "nobody is told of it"


def test_an_export_replaces_no_other_folder(folder: Path, capfd: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    complaint = said(capfd, "models", "export", folder, "--to", "onnx", "--out", tmp_path, code=2)
    assert "is no export" in complaint
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_without_the_other_program_its_extra_is_named(
    folder: Path, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limner.models.export.find_spec", lambda name: None)
    complaint = said(capfd, "models", "export", folder, "--to", "openvino", "--out", tmp_path / "e", code=2)
    assert "pip install 'limner[openvino]'" in complaint
    assert not (tmp_path / "e").exists()


# ---- doctor and bench


def test_the_doctor_says_what_is_there_and_what_is_faster(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limner.stages.doctor.BUDGET", 0.01)
    found = json.loads(said(capfd, "doctor", "--json"))
    assert found["processor"]["cores"] >= 1
    assert 0 < found["memory"]["free"] <= found["memory"]["bytes"]
    assert found["uses"]["precision"] in ("fp32", "bf16")
    assert all(rate > 0 for rates in found["faster"].values() for rate in rates.values())
    assert said(capfd, "doctor").count("times as fast") == 2


def test_bench_draws_the_curve_of_a_judge_over_a_datasets_captions(
    folder: Path, data: Path, no_val: Path, capfd: Any, tmp_path: Path
) -> None:
    clips = {"judge": tiny_clip(9), "own": tiny_clip()}
    clips["own"].text_model.load_state_dict(tiny_text_encoder().state_dict())
    for name, clip in clips.items():
        clip.save_pretrained(tmp_path / name)
        tiny_tokenizer(tmp_path / name)
    flags = ["--steps", 1, "--steps", 3, "--precisions", "fp32", "--precisions", "bf16", "--data", data, "-n", 3]
    assert "pictures  14" in said(capfd, "bench", folder, *flags, "--out", tmp_path / "out", "--dry-run")
    said(capfd, "bench", folder, *flags, "--judge", tmp_path / "judge", "--out", tmp_path / "out")
    found = read_json(tmp_path / "out" / "bench.json")
    assert found["prompts"] == [record.captions[0] for record in read_split(data, "val")][:3]
    assert "judge" in found["score"]
    assert [(row["precision"], row["steps"]) for row in found["rows"]] == [
        (p, n) for p in ("fp32", "bf16") for n in (1, 3)
    ]
    assert all(row["seconds"] > 0 for row in found["rows"])
    evaluated = tmp_path / "evaluated"
    pictures = Model.load(str(folder), precision="fp32")([literal(prompt) for prompt in found["prompts"]], steps=3)
    judge = Yardstick.find(str(tmp_path / "judge"))
    files = [picture.save(evaluated) for picture in pictures.pictures]
    seen = judge.embed(features_of(judge.extractor, files, batch_size=2, cache=tmp_path / "cache"))
    expected = clip_score(judge.text_features(found["prompts"]), seen).mean().item()
    assert found["rows"][1]["score"] == pytest.approx(expected, abs=1e-5)
    with Image.open(tmp_path / "out" / "bench.png") as plot:
        assert plot.width > 500
    refused = said(capfd, "bench", folder, "--judge", tmp_path / "own", "--out", tmp_path / "no", code=2)
    assert "reads its prompts with" in refused
    for flags in ([], ["--dry-run"]):
        refused = said(capfd, "bench", folder, "--data", no_val, "--out", tmp_path / "no", *flags, code=2)
        assert "no captioned pictures in its val split" in refused
    assert "prompts" in said(capfd, "bench", folder, "--set", "prompts=[]", "--dry-run", code=2)
    assert not (tmp_path / "no").exists()


def test_without_matplotlib_bench_draws_nothing(
    folder: Path, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limner.stages.bench.find_spec", lambda _: None)
    assert "pip install 'limner[eval]'" in said(capfd, "bench", folder, "--out", tmp_path / "no", code=2)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "plan"])
def test_bench_measures_nothing_that_it_could_not_end(
    folder: Path, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry: list[str]
) -> None:
    monkeypatch.setattr("limner.stages.bench.measure", lambda *_: pytest.fail("it began to measure"))
    (tmp_path / "file").touch()
    refused = said(capfd, "bench", folder, "--out", tmp_path / "file" / "bench", *dry, code=2)
    assert "file is a file; choose another --out" in refused
    monkeypatch.setattr("limner.models.export.find_spec", lambda _: None)
    flags = ["--engines", "torch", "--engines", "openvino", "--out", tmp_path / "no"]
    assert "pip install 'limner[openvino]'" in said(capfd, "bench", folder, *flags, *dry, code=2)
    assert not (tmp_path / "no").exists()


def test_bench_judges_with_the_models_own_clip(folder: Path, capfd: Any, tmp_path: Path) -> None:
    flags = ["--steps", 2, "--steps", 2, "--schedulers", "euler", "--schedulers", "ddim", "--out", tmp_path]
    plan = dict(line.split(None, 1) for line in said(capfd, "bench", folder, *flags, "--dry-run").splitlines())
    assert (plan["settings"], plan["pictures"]) == ("2", "9")
    said(capfd, "bench", folder, *flags)
    rows = read_json(tmp_path / "bench.json")["rows"]
    assert [row["scheduler"] for row in rows] == ["euler", "ddim"]
    assert all(-1 <= row["score"] <= 1 for row in rows)
    plain = tiny_model(tmp_path / "plain")
    assert "no clip folder" in said(capfd, "bench", plain, "--out", tmp_path / "other", code=2)
