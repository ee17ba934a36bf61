"""`limner generate` as a user calls it: pictures, prompts from everywhere, and refusals that leave nothing behind."""

from __future__ import annotations

import io
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import limner, no_special_rights
from limner.generation import provenance
from tiny import tiny_model, tiny_unet

LIMNER = [sys.executable, "-c", "from limner.cli import main; main()", "generate"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that draws 16x16 pixels, in 3 steps."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "tiny", "dpm-flow")
    (folder / "manifest.json").write_text(json.dumps({"defaults": {"steps": 3, "guidance": 4.0}}))
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder_without_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield


def pictures(folder: Path = Path("pictures")) -> list[str]:
    """Every file in the folder for pictures."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- pictures


def test_pictures_are_drawn_and_their_paths_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert limner("generate", "A dog.", "A cat.", "-n", 2, "--seed", 7, "--model", folder, "--out", "out") == 0
    out, err = capfd.readouterr()
    names = ["a-dog-7.png", "a-dog-8.png", "a-cat-7.png", "a-cat-8.png"]
    assert out.splitlines() == [f"out/{name}" for name in names]
    assert pictures(Path("out")) == sorted(names)
    assert err.splitlines()[1:] == [], "a line of progress and nothing else"
    record = provenance.read(Path("out/a-cat-8.png"))
    expected = {"prompt": "A cat.", "seed": 8, "steps": 3, "guidance": 4.0, "width": 16, "height": 16}
    assert expected.items() <= record.items()


def test_every_flag_reaches_the_picture(folder: Path) -> None:
    flags = ["--steps", 2, "--guidance", 3, "--negative", "snow", "--size", "24x32", "--device", "cpu"]
    flags += ["--scheduler", "euler_a", "--set", "guidance_rescale=0.7"]
    assert limner("generate", "A dog.", "--model", folder, *flags) == 0
    record = provenance.read(Path("pictures/a-dog-0.png"))
    expected = {"steps": 2, "guidance": 3.0, "negative": "snow", "width": 24, "height": 32}
    expected |= {"scheduler": "euler_a", "guidance_rescale": 0.7}
    assert expected.items() <= record.items()


def test_a_size_other_than_trained_is_warned_of(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [*LIMNER, "A dog.", "A cat.", "--model", str(folder), "--size", "24x32"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    warning, *others = done.stderr.splitlines()
    assert warning == f"{folder} was trained at 16x16 pixels; pictures of 24x32 may be worse."
    assert [line.split()[0] for line in others] == ["Drawing"]


def test_an_embedding_and_alternatives_reach_the_picture(folder: Path) -> None:
    save_file({"emb_params": torch.randn(2, 32)}, "toy.safetensors")
    flags = ["--embedding", "toy.safetensors:my-toy", "-n", 3]
    assert limner("generate", "A (my-toy:1.2) on {red|blue|green}.", "--model", folder, *flags) == 0
    records = [provenance.read(Path("pictures") / name) for name in pictures()]
    assert [record["model"]["embeddings"][0]["token"] for record in records] == ["my-toy"] * 3
    assert {record["template"] for record in records} == {"A (my-toy:1.2) on {red|blue|green}."}
    assert all(record["prompt"].startswith("A (my-toy:1.2) on ") and "{" not in record["prompt"] for record in records)


def test_drawing_again_adds_a_picture_and_changes_none(folder: Path) -> None:
    for _ in range(2):
        assert limner("generate", "A dog.", "--model", folder) == 0
    assert pictures() == ["a-dog-0-2.png", "a-dog-0.png"]
    assert Path("pictures/a-dog-0.png").read_bytes() == Path("pictures/a-dog-0-2.png").read_bytes()


def test_a_plan_loads_and_writes_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert limner("generate", "A dog.", "-n", 3, "--seed", 5, "--model", folder, "--dry-run") == 0
    plan = dict(line.split(None, 1) for line in capfd.readouterr().out.splitlines())
    assert plan["pictures"] == "3 (3 a prompt), 16x16 pixels"
    assert (plan["seeds"], plan["steps"], plan["guidance"]) == ("5 to 7", "3", "4.0")
    assert plan["scheduler"] == "DPM++ 2M"
    assert "unet 0.3 M" in plan["parameters"]
    assert pictures() == []


def test_a_plan_reads_piped_prompts_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"A dog.\nA cat.\n")))
    assert limner("generate", "-n", 3, "--model", folder, "--dry-run") == 0
    assert "6 (3 a prompt)" in capfd.readouterr().out


def test_a_plan_of_a_model_that_is_not_here_fetches_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for flags, count in (((), 1), (("--best-of", 5), 5), (("-n", 2, "--grid", "steps=1,2 guidance=1,2,3"), 12)):
        assert limner("generate", "A dog.", "--model", "nobody/nothing", *flags, "--dry-run") == 0
        told = dict(line.split(None, 1) for line in capfd.readouterr().out.splitlines())
        assert told["model"].startswith("nobody/nothing, to be fetched")
        assert told["pictures"] == str(count)
    assert not (tmp_path / "cache").exists()


# ---- a process of its own: streams and noise


def test_prompts_are_read_from_a_pipe_and_nothing_else_is_said(folder: Path) -> None:
    done = subprocess.run(
        [*LIMNER, "--model", str(folder), "--device", "cpu"],
        input="A dog.\n\nEin Hünd.\n".encode(),
        capture_output=True,
        env=ENVIRONMENT,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines() == ["pictures/a-dog-0.png", "pictures/ein-hünd-0.png"]
    assert [line.split()[:2] for line in done.stderr.decode().splitlines()] == [["Drawing", "6/6"]]


def test_paths_go_to_a_file_also_while_the_bar_is_on_a_terminal(folder: Path) -> None:
    terminal, inner = pty.openpty()
    with Path("paths.txt").open("wb") as paths:
        command = [*LIMNER, "A dog.", "--model", str(folder)]
        done = subprocess.run(
            command, stdin=inner, stdout=paths, stderr=inner, env=ENVIRONMENT, check=False, timeout=300
        )
    shown = os.read(terminal, 100_000).decode()
    os.close(inner)
    os.close(terminal)
    assert done.returncode == 0, shown
    assert Path("paths.txt").read_text() == "pictures/a-dog-0.png\n"
    assert "Drawing" in shown
    assert "pictures/" not in shown


def test_without_a_prompt_a_terminal_is_not_waited_for(folder: Path) -> None:
    terminal, inner = pty.openpty()
    done = subprocess.run(
        [*LIMNER, "--model", str(folder)], stdin=inner, capture_output=True, text=True, check=False, timeout=300
    )
    os.close(inner)
    os.close(terminal)
    assert done.returncode == 2
    assert done.stderr.startswith("limner: There is no prompt;")


# ---- refusals


def refusal(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence that a wrong command gets; nothing else may be said, and nothing left."""
    capfd.readouterr()
    assert limner("generate", *arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("limner: ")
    assert err.count("\n") == 1
    assert not Path("pictures").exists()
    return err.removeprefix("limner: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["A dog.", "--steps", "-3"], "steps"),
        (["A dog.", "--steps", "0"], "steps"),
        (["A dog.", "--steps", "1000000000"], "steps"),
        (["A dog.", "-n", "0"], "n: "),
        (["A dog.", "-n", "1000000000"], "n: "),
        (["A dog.", "--best-of", "1000000000"], "best_of: "),
        (["A dog.", "A cat.", "-n", "50000", "--grid", "steps=1,2"], "makes 200000 pictures"),
        (["A dog.", "--device", "meta"], "no device"),
        (["A dog.", "--seed", "-1"], "seed"),
        (["A dog.", "--guidance", "0.5"], "guidance"),
        (["A dog.", "--guidance", "nan"], "guidance"),
        (
            ["A dog.", "--size", "15"],
            "not divisible by 2, which this model needs; the nearest that fit: 14x14 and 16x16",
        ),
        (["A dog.", "--size", "15x16"], "the nearest that fit: 14x16 and 16x16"),
        (["A dog.", "--size", "large"], "not SIDE or WIDTHxHEIGHT"),
        (["A dog.", "--size", "0"], "out of range"),
        (["A dog.", "--size", "100000"], "out of range"),
        (["A dog.", "--device", "abacus"], "no device"),
        (["A dog.", "--scheduler", "eulr"], "There is no scheduler 'eulr'; the nearest is euler"),
        (["A dog.", "--scheduler", "heun"], "heun can't draw with this model, which predicts a flow; those that fit"),
        (["A dog.", "--set", "guidance_rescale=2"], "guidance_rescale"),
        (["A (dog:1e9) (cat:999)."], "The weight of 'cat' is 999"),
        (["{|}"], "says nothing with seed 0"),
        (["A dog.", "--embedding", "none.safetensors"], "There is no embedding none.safetensors"),
        ([], "There is no prompt"),
        ([""], "A prompt is empty"),
        (["A dog.", " \n"], "A prompt is empty"),
        (["--prompts", "none.txt"], "none.txt can't be read"),
        (["--prompts", "."], "can't be read"),
        (["A dog.", "--prompts", "latin.txt"], "not UTF-8"),
        (["--prompts", "empty.txt"], "has no prompts"),
        (["A dog.", "--out", "empty.txt"], "is a file"),
        (["A dog.", "--out", "empty.txt/pictures"], "is a file"),
        (["A dog.", "--preview", "."], "is a folder; name a file with --preview"),
        (["A dog.", "--preview", "empty.txt/now.png"], "is a file; choose another --preview"),
    ],
)
def test_a_wrong_setting_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    Path("latin.txt").write_bytes(b"Ein H\xfcnd.")
    Path("empty.txt").write_text("\n")
    assert complaint in refusal(capfd, *arguments, "--model", folder)


def test_a_folder_without_rights_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_special_rights() as place:
        monkeypatch.chdir(place)
        Path("locked").mkdir(mode=0o500)
        assert "no right to write" in refusal(capfd, "A dog.", "--out", "locked/pictures", "--model", folder)


def test_refusals_come_before_anything_is_loaded(folder: Path) -> None:
    script = f"""
import atexit, sys
atexit.register(lambda: print("LOADED", [name for name in ("diffusers", "transformers") if name in sys.modules]))
sys.argv[1:] = ["generate", "A dog.", "--size", "15", "--model", {str(folder)!r}]
from limner.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.splitlines() == ["LOADED []"]


def _dataset(place: Path) -> None:
    (place / "train").mkdir(parents=True)
    (place / "train" / "metadata.jsonl").write_text("{}\n")
    (place / "dataset.json").write_text("{}")


def _unfinished_run(place: Path) -> None:
    (place / "checkpoints").mkdir(parents=True)
    (place / "config.json").write_text("{}")


def _finished_run(place: Path) -> None:
    _unfinished_run(place)
    tiny_unet().save_pretrained(place / "model" / "unet")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda place: None, "There is no model folder ./model"),
        (lambda place: place.write_text(""), "is a file"),
        (lambda place: place.mkdir(), "holds no model"),
        (_dataset, "holds no model"),
        (_unfinished_run, "has no result yet"),
        (_finished_run, "holds only the part unet; join parts with limner assemble"),
    ],
)
def test_what_is_no_model_is_refused(
    capfd: pytest.CaptureFixture[str], make: Callable[[Path], None], complaint: str
) -> None:
    make(Path("model"))
    assert complaint in refusal(capfd, "A dog.", "--model", "./model")


SCHEDULER = "scheduler/scheduler_config.json"
UNET = "unet/diffusion_pytorch_model.safetensors"


def _truncate(model: Path) -> None:
    (model / UNET).write_bytes((model / UNET).read_bytes()[:-100])


def _nonsense(model: Path) -> None:
    (model / UNET).write_bytes(os.urandom(1000))


def _without_a_weight(model: Path) -> None:
    weights = load_file(model / UNET)
    del weights["conv_in.weight"]
    save_file(weights, model / UNET, {"format": "pt"})


def _with_a_weight_of_another_shape(model: Path) -> None:
    weights = load_file(model / UNET)
    save_file({**weights, "conv_in.weight": torch.zeros(3, 3)}, model / UNET, {"format": "pt"})


def _pickles_only(model: Path) -> None:
    (model / UNET).unlink()
    torch.save({}, model / "unet" / "diffusion_pytorch_model.bin")


def _remote_code(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "unet": ["my_unet", "MyUnet"]}))
    (model / "unet" / "my_unet.py").write_text("raise SystemExit('code was run')")


def _remove(name: str) -> Callable[[Path], None]:
    return lambda model: shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_truncate, "U-Net"),
        (_nonsense, "U-Net"),
        (_without_a_weight, "lacks the weight conv_in.weight"),
        (_with_a_weight_of_another_shape, "U-Net"),
        (_pickles_only, "only as a pickle"),
        (_remote_code, "Python code of its own"),
        (_remove(UNET), "U-Net"),
        (_remove("unet"), "has no U-Net"),
        (_remove("unet/config.json"), "has no U-Net"),
        (_remove("vae"), "has no VAE"),
        (_remove("tokenizer"), "has no tokenizer"),
        (_remove("scheduler"), "has no scheduler"),
        (_write("model_index.json", "{"), "can't be read"),
        (_write("model_index.json", "[]"), "does not hold settings"),
        (_write("model_index.json", "{}"), "names no pipeline"),
        (_write("model_index.json", '{"_class_name": "NoSuchPipeline"}'), "can't be read"),
        (_write("unet/config.json", '{"_class_name": "UNet2DConditionModel", "sample_size": "big"}'), "config.json"),
        (_write("vae/config.json", "\x00"), "can't be read"),
        (_write("tokenizer/tokenizer.json", "{"), "tokenizer"),
        (_write(SCHEDULER, '{"_class_name": "Nothing"}'), "not one of Diffusers'"),
        (
            _write(SCHEDULER, '{"_class_name": "DDIMScheduler", "beta_schedule": "x"}'),
            "scheduler",
        ),
        (_write("manifest.json", '{"defaults": {"steps": "x"}}'), "manifest.json"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:40],
)
def test_a_damaged_model_is_refused(
    folder: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], object], complaint: str
) -> None:
    shutil.copytree(folder, "model")
    damage(Path("model"))
    assert complaint in refusal(capfd, "A dog.", "--model", "./model")


def test_the_libraries_add_no_message_of_their_own(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, since Diffusers writes to the standard error that was there when it was imported."""
    shutil.copytree(folder, tmp_path / "model")
    _remove(UNET)(tmp_path / "model")
    done = subprocess.run(
        [*LIMNER, "A dog.", "--model", str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("limner: The U-Net in ")
    assert done.stderr.count("\n") == 1


def test_a_full_disk_is_said_and_leaves_no_file(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))  # bytes of a file, as if the disk had no more
    try:
        assert limner("generate", "A dog.", "--size", 64, "--model", folder) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("limner: A file would become larger than is allowed at pictures/a-dog-0.png")
    assert pictures() == []


def test_ctrl_c_ends_it_and_leaves_whole_pictures_alone(folder: Path) -> None:
    # Shells ignore it for what they begin with &, and Python then leaves it so
    program = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {LIMNER[2]}"
    drawing = subprocess.Popen(
        [*LIMNER[:2], program, "generate", "A dog.", "-n", "5", "--steps", "300", "--model", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    with drawing:
        assert drawing.stdout is not None
        first = drawing.stdout.readline()
        drawing.send_signal(signal.SIGINT)
        out, err = drawing.communicate(timeout=300)
    assert drawing.returncode == 130, err
    assert err.splitlines()[-1] == "limner: Interrupted; run the same command again to go on."
    assert "Traceback" not in err
    printed = (first + out).splitlines()
    assert 1 <= len(printed) < 5
    assert pictures() == sorted(Path(path).name for path in printed)
    assert all(provenance.read(Path(path)) for path in printed)


@pytest.mark.parametrize("model", ["~nobody-of-that-name/model", "a/b/c/d", "", "x" * 300, "/"])
def test_a_model_that_is_nowhere_is_refused(capfd: pytest.CaptureFixture[str], model: str) -> None:
    assert refusal(capfd, "A dog.", "--model", model)
