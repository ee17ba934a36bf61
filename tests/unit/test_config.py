"""Configurations: where a value comes from, what is refused and how, and that none is without an explanation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL.Image import MAX_IMAGE_PIXELS

from limner import cli, settings
from limner import config as configs
from limner.config import EncodeConfig, GenerateConfig, PrepareConfig, StageConfig, TrainConfig
from limner.config import TrainClipConfig as ClipConfig
from limner.config import TrainUnetConfig as UnetConfig
from limner.config import TrainVaeConfig as VaeConfig
from limner.errors import ConfigError
from limner.settings import PRESETS, resolve


def concrete(cls: type[StageConfig] = StageConfig) -> list[type[StageConfig]]:
    """The configurations that a command takes."""
    below = [
        found for sub in cls.__subclasses__() if sub.__module__.startswith(configs.__name__) for found in concrete(sub)
    ]
    return below if cls in (StageConfig, TrainConfig) else [cls, *below]


CONFIGS = concrete()

NEEDED: dict[type[StageConfig], dict[str, Any]] = {
    GenerateConfig: {"prompts": ("A dog's day.",)},
    PrepareConfig: {"kind": "flickr8k", "source": "zips", "out": "d"},
    configs.ReplayConfig: {"image": "a.png"},
    ClipConfig: {"data": "d", "out": "r"},
    VaeConfig: {"data": "d", "out": "r"},
    UnetConfig: {"data": "d", "out": "r", "sample_prompts": ["A dog.", "Ein Hund läuft."]},
    configs.TrainLoraConfig: {"data": "d", "model": "m", "out": "r"},
    configs.TrainDistillConfig: {"data": "d", "model": "m", "out": "r", "guidance": [1.0, 4.0]},
    EncodeConfig: {"data": "d", "vae": "v", "clip": "c", "out": "r"},
    configs.EvaluateConfig: {"models": ("m",), "data": "d", "out": "e"},
    configs.ExportConfig: {"to": "onnx", "out": "e"},
    configs.BenchConfig: {},
    configs.ServeConfig: {},
    configs.TokenConfig: {"action": "list"},
    configs.AssembleConfig: {"clip": "c", "vae": "v", "unet": "u", "out": "m"},
}
"""Values for what has no default, and some others."""


def fails(cls: type[StageConfig], flags: dict[str, Any] | None = None, **sources: Any) -> str:
    """The sentence with which `resolve` refuses."""
    with pytest.raises(ConfigError) as caught:
        resolve(cls, {**NEEDED[cls], **(flags or {})}, **sources)
    sentence = str(caught.value)
    assert sentence
    assert "\n" not in sentence
    return sentence


def test_every_configuration_is_covered_here() -> None:
    assert set(CONFIGS) == set(NEEDED)


# ---- where a value comes from


def test_later_sources_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    presets = {"quick": {"images": 2, "batch_size": 2, "warmup": 2, "seed": 2}}
    monkeypatch.setattr(settings, "PRESETS", {UnetConfig: presets})
    file = tmp_path / "settings.toml"
    file.write_text("batch_size = 3\nwarmup = 3\nseed = 3\n")
    sources: dict[str, Any] = {"preset": "quick", "file": file, "sets": ["warmup=4", "seed=4"]}
    config = resolve(UnetConfig, {**NEEDED[UnetConfig], "seed": 5}, **sources)
    assert config.lr == UnetConfig.model_fields["lr"].default
    assert (config.images, config.batch_size, config.warmup, config.seed) == (2, 3, 4, 5)


def test_the_last_of_two_sets_wins() -> None:
    assert resolve(GenerateConfig, {}, sets=["n=2", "n=3"]).n == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("channels=[64, 128]", (64, 128)),
        ("attention=[false,true]", (False, True)),
        ("lr=1e-3", 1e-3),
        (" objective =v", "v"),
        ('sample_prompts=["a = b", "c"]', ("a = b", "c")),
    ],
)
def test_set_reads_json_and_else_takes_text(text: str, value: Any) -> None:
    others = {"channels": (64, 128), "attention": (False, True)}
    name = text.partition("=")[0].strip()
    flags = {**NEEDED[UnetConfig], **others}
    flags.pop(name, None)
    assert getattr(resolve(UnetConfig, flags, sets=[text]), name) == value


def test_numbers_do_for_text_settings() -> None:
    """The size of `generate` is text (384x512), yet `--set size=256` and `size = 256` in TOML must do."""
    assert resolve(GenerateConfig, {}, sets=["size=256", "negative=7"]).size == "256"


words = st.text(min_size=1).filter(lambda text: "=" not in text and text.strip())


@given(key=words, value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_set_gives_back_any_json_value(key: str, value: Any) -> None:
    assert settings._assignment(f"{key}={json.dumps(value)}") == (key.strip(), value)


@given(text=st.text())
@example("n=" + "[" * 100_000)
@example("n=" + "9" * 10_000)
@example("n=NaN")
@example("=1")
@example("n")
@example("prompts=\ud800")
def test_set_never_fails_otherwise_than_in_one_sentence(text: str) -> None:
    try:
        resolve(GenerateConfig, {}, sets=[text])
    except ConfigError as error:
        assert str(error)


# ---- what is refused


def test_unknown_preset_is_named_with_those_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "PRESETS", {VaeConfig: {"small": {}, "large": {}}})
    assert fails(VaeConfig, preset="huge") == "There is no preset 'huge'; known: large, small."


def test_unknown_setting_is_named() -> None:
    assert "'stpes'" in fails(GenerateConfig, sets=["stpes=3"])


def test_missing_setting_is_named_as_it_is_given() -> None:
    with pytest.raises(ConfigError, match=r"^--source is missing"):
        resolve(PrepareConfig, {"kind": "flickr8k", "out": "d"})
    with pytest.raises(ConfigError, match=r"^kind is missing"):
        resolve(PrepareConfig, {"source": "zips", "out": "d"})


@pytest.mark.parametrize(
    ("cls", "flags", "named"),
    [
        (GenerateConfig, {"steps": 0}, "steps"),
        (GenerateConfig, {"steps": 1001}, "steps"),
        (GenerateConfig, {"steps": 2.5}, "steps"),
        (GenerateConfig, {"guidance": 0.5}, "guidance"),
        (GenerateConfig, {"guidance": float("nan")}, "guidance"),
        (GenerateConfig, {"seed": -1}, "seed"),
        (GenerateConfig, {"seed": 2**63}, "seed"),
        (GenerateConfig, {"n": 0}, "n"),
        (PrepareConfig, {"kind": "coco"}, "kind"),
        (PrepareConfig, {"val_share": 0.5, "test_share": 0.5}, "test_share"),
        (PrepareConfig, {"min_side": 0}, "min_side"),
        (PrepareConfig, {"max_pixels": 2 * MAX_IMAGE_PIXELS + 1}, "max_pixels"),  # above which Pillow refuses
        (VaeConfig, {"lr": float("inf")}, "lr"),
        (VaeConfig, {"precision": "fp64"}, "precision"),
        (VaeConfig, {"channels": [16, 0]}, "channels"),
        (VaeConfig, {"channels": []}, "channels"),
        (ClipConfig, {"size": 100, "patch": 16}, "patch"),
        (ClipConfig, {"width": 10, "heads": 4}, "heads"),
        (UnetConfig, {"channels": [96]}, "channels"),
        (UnetConfig, {"channels": [], "attention": []}, "channels"),
        (configs.TrainDistillConfig, {"guidance": [4]}, "guidance.1"),
        (UnetConfig, {"channels": [96, 192, 257]}, "head_width"),
        (UnetConfig, {"caption_dropout": 1.5}, "caption_dropout"),
        (UnetConfig, {"best_by": "cmmd"}, "a judge"),
        (EncodeConfig, {"size": -8}, "size"),
        (configs.AssembleConfig, {"precision": "int8"}, "precision"),
    ],
)
def test_value_out_of_range_is_named(cls: type[StageConfig], flags: dict[str, Any], named: str) -> None:
    assert named in fails(cls, flags)


def test_pictures_may_have_as_many_pixels_as_pillow_opens() -> None:
    assert resolve(PrepareConfig, {**NEEDED[PrepareConfig], "max_pixels": 2 * MAX_IMAGE_PIXELS})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.toml", None),
        ("missing.json", None),
        ("broken.toml", b"n = ["),
        ("twice.toml", b"n = 1\nn = 2\n"),
        ("broken.json", b'{"n": '),
        ("deep.json", b"[" * 100_000),
        ("list.json", b"[1, 2]"),
        ("binary.toml", b"\xff\xfe\x00"),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    assert name in fails(GenerateConfig, file=file)


def test_a_folder_is_no_configuration_file(tmp_path: Path) -> None:
    assert str(tmp_path) in fails(GenerateConfig, file=tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_right_to_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "secret.toml"
    file.touch(mode=0o000)
    assert "secret.toml" in fails(GenerateConfig, file=file)


# ---- what holds for all


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_setting_is_explained(cls: type[StageConfig]) -> None:
    assert (cls.__doc__ or "").strip()
    for name, field in cls.model_fields.items():
        text = field.description or ""
        assert text.endswith("."), f"{cls.__name__}.{name} needs a docstring that ends with a full stop"


@pytest.mark.parametrize("cls", CONFIGS)
def test_changeable_settings_exist(cls: type[StageConfig]) -> None:
    assert cls.changeable <= set(cls.model_fields)


@pytest.mark.parametrize(
    ("cls", "preset"), [(cls, name) for cls, presets in PRESETS.items() for name in presets] or [(None, None)]
)
def test_every_preset_validates(cls: type[StageConfig] | None, preset: str | None) -> None:
    if cls is None:
        pytest.skip("there is no preset yet")
    given = {"model": "m"} if "tune" in PRESETS[cls][preset or ""] else {}  # what is tuned is there already
    resolve(cls, NEEDED[cls] | given, preset=preset)


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_configuration_survives_its_file(cls: type[StageConfig], tmp_path: Path) -> None:
    config = resolve(cls, NEEDED[cls])
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json(indent=2), encoding="utf-8")
    assert resolve(cls, {}, file=file) == config


@given(seed=st.integers(0, 2**63 - 1), guidance=st.floats(1, 100), prompts=st.lists(st.text(), max_size=3))
def test_any_values_survive_json(seed: int, guidance: float, prompts: list[str]) -> None:
    config = resolve(GenerateConfig, {"seed": seed, "guidance": guidance, "prompts": prompts})
    assert resolve(GenerateConfig, json.loads(config.model_dump_json())) == config


def test_a_configuration_is_frozen() -> None:
    config = resolve(GenerateConfig, {})
    with pytest.raises(ValueError, match="frozen"):
        config.n = 2


def test_lengths_are_counted_in_images() -> None:
    """The batch size of a training must not change how long it is, so no setting counts steps or epochs."""
    assert not {name for name in TrainConfig.model_fields if "step" in name or "epoch" in name}


# ---- through the command line

TRAINED = ["--data", "d", "--out", "r"]

WRONG: dict[str, list[str]] = {
    "unknown command": ["paint"],
    "unknown command with a newline": ["pa\nint"],
    "unknown training": ["train", "gan"],
    "unknown option": ["generate", "--colour", "red"],
    "unknown option of the whole": ["--fast"],
    "option without value": ["generate", "A dog.", "--steps"],
    "word for a number": ["generate", "A dog.", "--steps", "many"],
    "negative steps": ["generate", "A dog.", "--steps", "-1"],
    "no pictures": ["generate", "A dog.", "-n", "0"],
    "negative seed": ["generate", "A dog.", "--seed=-1"],
    "guidance below one": ["generate", "A dog.", "--guidance", "0"],
    "guidance not a number": ["generate", "A dog.", "--guidance", "nan"],
    "generate: preset": ["generate", "A dog.", "--preset", "none-such"],
    "generate: set without value": ["generate", "A dog.", "--set", "steps"],
    "generate: set unknown": ["generate", "A dog.", "--set", "foo=1"],
    "generate: set of another type": ["generate", "A dog.", "--set", "n=[1]"],
    "generate: config": ["generate", "A dog.", "--config", "missing.toml"],
    "prepare: nothing": ["prepare"],
    "prepare: unknown kind": ["prepare", "mnist", "--source", "s", "--out", "d"],
    "prepare: no source": ["prepare", "flickr8k", "--out", "d"],
    "prepare: no out": ["prepare", "flickr8k", "--source", "s"],
    "prepare: no workers": ["prepare", "flickr8k", "--source", "s", "--out", "d", "--workers", "0"],
    "prepare: shares": ["prepare", "imagefolder", "--source", "s", "--out", "d", "--val-share", "1.5"],
    "prepare: too many words": ["prepare", "flickr8k", "more", "--source", "s", "--out", "d"],
    "encode: no vae": ["encode", "--data", "d", "--clip", "c", "--out", "r"],
    "encode: negative size": ["encode", "--data", "d", "--vae", "v", "--clip", "c", "--out", "r", "--size", "-8"],
    "assemble: no unet": ["assemble", "--clip", "c", "--vae", "v", "--out", "m"],
    "assemble: precision": [
        "assemble",
        "--clip",
        "c",
        "--vae",
        "v",
        "--unet",
        "u",
        "--out",
        "m",
        "--precision",
        "int8",
    ],
    "train lora: no model": ["train", "lora", *TRAINED],
    "train lora: no rank": ["train", "lora", *TRAINED, "--model", "m", "--rank", "0"],
    "train lora: another scheduler": [
        *("train", "lora", *TRAINED, "--model", "m"),
        *("--set", "zero_terminal_snr=true", "--set", "levels=uniform"),
    ],
    "train unet: a part of a new one": ["train", "unet", *TRAINED, "--tune", "attention"],
    **{
        f"train {name}: {what}": ["train", name, *arguments]
        for name in ("clip", "vae", "unet")
        for what, arguments in {
            "no out": ["--data", "d"],
            "no data": ["--out", "r"],
            "no images": [*TRAINED, "--images", "0"],
            "negative batch": [*TRAINED, "--batch-size", "-2"],
            "no learning": [*TRAINED, "--lr", "0"],
            "precision": [*TRAINED, "--precision", "fp8"],
            "preset": [*TRAINED, "--preset", "none-such"],
            "set": [*TRAINED, "--set", "nonsense"],
            "set unknown": [*TRAINED, "--set", "nonsense=1"],
            "config": [*TRAINED, "--config", "missing.json"],
            "stray word": [*TRAINED, "word"],
        }.items()
    },
}


def main(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command line in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["limner", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_command_line_ends_with_code_2_and_one_sentence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments, monkeypatch) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("limner: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_threads_wait_as_the_user_says_or_sleep_soon(chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    others = {name: value for name, value in os.environ.items() if name not in settings.WAITING}
    monkeypatch.setattr(os, "environ", {**others, **chosen})
    assert main(["--help"], monkeypatch) == 0
    assert {name: os.environ[name] for name in settings.WAITING if name in os.environ} == (chosen or settings.WAITING)


@pytest.mark.parametrize("arguments", [[], ["train"]], ids=["limner", "limner train"])
def test_a_command_that_needs_another_shows_its_help(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments, monkeypatch) == 2
    out, err = capfd.readouterr()
    assert "Usage: limner" in out + err
    assert "limner: " not in err


@pytest.mark.parametrize(
    "command", ["generate", "prepare", "encode", "assemble", "clip", "vae", "unet", "lora", "distill"]
)
def test_help_names_every_default(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    training = command in {"clip", "vae", "unet", "lora", "distill"}
    cls = next(c for c in CONFIGS if c.__name__.removesuffix("Config").removeprefix("Train").lower() == command)
    assert main([*(["train"] if training else []), command, "--help"], monkeypatch) == 0
    out = capfd.readouterr().out
    flags = [field for field in cls.model_fields.values() if field.metadata and not field.is_required()]
    shown = [
        f for f in flags if f.default not in (None, "", ()) and any(isinstance(m, configs.Flag) for m in f.metadata)
    ]
    assert out.count("Default:") == len(shown) > 0
