"""The report of `train clip`: figures before and after, drift, the sweep over mixes, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from kills import kill, writes_of
from limner.artifacts import identity, read_json, sha256_folder
from limner.config import TrainClipConfig
from limner.data.dataset import Record, read_split
from limner.data.pictures import load_pixels
from limner.errors import DataError, ModelError, RunError
from limner.evaluation.alignment import Judged, write_report
from limner.evaluation.drift import drift
from limner.evaluation.features import captions_of, picture_features
from limner.evaluation.mixing import ALPHAS, choose, mixed
from limner.evaluation.plots import grid
from limner.evaluation.retrieval import intervals, mean_recall
from limner.evaluation.watch import Watch
from limner.evaluation.yardstick import Yardstick
from limner.evaluation.zeroshot import zero_shot
from limner.generation.engine import paint
from limner.models import loading
from limner.models.clip import HALF, Clip
from limner.settings import MISSION
from limner.stages import train_clip
from photos import jpeg, put
from tiny import tiny_clip, tiny_model, tiny_siglip, tiny_siglip_tokenizer, tiny_tokenizer, tiny_unet
from trainings import config, weights

PICTURES = {"drift.png", "alpha.png", "grid.png"}
ONE_STEP = {"defaults": {"steps": 1, "guidance": 2.0}}


def tuned(data: Path, base: Path, out: Path, **values: Any) -> TrainClipConfig:
    """The configuration of a short tuning that goes far, so that mixes differ."""
    return config(TrainClipConfig, data, out, **{"model": str(base), "lr": 1e-2, "images": 16, **values})


@pytest.fixture(scope="module")
def base(stages: Path) -> Path:
    """A tiny CLIP that the U-Net of a `tiny_model` reads."""
    folder = stages / "tiny-clip"
    with loading.quiet():
        Clip(tiny_clip(), tiny_tokenizer(stages / "tokens"), HALF).save(folder)
    return folder


def long(data: Path, base: Path, out: Path, **values: Any) -> TrainClipConfig:
    """The configuration of a tuning that learns something."""
    rare = {"log_every": 480, "validate_every": 480, "checkpoint_every": 480, "min_scale": 0.9}
    return tuned(data, base, out, **{"lr": 3e-3, "images": 480, "batch_size": 16, **rare, **values})


@pytest.fixture(scope="module")
def plain(data: Path, base: Path, stages: Path) -> Path:
    """A tuning that was not swept."""
    return train_clip.run(long(data, base, stages / "plain"))


@pytest.fixture(scope="module")
def swept(data: Path, base: Path, plain: Path, stages: Path) -> Path:
    """The same tuning, swept afterwards."""
    shutil.copytree(plain, stages / "swept")
    return train_clip.run(long(data, base, stages / "swept", sweep_alpha=True, min_cosine=-1))


def clip_of(ref: Path) -> Clip:
    """The CLIP of a folder."""
    return loading.load_clip(str(ref))


def report_of(run: Path) -> dict[str, Any]:
    """What `retrieval.json` tells."""
    report: dict[str, Any] = read_json(run / "retrieval.json")
    return report


def pictures_of(run: Path) -> set[str]:
    """The pictures of a report."""
    return {path.name for path in run.glob("*.png")}


def bits(clip: Clip) -> dict[str, bytes]:
    """Every weight."""
    return {name: value.numpy().tobytes() for name, value in clip.network.state_dict().items()}


def write(made: TrainClipConfig) -> Path:
    """Only the report of a run."""
    write_report(made.out, made)
    return made.out


# ---- figures


@torch.no_grad()
def naive_recalls(clip: Clip, records: list[Record]) -> dict[str, float]:
    """Recall@k picture by picture, each read alone."""
    captions, owners = captions_of(records)
    text = torch.cat([clip.text_features(clip.tokenize([caption])) for caption in captions])
    images = torch.cat([clip.image_features(load_pixels(record.path, clip.size)[None]) for record in records])
    near = (text @ images.T).numpy()
    by_text = [sum(row >= row[owner]) - 1 for row, owner in zip(near, owners.tolist())]
    own = [owners.numpy() == n for n in range(len(records))]
    by_image = [sum(near[~mine, n] >= near[mine, n].max()) for n, mine in enumerate(own)]
    return {
        f"{way}_r@{k}": float(np.mean(np.array(places) < k))
        for way, places in (("text_to_image", by_text), ("image_to_text", by_image))
        for k in (1, 5, 10)
    }


def test_every_split_is_judged_before_and_after(plain: Path, base: Path, data: Path) -> None:
    report = report_of(plain)
    assert report["clip"] == loading.identity(str(plain), "clip")
    assert report["alpha"] is None
    assert report["skipped"] == {"train": 0, "val": 0, "test": 0}
    assert report["splits"].keys() == {"train", "val", "test"}
    for split, rows in report["splits"].items():
        records = read_split(data, split)
        assert list(rows) == ["base", "tuned"]
        for ref, row in zip((base, plain), rows.values()):
            found = {name: figure["value"] for name, figure in row.items() if "_r@" in name}
            assert found == pytest.approx(naive_recalls(clip_of(ref), records))
            ranks = Judged(records).ranks(clip_of(ref))
            for name, interval in intervals(ranks).items():
                assert row[name] == {"value": interval.value, "low": interval.low, "high": interval.high}
            assert row["mean_recall"] == mean_recall(ranks)
            assert row["mean_recall"]["value"] == pytest.approx(sum(found.values()) / 6)
    assert report["splits"]["val"]["base"] != report["splits"]["val"]["tuned"]


def test_drift_is_of_the_first_captions_and_shown(plain: Path, base: Path, data: Path) -> None:
    report = report_of(plain)
    for split, rows in report["splits"].items():
        captions = [record.captions[0] for record in read_split(data, split)]
        wanted = drift(clip_of(base), clip_of(plain), captions, 5)
        for layer in ("last", "penultimate"):
            assert rows["base"]["drift"][layer] == pytest.approx(1)
            assert rows["tuned"]["drift"][layer] == pytest.approx(wanted[layer]["mean_cosine"])
            assert rows["tuned"]["drift"][layer] < 0.999
        if split == "val":
            assert report["drift"]["last"]["cosine"] == pytest.approx(wanted["last"]["cosine"])
    assert pictures_of(plain) == {"drift.png"}


def test_a_new_clip_has_no_before(clip: Path) -> None:
    report = report_of(clip)
    assert "drift" not in report
    assert all(list(rows) == ["tuned"] and "drift" not in rows["tuned"] for rows in report["splits"].values())
    assert pictures_of(clip) == set()


def test_what_is_judged_is_the_first_thousand(data: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    shutil.copy(data / "dataset.json", tmp_path)
    rows = [{"file_name": f"{n}.png", "captions": ["A dog."] * (n % 2)} for n in range(2500)]
    (tmp_path / "val" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = [int(record.path.stem) for record in Judged.of(tmp_path, "val").records]
    assert numbers == list(range(1, 2001, 2))


def test_what_a_linear_map_moves_is_told(base: Path, data: Path, tmp_path: Path) -> None:
    """The text tower stays, but a U-Net will read its states through the map."""
    run = train_clip.run(tuned(data, base, tmp_path / "r", tune="adapter", lr=0.1))
    weight = load_file(run / "model" / "adapter" / "adapter.safetensors")["weight"]
    clip, found = clip_of(base), report_of(run)["drift"]["last"]["mean_cosine"]
    ids = clip.tokenize([record.captions[0] for record in read_split(data, "val")])
    with torch.no_grad():
        states = clip.token_states(ids)[0]
        cosines = cosine_similarity(states @ weight.T, states, dim=2)[clip.mask(ids)]
    assert found == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert found < 0.999
    refused(tuned(data, run, tmp_path / "on"), ModelError, "has a linear adapter beside its CLIP")


def test_forgetting_is_told_where_there_are_labelled_pictures(
    swept: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    labelled = tmp_path / "labelled"
    put(labelled, {f"{name}/{n}.jpg": jpeg(n + 9 * len(name)) for name in ("dog", "red_circle") for n in range(5)})
    run = tmp_path / "r"
    shutil.copytree(swept, run)
    train_clip.run(long(data, base, run, labelled=labelled, sweep_alpha=True, min_cosine=-1))
    report = report_of(run)
    for name, ref in (("base", base), ("tuned", run / "model" / "tuned"), ("alpha", run)):
        assert report["zero_shot"][name] == zero_shot(clip_of(ref), labelled, 3)
    for row in report["alpha"]["rows"]:
        mix = mixed(clip_of(base), clip_of(run / "model" / "tuned"), row["alpha"])
        assert zero_shot(mix, labelled, 3).items() <= row.items()


# ---- the same again


def test_a_report_that_is_there_stays(
    plain: Path, swept: Path, data: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for made in (long(data, base, plain), long(data, base, swept, sweep_alpha=True, min_cosine=-1)):
        stamps = {path: path.stat().st_mtime_ns for path in made.out.rglob("*.png")}
        before = sha256_folder(made.out)
        train_clip.run(made)
        assert sha256_folder(made.out) == before
        assert {path: path.stat().st_mtime_ns for path in made.out.rglob("*.png")} == stamps
        assert "R@1" not in capsys.readouterr().out


def test_a_run_that_goes_on_is_judged_anew(data: Path, base: Path, tmp_path: Path) -> None:
    run, level = tmp_path / "r", {"final_lr": 1.0}  # so that the rate does not depend on where it ends
    train_clip.run(tuned(data, base, run, sweep_alpha=True, **level))
    train_clip.run(tuned(data, base, run, sweep_alpha=True, images=32, **level))
    whole = train_clip.run(tuned(data, base, tmp_path / "whole", images=32, **level))
    report = report_of(run)
    assert report["clip"] == loading.identity(str(run), "clip")
    assert report["splits"]["val"]["tuned"] == report_of(whole)["splits"]["val"]["tuned"]
    assert weights(run).keys() == {"clip/model.safetensors", "tuned/clip/model.safetensors"}


# ---- the sweep


def test_the_chosen_mix_takes_the_place_of_what_was_tuned(swept: Path, plain: Path, base: Path, data: Path) -> None:
    report = report_of(swept)
    rows, chosen = report["alpha"]["rows"], report["alpha"]["chosen"]
    assert 0 < chosen < 1, "or else little was mixed"
    assert [row["alpha"] for row in rows] == list(ALPHAS)
    assert chosen == choose(rows, -1)
    before, after = clip_of(base), clip_of(swept / "model" / "tuned")
    assert bits(after) == bits(clip_of(plain)), "a sweep changes nothing of the training"
    assert bits(clip_of(swept)) == bits(mixed(before, after, chosen))
    assert report["clip"] == identity(swept / "model" / "clip")
    val = Judged.of(data, "val")
    for row in rows[::5]:
        assert row == {"alpha": row["alpha"], **val.row(mixed(before, after, row["alpha"]), before)}
    for rows_of_split in report["splits"].values():
        assert list(rows_of_split) == ["base", "tuned", "alpha"]
    assert report["splits"]["val"]["alpha"] == val.row(clip_of(swept), before)
    assert pictures_of(swept) == {"drift.png", "alpha.png"}


def test_dev_alone_chooses(swept: Path, base: Path, data: Path, tmp_path: Path) -> None:
    """Without test and train pictures the same mix comes of it."""
    other, run = tmp_path / "data", tmp_path / "r"
    shutil.copytree(data, other)
    shutil.copytree(swept, run)
    for split in ("train", "test"):
        (other / split / "metadata.jsonl").write_text("")
    (run / "retrieval.json").unlink()
    write(long(other, base, run, sweep_alpha=True, min_cosine=-1))
    assert report_of(run)["alpha"] == report_of(swept)["alpha"]
    assert report_of(run)["splits"].keys() == {"val"}
    assert weights(run) == weights(swept)


def test_without_the_sweep_what_was_tuned_comes_back_and_another_begins_with_it(
    swept: Path, plain: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    shutil.copytree(swept, run)
    train_clip.run(long(data, base, run, sweep_alpha=True, min_cosine=1))
    assert report_of(run)["alpha"]["chosen"] == 0
    assert bits(clip_of(run)) == bits(clip_of(base))
    assert report_of(run)["alpha"]["rows"] == report_of(swept)["alpha"]["rows"]
    train_clip.run(long(data, base, run))
    assert weights(run) == weights(plain)
    assert pictures_of(run) == {"drift.png"}
    assert {**report_of(run), "settings": {}} == {**report_of(plain), "settings": {}}
    train_clip.run(long(data, base, run, sweep_alpha=True, min_cosine=-1))
    assert weights(run) == weights(swept)
    assert report_of(run) == report_of(swept)


def test_of_an_overtuned_clip_less_is_kept(plain: Path, data: Path, tmp_path: Path) -> None:
    """It learns eight pictures by heart: they are found better, others worse, and its token states are far off."""
    few = shutil.copytree(data, tmp_path / "few")
    lines = (few / "train" / "metadata.jsonl").read_text().splitlines(keepends=True)
    (few / "train" / "metadata.jsonl").write_text("".join(lines[:8]))
    given = {"batch_size": 8, "ema_halflife": 0, "min_scale": 1, "flips": False, "result": "last", "min_cosine": -1}
    report = report_of(train_clip.run(long(few, plain, tmp_path / "r", sweep_alpha=True, **given)))
    seen, dev = (
        {name: row["mean_recall"]["value"] for name, row in report["splits"][split].items()}
        for split in ("train", "val")
    )
    assert seen["tuned"] > seen["base"] + 0.05
    assert dev["tuned"] < dev["base"] - 0.1
    assert report["splits"]["val"]["tuned"]["drift"]["last"] < 0.9
    assert report["alpha"]["chosen"] < 1
    assert dev["alpha"] > dev["tuned"] + 0.1


# ---- kills


@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("change", "kills"), [("sweep", (2, 4)), ("sweep again", (2,)), ("sweep no more", (2,))], ids=lambda value: value
)
def test_a_report_that_was_killed_is_done_again(
    plain: Path, swept: Path, base: Path, data: Path, tmp_path: Path, change: str, kills: tuple[int, ...]
) -> None:
    """Before the report is in its place, and between that and the model: no mix is taken for what was tuned."""
    start = plain if change == "sweep" else swept
    how = {"sweep_alpha": change != "sweep no more", "min_cosine": 1 if change == "sweep again" else -1}
    whole = long(data, base, tmp_path / "whole", **how)
    shutil.copytree(start, whole.out)
    count = writes_of(write, whole)
    states = {4: (False, True), 2: (True, True)}  # whether it is told, and whether the model is the old one
    for back in kills:
        made = long(data, base, tmp_path / f"killed-{back}", **how)
        shutil.copytree(start, made.out)
        kill(write, made, at_write=count - back)
        assert ((made.out / "retrieval.json").exists(), weights(made.out) == weights(start)) == states[back]
        write(made)
        assert weights(made.out) == weights(whole.out), back
        assert report_of(made.out) == report_of(whole.out), back
        assert pictures_of(made.out) == pictures_of(whole.out), back


def test_a_kill_before_a_mix_that_is_all_of_what_was_tuned(plain: Path, base: Path, data: Path, tmp_path: Path) -> None:
    """Whose weights are in their place already."""
    made = long(data, base, tmp_path / "r", sweep_alpha=True, min_cosine=-1)
    shutil.copytree(plain, made.out)
    told = {"settings": made.model_dump(mode="json", include=set(report_of(plain)["settings"]))}
    file = made.out / "retrieval.json"
    file.write_text(json.dumps({**report_of(plain), **told, "alpha": {"chosen": 1.0, "rows": []}}))
    write(made)
    assert weights(made.out).keys() == {"clip/model.safetensors", "tuned/clip/model.safetensors"}


# ---- drawn pictures


@pytest.fixture(scope="module")
def model(stages: Path) -> Path:
    """A model whose U-Net reads `base`, and draws in one step."""
    folder = tiny_model(stages / "model-with-unet")
    (folder / "manifest.json").write_text(json.dumps(ONE_STEP))
    return folder


def test_every_mix_draws_the_same_captions_and_is_scored(
    swept: Path, base: Path, data: Path, model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    shutil.copytree(swept, run)
    made = long(data, base, run, sweep_alpha=True, min_cosine=-1, unet=str(model))
    train_clip.run(made)
    assert pictures_of(run) == PICTURES
    report, records = report_of(run), Judged.of(data, "val").records
    chosen = report["alpha"]["chosen"]
    assert chosen == report_of(swept)["alpha"]["chosen"]
    assert weights(run) == weights(swept)
    captions = [*MISSION, *(record.captions[0] for record in records)]

    def drawn(alpha: float, count: int) -> torch.Tensor:
        mix = mixed(judge, clip_of(run / "model" / "tuned"), alpha)
        return paint(
            loading.load_unet(str(model)),
            loading.load_scheduler(str(model)),
            loading.load_vae(str(model)),
            mix.network.text_model,
            mix.tokenizer,
            captions[:count],
            seeds=range(count),
            steps=1,
            guidance=2.0,
        )

    judge = clip_of(base)
    real = picture_features(judge, [record.path for record in records], 8)
    watch = Watch(Yardstick.of(str(base), judge), captions, real)
    scores = watch.score(drawn(chosen, len(captions)))
    assert report["alpha"]["rows"][ALPHAS.index(chosen)].items() >= scores.items()
    columns = {f"alpha {alpha:g}": drawn(alpha, 6) for alpha in sorted({*ALPHAS[::2], chosen})}
    grid(columns, captions[:6], tmp_path / "wanted.png")
    with Image.open(run / "grid.png") as one, Image.open(tmp_path / "wanted.png") as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


def refused(made: TrainClipConfig, error: type[Exception], match: str) -> None:
    """Refused in one sentence before anything is trained or written."""
    for call in (train_clip.run, train_clip.plan):
        with pytest.raises(error, match=match) as caught:
            call(made)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(".")
    assert not made.out.exists()


def test_a_unet_that_can_not_draw_is_refused_before_the_training(
    clip: Path, base: Path, unet: Path, data: Path, model: Path, tmp_path: Path
) -> None:
    sweep = {"sweep_alpha": True, "images": 2_000}
    made = tuned(data, clip, tmp_path / "r", unet=str(model), **sweep)
    refused(made, ModelError, r"The text encoder of .* is not what the U-Net of .* \(width 16 against 32")
    wide = tiny_model(tmp_path / "wide", unet=tiny_unet(64))
    refused(tuned(data, base, tmp_path / "r", unet=str(wide), **sweep), ModelError, "width 32 against 64")
    refused(tuned(data, base, tmp_path / "r", unet=str(unet), **sweep), ModelError, "join parts with limner assemble")
    index = read_json(wide / "model_index.json")
    (wide / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))
    refused(
        tuned(data, base, tmp_path / "r", unet=str(wide), **sweep), ModelError, "is a StableDiffusionXLPipeline; name"
    )
    siglip = Clip(tiny_siglip(), tiny_siglip_tokenizer(tmp_path / "pieces"), HALF)
    siglip.save(tmp_path / "siglip")
    made = tuned(data, tmp_path / "siglip", tmp_path / "r", unet=str(model), **sweep)
    refused(made, ModelError, "reads the text tower of a SigLIP; leave out unet")


def test_a_folder_without_classes_is_refused_before_the_training(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "labelled").mkdir()
    made = tuned(data, base, tmp_path / "r", labelled=tmp_path / "labelled", images=2_000)
    refused(made, DataError, "has no folders of pictures")


def test_a_labelled_picture_that_is_broken_is_refused_before_the_training(
    base: Path, data: Path, tmp_path: Path
) -> None:
    labelled = put(tmp_path / "labelled", {"dog/1.jpg": jpeg(1), "cat/2.jpg": jpeg(2), "cat/3.jpg": jpeg(3)[:600]})
    made = tuned(data, base, tmp_path / "r", labelled=labelled, images=2_000)
    refused(made, DataError, rf"The picture {labelled}/cat/3\.jpg can't be read; mend it, or take it out of {labelled}")


def test_a_sweep_of_a_finished_run_is_noted(plain: Path, data: Path, base: Path, tmp_path: Path) -> None:
    run = shutil.copytree(plain, tmp_path / "r")
    before = read_json(run / "config.json")
    train_clip.run(long(data, base, run, sweep_alpha=True, min_cosine=-1, auto=True, lr=None))
    assert read_json(run / "config.json") == {**before, "sweep_alpha": True, "min_cosine": -1}


def test_a_report_is_not_written_while_another_process_is_at_work(plain: Path, data: Path, base: Path) -> None:
    before = sha256_folder(plain)
    script = f"from pathlib import Path; from limner.artifacts import alone\nwith alone(Path({str(plain)!r})): "
    with subprocess.Popen(
        [sys.executable, "-c", f"{script}print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(RunError, match="Another process is at work"):
            train_clip.run(long(data, base, plain, sweep_alpha=True, min_cosine=-1))
        process.kill()
    assert sha256_folder(plain) == before
