"""`limner train clip`: captions and pictures come together, in a folder that plain Transformers reads.

What is told of the result is in test_alignment.py. This file is also the program that two processes run:
`python test_train_clip.py ANSWERS DATA RUN TRAININGS`, the last as JSON; see `main`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPModel, CLIPTokenizer, SiglipModel

from kills import kill, writes_of
from limner.artifacts import read_json
from limner.config import TrainClipConfig
from limner.data.dataset import Record, read_split
from limner.data.pictures import load_pixels, may_flip
from limner.errors import ConfigError, DataError, ModelError, RunError, UserError
from limner.evaluation.alignment import Judged
from limner.evaluation.retrieval import mean_recall, recall
from limner.models import loading
from limner.models.clip import HALF, Clip
from limner.settings import resolve
from limner.stages import train_clip
from limner.stages.train_clip import TrainClip, draw_captions
from limner.training import processes
from tiny import tiny_siglip, tiny_siglip_tokenizer
from trainings import CLIP, config, weights

TESTS = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL and forked workers")


@pytest.fixture(scope="module")
def siglip(stages: Path) -> Path:
    """A SigLIP's folder."""
    folder, network = stages / "siglip", tiny_siglip()
    with torch.no_grad():  # as Zhai et al. begin
        network.logit_scale.fill_(math.log(10))
        network.logit_bias.fill_(-10)
    with loading.quiet():
        Clip(network, tiny_siglip_tokenizer(stages / "pieces"), HALF).save(folder)
    return folder


def settings(data: Path, out: Path, **values: Any) -> TrainClipConfig:
    """The smallest configuration."""
    return config(TrainClipConfig, data, out, **values)


def task(made: TrainClipConfig) -> TrainClip:
    """What a run of this configuration trains."""
    torch.manual_seed(made.seed)
    return TrainClip(made)


def refused(made: TrainClipConfig, error: type[UserError], match: str) -> None:
    """A training is refused in one sentence, also by its plan, and nothing is written."""
    for call in (train_clip.run, train_clip.plan):
        with pytest.raises(error, match=match) as caught:
            call(made)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(".")
    assert not made.out.exists()


def with_captions(data: Path, folder: Path, change: Callable[[str, int, list[str]], list[str]]) -> Path:
    """A copy of a dataset; `change` makes a picture's captions of its split, its number and those it has."""
    shutil.copytree(data, folder)
    for file in folder.glob("*/metadata.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for number, row in enumerate(rows):
            row["captions"] = change(file.parent.name, number, row["captions"])
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def judged(run: Path, data: Path) -> dict[str, float]:
    """The figures of a run's result on val pictures."""
    return recall(Judged.of(data, "val").ranks(loading.load_clip(str(run))))


def events(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


# ---- what it learns, and what becomes of it


def test_it_learns_which_picture_a_caption_belongs_to(data: Path, tmp_path: Path) -> None:
    learning = {"images": 1_600, "batch_size": 16, "lr": 3e-3, "width": 32, "min_scale": 0.9}
    rare = {"log_every": 800, "validate_every": 800, "checkpoint_every": 1_600, "result": "last"}
    run = train_clip.run(settings(data, tmp_path / "r", **learning, **rare))
    figures = read_json(run / "manifest.json")["validation"]
    assert figures["text_to_image_r@1"] > 2 / len(read_split(data, "val"))
    assert figures == {"loss": figures["loss"], **judged(run, data)}
    six = [value for name, value in figures.items() if "_r@" in name]
    assert figures["loss"] == pytest.approx(1 - sum(six) / 6)


@torch.no_grad()
def test_plain_transformers_reads_the_result(clip: Path, data: Path) -> None:
    folder = clip / "model" / "clip"
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    ours = loading.load_clip(str(clip)).network
    record = read_split(data, "val")[0]
    ids = tokenizer(list(record.captions), padding="max_length", return_tensors="pt")["input_ids"]
    assert ids.shape[1] == 77
    pixels = torch.randn(1, 3, 16, 16)
    assert torch.equal(
        model(input_ids=ids, pixel_values=pixels).logits_per_image,
        ours(input_ids=ids, pixel_values=pixels).logits_per_image,
    )


def test_a_given_clip_keeps_its_sizes_and_tokenizer(clip: Path, data: Path, tmp_path: Path) -> None:
    run = train_clip.run(settings(data, tmp_path / "r", model=str(clip), images=8))
    before, after = (loading.load_clip(str(folder)) for folder in (clip, run))
    sizes = [{**c.network.config.to_dict(), "_name_or_path": ""} for c in (before, after)]
    assert sizes[0] == sizes[1]
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    assert before.normalisation == after.normalisation
    assert read_json(run / "manifest.json")["parents"]["model"] == loading.identity(str(clip), "clip")


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_a_siglip_is_trained_with_either_loss(siglip: Path, data: Path, tmp_path: Path, loss: str) -> None:
    run = train_clip.run(settings(data, tmp_path / "r", model=str(siglip), loss=loss, drift_weight=0.1, images=16))
    before, after = (SiglipModel.from_pretrained(folder) for folder in (siglip, run / "model" / "clip"))
    moved = {name: bool((a - b).any()) for (name, a), b in zip(before.named_parameters(), after.parameters())}
    assert [name for name, has in moved.items() if not has] == ([] if loss == "sigmoid" else ["logit_bias"])
    assert judged(run, data).items() <= read_json(run / "manifest.json")["validation"].items()


@pytest.mark.parametrize("lock", [None, "text", "image"])
def test_lora_leaves_what_transformers_and_peft_read_alike(clip: Path, data: Path, tmp_path: Path, lock: str) -> None:
    run = train_clip.run(settings(data, tmp_path / "r", model=str(clip), tune="lora", lock=lock, lr=1e-2, images=16))
    base, whole = (CLIPModel.from_pretrained(run / "model" / "clip") for run in (clip, run))
    beside = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip / "model" / "clip"), run / "model" / "lora")
    beside = beside.merge_and_unload()
    for (name, one), other in zip(whole.named_parameters(), beside.parameters(), strict=True):
        if name != "logit_scale":
            assert_close(one, other)
    changed = {
        name for (name, one), other in zip(whole.named_parameters(), base.parameters()) if not torch.equal(one, other)
    }
    towers = {"text": "text_model", "image": "vision_model"}
    wanted = {
        name
        for name, p in base.named_parameters()
        if ".layers." in name and p.ndim == 2 and not (lock and name.startswith(towers[lock]))
    }
    assert changed == wanted | {"logit_scale"}
    checkpoint = load_file(sorted((run / "checkpoints").glob("0*"))[-1] / "state.safetensors")
    kept = {name.split(".", 1)[1] for name in checkpoint if name.startswith("network.")}
    assert all("lora_" in name or name == "network.logit_scale" for name in kept), "small checkpoints"
    validation = read_json(run / "manifest.json")["validation"]
    assert judged(run, data).items() <= validation.items(), "what is merged is what was judged on the way"


# ---- what is trained on


def records(counts: list[int]) -> list[Record]:
    """Pictures with that many captions each."""
    return [Record(Path(f"{n}.png"), tuple(f"words {n} {i}." for i in range(count))) for n, count in enumerate(counts)]


@given(st.integers(1, 6), st.integers(0, 2**32), st.floats(0, 1))
def test_joined_captions_are_some_of_the_pictures_own_in_any_order(count: int, seed: int, join: float) -> None:
    (record,) = records([count])
    drawn = draw_captions(record, np.random.default_rng(seed), join)
    assert len(set(drawn)) == len(drawn) > 0
    assert set(drawn) <= set(range(count))
    assert drawn == draw_captions(record, np.random.default_rng(seed), join)


def test_as_many_are_joined_as_the_share_says_and_in_every_order() -> None:
    record = records([3])[0]
    for join, least, most in ((0.0, 0, 0), (0.3, 240, 360), (1.0, 1000, 1000)):
        drawn = [tuple(draw_captions(record, np.random.default_rng(seed), join)) for seed in range(1000)]
        assert least <= sum(len(numbers) > 1 for numbers in drawn) <= most
        if join in (0, 1):
            assert len(set(drawn)) == (3 if join == 0 else 6 + 6), "each caption, or each pair and all three"


def test_no_more_captions_are_joined_than_are_read_whole(data: Path, tmp_path: Path) -> None:
    long = with_captions(data, tmp_path / "d", lambda split, number, had: ["A dog" + " runs" * 28 + "."] * 5)
    made = task(settings(long, tmp_path / "r", join=1.0, vocabulary=4096))
    texts = [
        made.clip.tokenizer.decode(made.stream[position]["ids"], skip_special_tokens=True) for position in range(30)
    ]
    assert all(text.endswith(".") for text in texts)
    assert {text.count(".") for text in texts} == {2}, "of five, two have room"


def test_a_picture_is_mirrored_only_where_all_that_is_said_of_it_allows(data: Path, tmp_path: Path) -> None:
    """One of five captions names a side, so that only some of the joined ones do."""
    sided = with_captions(data, tmp_path / "d", lambda split, number, had: ["It is on the left.", *had[1:]])
    made = settings(sided, tmp_path / "r", join=0.5, min_scale=1, vocabulary=4096)
    both = task(made), TrainClip(made.model_copy(update={"colour": 0.5}))
    still = TrainClip(made.model_copy(update={"flips": False}))
    seen = set()
    for position in range(150):
        example = both[0].stream[position]
        text = both[0].clip.tokenizer.decode(example["ids"], skip_special_tokens=True)
        plain = load_pixels(both[0].train[example["owner"]].path, both[0].clip.size)
        mirrored = not torch.equal(example["pixels"], plain)
        if mirrored:
            assert torch.equal(example["pixels"], plain.flip(-1))
        seen.add((may_flip(text), mirrored))
        assert torch.equal(still.stream[position]["pixels"], plain)
        coloured = both[1].stream[position]
        assert torch.equal(coloured["ids"], example["ids"])
        assert not torch.equal(coloured["pixels"], example["pixels"])
    assert seen == {(True, True), (True, False), (False, False)}


def test_no_batch_has_a_picture_twice(data: Path, tmp_path: Path) -> None:
    made = task(settings(data, tmp_path / "r", batch_size=16))
    count = len(made.train)
    assert 16 < count < 32
    batches = list(made.stream.batches(0, 8 * 16, 16))
    assert all(len(set(batch["owner"].tolist())) == 16 for batch in batches)
    assert {owner for batch in batches for owner in batch["owner"].tolist()} == set(range(count))


def test_one_caption_a_picture_will_do_and_one_without_is_passed_over(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = with_captions(data, tmp_path / "d", lambda split, number, had: had[:1] if number else [])
    made = settings(few, tmp_path / "r", images=16)
    assert train_clip.plan(made)["skipped"] == "3 pictures without a caption"
    capsys.readouterr()
    run = train_clip.run(made)
    assert "3 pictures have no caption; they were skipped." in capsys.readouterr().out
    assert len(task(made).train) == len(read_split(data, "train")) - 1
    report = read_json(run / "retrieval.json")
    assert report["skipped"] == {"train": 1, "val": 1, "test": 1}
    assert "test" not in report["splits"], "whose only picture has none"


# ---- rates, temperature, arithmetic


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_shares_of_the_rate_are_of_what_is_there(clip: Path, data: Path, tmp_path: Path, tune: str) -> None:
    made = task(settings(data, tmp_path / "r", model=str(clip), tune=tune, layer_decay=0.5))
    names = {name for name, _ in made.network.named_parameters()}
    assert len(made.rates) > 20
    assert made.rates.keys() <= names
    assert task(settings(data, tmp_path / "r")).rates == {}


@pytest.mark.parametrize("images", [8, 32])
def test_the_temperature_of_the_result_can_be_learned_from_whatever_the_rate(
    data: Path, tmp_path: Path, images: int
) -> None:
    """Also where the last step led out of bounds."""
    for seed in range(2):
        run = train_clip.run(settings(data, tmp_path / f"{seed}", lr=3.0, images=images, warmup=0, seed=seed))
        assert 0 <= loading.load_clip(str(run)).network.logit_scale.item() <= math.log(100) + 1e-6
        assert all(1 <= line["scale"] <= 100.001 for line in events(run) if "scale" in line)


def test_the_loss_has_all_its_digits_in_bf16_too(clip: Path, data: Path, tmp_path: Path) -> None:
    made = task(settings(data, tmp_path / "r", model=str(clip)))
    batch = next(made.stream.batches(0, 8, 8))
    given = {}

    def network(ids: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        given["rows"] = made.network(ids, pixels)
        return given["rows"]  # type: ignore[no-any-return]

    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = made.loss(network, batch)  # type: ignore[arg-type]
    text, images, _, scale, _ = given["rows"]
    assert loss.item() == pytest.approx(train_clip.contrastive(text, images, scale, batch["owner"]).item(), rel=1e-6)


def test_a_penalty_for_drift_keeps_token_states_near(clip: Path, data: Path, tmp_path: Path) -> None:
    kept = []
    for weight in (0, 0.5, 50):
        how = {"model": str(clip), "drift_weight": weight, "lr": 1e-2, "images": 64, "result": "last"}
        run = train_clip.run(settings(data, tmp_path / str(weight), **how))
        drift = read_json(run / "retrieval.json")["drift"]
        kept.append([drift[layer]["mean_cosine"] for layer in ("last", "penultimate")])
        lines = [line for line in events(run) if "loss" in line]
        for line in lines:
            assert line["loss"] == pytest.approx(line["aligned"] + weight * line.get("drift", 0), rel=1e-5)
        assert not weight or (lines[0]["drift"] == 0 and lines[-1]["drift"] > 0)
    assert kept[0][0] < kept[1][0] < kept[2][0] < 1
    assert kept[0][1] < kept[1][1] < kept[2][1] < 1


# ---- early stop, the best, and going on


@LINUX
@pytest.mark.parametrize(
    "how",
    [
        {"tune": "lora", "layer_decay": 0.8},
        {"drift_weight": 0.5, "loss": "sigmoid", "chunk_size": 3, "join": 0.5, "patch_dropout": 0.3},
    ],
    ids=["lora", "drift"],
)
def test_killed_and_resumed_it_ends_with_the_same_bits(
    clip: Path, data: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    how = {"model": str(clip), "lr": 1e-2, **how}
    whole = settings(data, tmp_path / "whole", **how)
    count = writes_of(train_clip.run, whole)
    killed = settings(data, tmp_path / "killed", **how)
    kill(train_clip.run, killed, at_write=count // 2)
    assert list((killed.out / "checkpoints").iterdir()), "or else it would begin anew"
    assert weights(train_clip.run(killed)) == weights(whole.out)
    assert read_json(killed.out / "retrieval.json") == read_json(whole.out / "retrieval.json")


def test_it_stops_where_dev_recall_gets_no_better_and_keeps_the_best(data: Path, tmp_path: Path) -> None:
    often = {"validate_every": 8, "checkpoint_every": 800, "patience": 3}
    run = train_clip.run(settings(data, tmp_path / "r", images=800, lr=0.1, **often))
    manifest = read_json(run / "manifest.json")
    assert manifest["stopped_early"]
    losses = [line["validation/loss"] for line in events(run) if "validation/loss" in line]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3
    assert manifest["validation"]["loss"] == losses[best]
    found = Judged.of(data, "val").ranks(loading.load_clip(str(run)))
    assert 1 - mean_recall(found)["value"] == losses[best], "with the weight average, which was judged"


def test_nan_stops_and_leaves_the_last_good_checkpoint(data: Path, tmp_path: Path) -> None:
    made = settings(data, tmp_path / "r", lr=1e18, checkpoint_every=8, validate_every=32, warmup=0, clip_norm=1e30)
    with pytest.raises(RunError, match=r"The loss became (nan|inf) after 8 images") as caught:
        train_clip.run(made)
    assert "lower lr" in str(caught.value)
    (kept,) = (path for path in (made.out / "checkpoints").iterdir() if path.is_dir())
    assert kept.name == "000000008"
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "state.safetensors").values())
    assert not (made.out / "model").exists()
    assert not (made.out / "retrieval.json").exists()


def test_a_run_that_was_short_of_memory_goes_on_in_chunks(data: Path, tmp_path: Path) -> None:
    """As it is told to."""
    ended = []
    for name, chunks in (("whole", {}), ("chunks", {"chunk_size": 3})):
        how = {"schedule": "constant", "result": "last"}
        train_clip.run(settings(data, tmp_path / name, images=16, **how))
        run = train_clip.run(settings(data, tmp_path / name, images=32, **how, **chunks))
        ended.append(load_file(run / "model" / "clip" / "model.safetensors"))
    for name, weight in ended[0].items():
        assert_close(ended[1][name], weight, rtol=0, atol=1e-4)


def test_what_changes_the_training_must_not_change_later(clip: Path, data: Path) -> None:
    """What changes the report only may; see test_alignment.py."""
    with pytest.raises(RunError, match=r"other settings \(join\)"):
        train_clip.run(settings(data, clip, join=0.5))


# ---- several processes


def gradients(made: TrainClipConfig) -> dict[str, Tensor]:
    """The loss of a run's first batch, and its gradients, as the loop has them; weights have moved by then."""
    accelerator = processes.join(None)
    training = task(made)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in training.clip.network.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    network = accelerator.prepare(training.network)
    share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    loss, _ = training.loss(network, next(training.stream.batches(0, made.batch_size, made.batch_size, **share)))
    accelerator.backward(loss)
    named = training.network.named_parameters()
    return {"loss": loss.detach().reshape(1), **{name: p.grad for name, p in named if p.grad is not None}}


HOW: dict[str, dict[str, Any]] = {
    "infonce": {},
    "infonce, chunks, drift": {"chunk_size": 3, "drift_weight": 0.5},
    "sigmoid": {"loss": "sigmoid"},
    "sigmoid, chunks, drift": {"loss": "sigmoid", "chunk_size": 3, "drift_weight": 0.5},
    "lora, locked": {"tune": "lora", "lock": "image"},
}


@LINUX
def test_two_processes_have_the_gradients_of_one_and_report_once(
    clip: Path, siglip: Path, data: Path, uncaptioned: Path, tmp_path: Path
) -> None:
    answers, out = tmp_path / "answers", tmp_path / "two"
    answers.mkdir()
    hows = {name: {"model": str(clip), **how} for name, how in HOW.items()}
    hows["taught"] = {"model": str(clip), "teacher": str(siglip), "extra": str(uncaptioned)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [
            *launch,
            __file__,
            str(answers),
            str(data),
            str(out),
            json.dumps(list(hows.values())),
        ],
        env={
            **os.environ,
            "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for number, (name, how) in enumerate(hows.items()):
        wanted = gradients(settings(data, tmp_path / "one", **how))
        assert ("bias" in wanted) == (how.get("loss") == "sigmoid")
        for rank in range(2):
            found = load_file(answers / f"{number}-{rank}.safetensors")
            assert found.keys() == wanted.keys(), name
            for part, gradient in wanted.items():
                assert (found[part] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1.0), (name, part)
    lines = done.stdout.splitlines()
    assert lines[0] == str(out / "model")
    assert [line.split()[0] for line in lines[1:]] == ["dev,", "tuned"], "one report"
    assert read_json(out / "retrieval.json")["clip"] == loading.identity(str(out), "clip")


def main(answers: Path, data: Path, out: Path, trainings: str) -> None:
    """Write the gradients of each training as ANSWERS/NUMBER-RANK.safetensors, then train a new CLIP in RUN."""
    for number, how in enumerate(json.loads(trainings)):
        found = gradients(settings(data, out, **how))
        save_file({k: v.contiguous() for k, v in found.items()}, answers / f"{number}-{os.environ['RANK']}.safetensors")
    train_clip.run(settings(data, out, images=16))


# ---- mistakes


def test_a_vocabulary_without_room_is_refused(data: Path, tmp_path: Path) -> None:
    refused(settings(data, tmp_path / "r", vocabulary=100), ConfigError, "vocabulary 100 is too small")


def test_pictures_without_captions_are_refused(uncaptioned: Path, tmp_path: Path) -> None:
    refused(settings(uncaptioned, tmp_path / "r"), DataError, "no captioned pictures in its train split")


def test_without_val_there_is_nothing_to_judge_by(no_val: Path, tmp_path: Path) -> None:
    refused(settings(no_val, tmp_path / "r"), DataError, "no captioned pictures in its val split")


def test_a_batch_of_more_than_all_pictures_is_refused(data: Path, tmp_path: Path) -> None:
    count = len(read_split(data, "train"))
    match = rf"batch_size {count + 1} is more than the {count} captioned pictures of .*; lower it"
    refused(settings(data, tmp_path / "r", batch_size=count + 1), ConfigError, match)
    assert (
        len(next(task(settings(data, tmp_path / "r", batch_size=count)).stream.batches(0, 1, count))["owner"]) == count
    )


def test_a_siglip_is_shown_all_patches(siglip: Path, data: Path, tmp_path: Path) -> None:
    refused(settings(data, tmp_path / "r", model=str(siglip), patch_dropout=0.5), ConfigError, "patch_dropout is for a")


def test_a_siglip_has_no_map_for_a_unet(siglip: Path, data: Path, tmp_path: Path) -> None:
    refused(
        settings(data, tmp_path / "r", model=str(siglip), tune="adapter"), ConfigError, "tune=adapter is for a CLIP"
    )


def test_what_a_given_clip_keeps_is_not_asked_to_be_otherwise(clip: Path, data: Path, tmp_path: Path) -> None:
    for name, other in (("size", 32), ("patch", 4), ("width", 8), ("layers", 2), ("heads", 1), ("features", 4)):
        match = f"^{name} is for a new CLIP, and that of {clip} keeps its own; leave it out"
        refused(settings(data, tmp_path / "r", model=str(clip), **CLIP | {name: other}), ConfigError, match)
    task(settings(data, tmp_path / "r", model=str(clip), **CLIP))


def test_captions_that_are_not_read_whole_are_counted(
    siglip: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "A dog runs through the snow. " * 40
    other = with_captions(data, tmp_path / "data", lambda _, n, captions: [long, *captions[1:]] if n < 3 else captions)
    task(settings(other, tmp_path / "r", model=str(siglip)))
    captions = sum(len(record.captions) for record in read_split(data, "train"))
    assert f"3 of {captions} captions are longer than the 64 tokens that are read of each" in caplog.text
    assert len(caplog.records) == 1


def test_weights_that_are_missing_or_pickled_are_refused_by_name(clip: Path, data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(clip / "model" / "clip", base)
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if name != "text_projection.weight"}, file, {"format": "pt"})
    refused(settings(data, tmp_path / "r", model=str(base)), ModelError, "base lacks the weight text_projection.weight")
    file.unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    refused(settings(data, tmp_path / "r", model=str(base)), ModelError, r"pytorch_model\.bin|base .*safetensors")


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"sweep_alpha": True}, "sweep_alpha compares with the CLIP that the training begins with"),
        ({"drift_weight": 1}, "drift_weight compares with the CLIP that the training begins with"),
        ({"tune": "lora"}, "a new CLIP has nothing to keep yet"),
        ({"lock": "text"}, "a new CLIP has nothing to keep yet"),
        ({"model": "m", "tune": "adapter", "drift_weight": 1}, "leaves both towers as they are"),
        ({"model": "m", "tune": "adapter", "sweep_alpha": True}, "leaves both towers as they are"),
        ({"model": "m", "tune": "adapter", "lock": "image"}, "leaves both towers as they are"),
        ({"model": "m", "lock": "text", "drift_weight": 1}, "a locked text tower can't drift"),
        ({"model": "m", "unet": "builtin"}, "unet is only for the pictures of sweep_alpha"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(how: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        resolve(TrainClipConfig, {"data": "d", "out": "o", **how})


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), sys.argv[4])
