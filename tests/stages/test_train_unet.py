"""`limner train unet`: on the latents and token states of `encode`, for the scheduler that it is saved with."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from PIL import Image
from torch.testing import assert_close

from limner.artifacts import read_json
from limner.config import EncodeConfig, TrainUnetConfig
from limner.data.dataset import read_split
from limner.data.latents import LatentCache
from limner.diffusion import schedulers
from limner.errors import ConfigError, DataError, ModelError, RunError
from limner.evaluation.extractors import features_of
from limner.evaluation.watch import Watch
from limner.evaluation.yardstick import Yardstick
from limner.generation.engine import paint
from limner.models import loading
from limner.models.clip import HALF, Clip
from limner.stages import encode, train_unet
from limner.stages.train_unet import TrainUnet
from limner.training import encoded
from tiny import tiny_clip, tiny_tokenizer, tiny_unet
from trainings import SIDE, config, weights


def examples(
    latents: Path, tmp_path: Path, count: int, **settings: object
) -> tuple[TrainUnet, list[dict[str, object]]]:
    """The task and its first examples."""
    task = TrainUnet(config(TrainUnetConfig, latents, tmp_path / "r", **settings))
    return task, [task.stream[k] for k in range(count)]


# ---- what it learns from


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_captions_are_dropped_as_often_as_asked(latents: Path, tmp_path: Path, dropout: float) -> None:
    task, shown = examples(latents, tmp_path, 400, caption_dropout=dropout)
    dropped = sum(torch.equal(example["states"], task.encoded.empty[0]) for example in shown)  # type: ignore[arg-type]
    assert dropped / 400 == pytest.approx(dropout, abs=0.08 if 0 < dropout < 1 else 0)


def test_each_caption_and_both_views_of_a_picture_are_shown(latents: Path, tmp_path: Path) -> None:
    _, shown = examples(latents, tmp_path, 600, caption_dropout=0)
    cache = LatentCache(latents, "train")

    def seen(name: str, wanted: torch.Tensor) -> bool:
        return any(torch.equal(example[name], wanted) for example in shown)  # type: ignore[arg-type]

    assert all(seen("states", cache.states(0, caption)) for caption in range(5))
    assert all(seen("moments", cache.view(0, view)) for view in range(2))
    assert len({float(example["t"]) for example in shown}) == 600  # type: ignore[arg-type]


def test_a_caption_with_a_side_is_never_shown_mirrored(latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents, tmp_path / "latents")
    cache = LatentCache(latents, "train")
    file = tmp_path / "latents" / "cache" / "train" / "captions.json"
    file.write_text(str([["on the left"] * 5 for _ in cache.captions]).replace("'", '"'))
    _, shown = examples(tmp_path / "latents", tmp_path, 100, caption_dropout=0)
    plain = [cache.view(index, 0) for index in range(len(cache))]
    for example in shown:
        assert any(torch.equal(example["moments"], view) for view in plain)  # type: ignore[arg-type]


def test_a_noise_offset_changes_the_noise_alone_and_is_the_examples_own(latents: Path, tmp_path: Path) -> None:
    _, plain = examples(latents, tmp_path, 20)
    task, offset = examples(latents, tmp_path, 20, noise_offset=0.5)
    for before, after in zip(plain, offset):
        assert before["t"] == after["t"]
        assert torch.equal(before["moments"], after["moments"])  # type: ignore[arg-type]
        added = after["noise"] - before["noise"]  # type: ignore[operator]
        assert_close(added, added[:, :1, :1].expand_as(added))
        assert added.abs().max() > 0.01
    assert torch.equal(task.stream[7]["noise"], offset[7]["noise"])  # type: ignore[arg-type]
    means = torch.stack([example["draw"].mean(dim=(1, 2)) for example in offset])  # type: ignore[attr-defined]  # (20, C)
    assert means.std() < 0.25, "what is drawn of the moments has no offset"


@torch.no_grad()
def test_activations_are_dropped_in_training_and_not_where_it_is_judged(latents: Path, tmp_path: Path) -> None:
    task, _ = examples(latents, tmp_path, 0, dropout=0.5)
    (batch,) = task.stream.batches(0, 4, 4)
    others = {**batch, "dropped": batch["dropped"].flip(0)}
    one, again, other = (task.loss(task.network.train(), given)[0] for given in (batch, batch, others))
    assert one == again != other
    task.network.eval()
    whole, same = (task.loss(task.network, given)[0] for given in (batch, others))
    assert whole == same != one


def test_how_errors_are_weighted_in_training_does_not_change_how_they_are_judged(latents: Path, tmp_path: Path) -> None:
    judged = []
    for settings in ({}, {"min_snr": 1, "noise_offset": 0.5, "levels": "cosine"}):
        torch.manual_seed(0)
        task, _ = examples(latents, tmp_path, 0, **settings)
        (tmp_path / "samples").mkdir(exist_ok=True)
        judged.append(task.validate(tmp_path / "samples"))
    assert judged[0] == judged[1]


@pytest.mark.parametrize("objective", ["flow", "eps", "v"])
@torch.no_grad()
def test_a_network_that_knows_nothing_loses_what_its_target_varies(
    latents: Path, tmp_path: Path, objective: str
) -> None:
    """Latents and noise have unit variance: a flow of both varies by 2, noise by 1, and v by 1."""
    task, _ = examples(latents, tmp_path, 0, objective=objective)
    task.network.conv_out.weight.zero_()
    task.network.conv_out.bias.zero_()
    (batch,) = task.stream.batches(0, 256, 256)
    wanted = {"flow": 2.0, "eps": 1.0, "v": 1.0}[objective]
    assert_close(task.loss(task.network, batch)[0].item(), wanted, rtol=0.1, atol=0)


# ---- buckets, views and masks


def test_batches_are_of_one_bucket_with_noise_of_its_shape_and_masks(bucketed: Path, tmp_path: Path) -> None:
    task, _ = examples(bucketed, tmp_path, 0, batch_size=4)
    cache = LatentCache(bucketed, "train")
    shapes = set()
    for batch in task.stream.batches(0, 4 * 60, 4):
        shapes.add(batch["moments"].shape[2:])
        assert batch["noise"].shape == batch["draw"].shape == (4, 4, *batch["moments"].shape[2:])
        assert ("mask" in batch) == (batch["moments"].shape[2:] == (8, 8))
        for row, moments in enumerate(batch["moments"]):
            found = [
                (index, view)
                for index in range(len(cache))
                for view in range(6)
                if cache.view(index, view).shape == moments.shape and torch.equal(cache.view(index, view), moments)
            ]
            assert len({index for index, _ in found}) == 1
            if "mask" in batch:
                assert torch.equal(batch["mask"][row], cache.mask(*found[0]))  # type: ignore[arg-type]
    assert shapes == {(8, 8), (6, 10), (10, 6)}


def test_all_views_are_shown_and_mirrored_ones_never_with_a_side(bucketed: Path, tmp_path: Path) -> None:
    shutil.copytree(bucketed, tmp_path / "latents")
    file = tmp_path / "latents" / "cache" / "train" / "captions.json"
    sides = [["On the left."] if index % 2 else own for index, own in enumerate(json.loads(file.read_text()))]
    file.write_text(json.dumps(sides))
    task, _ = examples(tmp_path / "latents", tmp_path, 0, batch_size=1, caption_dropout=0)
    for index, wanted in ((0, {0, 1, 2, 3, 4, 5}), (1, {0, 2, 4})):
        moments = [task._example(index, np.random.default_rng(seed))["moments"] for seed in range(100)]
        shown = [view for m in moments for view in range(6) if torch.equal(m, task.encoded.train.view(index, view))]
        assert len(shown) == 100
        assert set(shown) == wanted


def test_training_with_buckets_is_judged_on_all_of_them_and_draws_squares(bucketed: Path, tmp_path: Path) -> None:
    run = train_unet.run(config(TrainUnetConfig, bucketed, tmp_path / "r", images=8, batch_size=4))
    assert loading.load_unet(str(run)).config["sample_size"] == SIDE // 2
    assert Image.open(run / "samples" / "000000008" / "drawn.png").width == 4 * SIDE
    task, _ = examples(bucketed, tmp_path, 0, batch_size=4)
    val = task.encoded.val
    assert len(np.unique(val.bucket)) > 1
    judged = [moments for batch in task.encoded.judged(100) for moments in batch["moments"]]
    assert len(judged) == len(val)
    for index in range(len(val)):
        own = val.view(index, 0)
        assert sum(own.shape == other.shape and torch.equal(own, other) for other in judged) == 1


def test_pictures_of_buckets_are_trained_on_one_by_one_too(bucketed: Path, tmp_path: Path) -> None:
    assert train_unet.plan(config(TrainUnetConfig, bucketed, tmp_path / "r", batch_size=1))["steps"].endswith(
        "of 1 images"
    )


def test_the_noise_that_a_picture_is_judged_with_is_its_own(bucketed: Path, tmp_path: Path) -> None:
    """Neither the seed nor how many are held at once changes it."""
    found = []
    for given in ({"batch_size": 4, "micro_batch_size": 1}, {"batch_size": 4, "seed": 1}):
        task, _ = examples(bucketed, tmp_path, 0, **given)
        batches = list(task.encoded.judged(100))
        assert max(len(batch["noise"]) for batch in batches) == task.config.held
        found.append(
            [[rows[row] for rows in batch.values()] for batch in batches for row in range(len(batch["noise"]))]
        )
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for one, other in zip(*found, strict=True) for a, b in zip(one, other, strict=True))


def test_a_batch_beyond_every_bucket_is_refused_and_small_buckets_are_said(
    bucketed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts = np.bincount(LatentCache(bucketed, "train").bucket)
    too_many = config(TrainUnetConfig, bucketed, tmp_path / "r", batch_size=int(counts.max()) + 1)
    with pytest.raises(ConfigError, match=r"is more than the \d+ pictures of the largest bucket of .*; lower it"):
        train_unet.run(too_many)
    assert not (tmp_path / "r").exists()
    assert caplog.messages == []
    task, _ = examples(bucketed, tmp_path, 0, batch_size=int(counts.max()))
    few = int(counts[counts < counts.max()].sum())
    assert [message for message in caplog.messages if message.startswith(f"{few} pictures")] or not few
    assert next(task.stream.of(2).batches(0, 2, 2))["t"].shape == (2,)


# ---- what it leaves


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_the_scheduler_is_of_the_objective_and_a_further_training_keeps_it(
    latents: Path, tmp_path: Path, objective: str
) -> None:
    run = train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r", objective=objective, images=8))
    assert schedulers.objective_of(loading.load_scheduler(str(run))) == objective
    more = train_unet.run(config(TrainUnetConfig, latents, tmp_path / "s", model=str(run), images=8))
    assert schedulers.objective_of(loading.load_scheduler(str(more))) == objective


def test_zero_terminal_snr_is_written_into_the_scheduler_and_a_further_training_keeps_it(
    latents: Path, tmp_path: Path
) -> None:
    zero = {"zero_terminal_snr": True, "levels": "uniform"}
    run = train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r", objective="v", images=8, **zero))
    more = train_unet.run(config(TrainUnetConfig, latents, tmp_path / "s", model=str(run), images=8))
    for each in (run, more):
        scheduler = loading.load_scheduler(str(each))
        assert scheduler.config.rescale_betas_zero_snr
        assert scheduler.config.timestep_spacing == "trailing"


def test_the_scheduler_of_a_given_unet_is_changed_for_zero_terminal_snr(latents: Path, tmp_path: Path) -> None:
    model = saved_unet(tmp_path / "model", cross_attention_dim=16)
    given = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear", clip_sample=False)
    given.save_pretrained(tmp_path / "model" / "scheduler")
    zero = {"zero_terminal_snr": True, "levels": "cosine"}
    task, _ = examples(latents, tmp_path, 0, model=model, **zero)
    task.save(tmp_path / "saved")
    scheduler = loading.load_scheduler(str(tmp_path / "saved"))
    assert type(scheduler) is DDIMScheduler
    before, after = ({n: v for n, v in each.config.items() if n[0] != "_"} for each in (given, scheduler))
    assert after == {**before, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert torch.equal(task.betas, scheduler.betas), "trained as it samples"


def test_pictures_are_drawn_at_each_validation(latents: Path, tmp_path: Path) -> None:
    prompts = ("A red circle on a blue ground.", "A circle " * 100)
    run = train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r", images=8, sample_prompts=prompts))
    val = len(LatentCache(latents, "val"))
    count = len(prompts) + min(val, encoded.SHOWN)
    sheet = Image.open(run / "samples" / "000000008" / "drawn.png")
    assert sheet.size == (4 * SIDE, -(-count // 4) * SIDE)
    assert np.asarray(sheet).std() > 0


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights that nothing is trained on."""
    folder = tmp_path_factory.mktemp("judge")
    Clip(tiny_clip(7), tiny_tokenizer(folder / "tokenizer"), HALF).save(folder / "clip")
    return folder


def test_a_judge_scores_what_the_average_draws_and_changes_nothing(
    latents: Path, unet: Path, data: Path, clip: Path, vae: Path, judge: Path, tmp_path: Path
) -> None:
    run = train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r", judge=str(judge), judged_pictures=3))
    assert weights(run) == weights(unet)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if "validation/cmmd" in event]
    assert [event["images"] for event in told] == [16, 32]

    captions = [captions[0] for captions in LatentCache(latents, "val").captions]
    text_encoder, tokenizer = loading.load_text_encoder(str(clip))
    model = str(run)
    pixels = paint(
        loading.load_unet(model),
        loading.load_scheduler(model),
        loading.load_vae(str(vae)),
        text_encoder,
        tokenizer,
        captions[:3],
        seeds=range(3),
        steps=train_unet.STEPS,
        guidance=train_unet.GUIDANCE,
    )
    own = Yardstick.find(str(judge))
    real = features_of(own.extractor, [record.path for record in read_split(data, "val")])
    wanted = Watch(own, captions[:3], real, captions).score(pixels)
    assert {name: told[-1][f"validation/{name}"] for name in wanted} == pytest.approx(wanted, abs=1e-4)
    assert len(list((run / "features").iterdir())) == 1


def test_the_best_may_be_by_what_the_judge_says(latents: Path, judge: Path, tmp_path: Path) -> None:
    given = {"judge": str(judge), "judged_pictures": 3, "best_by": "cmmd", "result": "best", "patience": 2}
    often = {"images": 400, "lr": 0.3, "ema_halflife": 0, "validate_every": 8}
    run = train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r", **given, **often))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    cmmd = {event["images"]: event["validation/cmmd"] for event in events if "validation/cmmd" in event}
    manifest = read_json(run / "manifest.json")
    assert manifest["validation"]["cmmd"] == min(cmmd.values())
    assert manifest["stopped_early"]
    assert manifest["images"] == max(cmmd) == min(cmmd, key=cmmd.__getitem__) + 16


def test_figures_are_by_level(unet: Path) -> None:
    figures = read_json(unet / "manifest.json")["validation"]
    levels = [value for name, value in figures.items() if name.startswith("loss_at_")]
    assert len(levels) == len(train_unet.LEVELS)
    assert figures["loss"] == pytest.approx(sum(levels) / len(levels))


def test_pictures_without_captions_teach_too(
    uncaptioned: Path, clip: Path, vae: Path, judge: Path, tmp_path: Path
) -> None:
    shutil.copytree(uncaptioned, tmp_path / "data")
    file = tmp_path / "data" / "train" / "metadata.jsonl"
    file.write_text(file.read_text().replace('"captions": []', '"captions": ["A shape."]', 1))
    cache = encode.run(config(EncodeConfig, tmp_path / "data", tmp_path / "latents", clip=str(clip), vae=str(vae)))
    with pytest.raises(DataError, match="has a caption to draw for the judge; leave it out"):
        train_unet.run(config(TrainUnetConfig, cache, tmp_path / "r", images=8, judge=str(judge)))
    run = train_unet.run(config(TrainUnetConfig, cache, tmp_path / "r", images=8))
    assert (run / "samples" / "000000008" / "drawn.png").exists()


# ---- mistakes


def test_a_judge_that_can_not_judge_is_refused_before_the_training(
    latents: Path, clip: Path, judge: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r"
    with pytest.raises(ConfigError, match="The judge is the very CLIP whose token states are trained on"):
        train_unet.run(config(TrainUnetConfig, latents, out, judge=str(clip)))
    moved = tmp_path / "moved"
    shutil.copytree(latents, moved)
    settings = read_json(moved / "config.json")
    (moved / "config.json").write_text(json.dumps({**settings, "data": str(tmp_path / "gone")}))
    with pytest.raises(DataError, match="gone"):
        train_unet.run(config(TrainUnetConfig, moved, out, judge=str(judge)))
    assert not out.exists()


def saved_unet(folder: Path, **settings: object) -> str:
    """A U-Net with its scheduler, not trained here."""
    tiny_unet(**settings).save_pretrained(folder / "unet")  # type: ignore[arg-type]
    schedulers.new("flow").save_pretrained(folder / "scheduler")
    return str(folder)


def test_a_unet_of_another_width_is_refused(latents: Path, tmp_path: Path) -> None:
    model = saved_unet(tmp_path / "model", cross_attention_dim=24)
    with pytest.raises(ModelError, match=r"wants token states of width 24, and .* has 16; encode with"):
        train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r", model=model))
    model = saved_unet(tmp_path / "other", cross_attention_dim=16, in_channels=8, out_channels=8)
    with pytest.raises(ModelError, match=r"wants latents of 8 channels, and .* has 4; encode with"):
        train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r", model=model))
    assert not (tmp_path / "r").exists()


def test_what_a_given_unet_keeps_is_not_asked_to_be_otherwise(latents: Path, tmp_path: Path) -> None:
    sizes = {"block_out_channels": (32, 64), "attention_head_dim": (1, 2)}
    model = saved_unet(tmp_path / "model", cross_attention_dim=16, **sizes)
    own = {"channels": (32, 64), "attention": (False, True)}
    for name, other in (("objective", "v"), ("layers", 2), ("head_width", 16), ("channels", (32, 32))):
        with pytest.raises(
            ConfigError, match=rf"^{name} is for a new U-Net, and that of .* keeps its own; leave it out"
        ):
            examples(latents, tmp_path, 0, model=model, **own | {name: other})
    examples(latents, tmp_path, 0, model=model, **own, objective="flow", layers=1, head_width=32)


def test_a_unet_that_predicts_something_else_is_refused(latents: Path, tmp_path: Path) -> None:
    model = saved_unet(tmp_path / "model", cross_attention_dim=16)
    DDIMScheduler(prediction_type="sample").save_pretrained(tmp_path / "model" / "scheduler")
    with pytest.raises(ModelError, match="predicts sample; choose another model"):
        train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r", model=model))
    assert not (tmp_path / "r").exists()


def test_zero_terminal_snr_for_a_unet_that_does_not_predict_v_is_refused(latents: Path, tmp_path: Path) -> None:
    model = saved_unet(tmp_path / "model", cross_attention_dim=16)
    zero = {"zero_terminal_snr": True, "levels": "uniform"}
    with pytest.raises(ModelError, match="this one predicts flow; leave it out"):
        train_unet.run(config(TrainUnetConfig, latents, tmp_path / "r", model=model, **zero))
    assert not (tmp_path / "r").exists()


def test_a_cache_without_val_is_refused(
    no_val: Path, clip: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "read_validation_split", lambda folder: [])  # as older versions let it be
    cache = encode.run(config(EncodeConfig, no_val, tmp_path / "latents", clip=str(clip), vae=str(vae)))
    with pytest.raises(DataError, match="no pictures in its val split"):
        train_unet.run(config(TrainUnetConfig, cache, tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_a_dataset_in_place_of_its_latents_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a finished run of `limner encode`"):
        train_unet.run(config(TrainUnetConfig, data, tmp_path / "r"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("vae", "the VAE .*encoder changed"),
        ("clip", "the text encoder .*encoder changed"),
        ("data", "data/train of .*copy changed"),
        ("val", "data/val of .*copy changed"),
    ],
)
def test_a_stale_cache_is_refused_and_what_changed_is_named(
    data: Path, clip: Path, vae: Path, tmp_path: Path, what: str, named: str
) -> None:
    shutil.copytree(data, tmp_path / "copy")
    encoders = {"clip": clip, "vae": vae}
    if what in encoders:
        shutil.copytree(encoders[what], tmp_path / "encoder")
        encoders[what] = tmp_path / "encoder"
    paths = {name: str(path) for name, path in encoders.items()}
    cache = encode.run(config(EncodeConfig, tmp_path / "copy", tmp_path / "latents", **paths))
    settings = config(TrainUnetConfig, cache, tmp_path / "r")
    TrainUnet(settings)
    if what in encoders:
        (file,) = (tmp_path / "encoder" / "model").rglob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif what == "val":
        (tmp_path / "copy" / "val" / "metadata.jsonl").unlink()
    else:
        file = tmp_path / "copy" / "train" / "metadata.jsonl"
        file.write_text(file.read_text().replace("circle", "square"))
    with pytest.raises(DataError, match=f"is stale, as {named} since; encode into a new folder") as caught:
        train_unet.run(settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()
    if what in ("data", "val"):
        shutil.rmtree(tmp_path / "copy")
        TrainUnet(settings)  # which needs no pictures


def test_another_decoder_leaves_a_cache_as_it_is(data: Path, clip: Path, vae: Path, tmp_path: Path) -> None:
    """`train vae --tune decoder` is for a U-Net that knows the latents."""
    shutil.copytree(vae / "model", tmp_path / "encoder")
    paths = {"clip": str(clip), "vae": str(tmp_path / "encoder")}
    cache = encode.run(config(EncodeConfig, data, tmp_path / "latents", **paths))
    for part, stale in (("decoder.conv_out", False), ("encoder.conv_out", True)):
        network = loading.load_vae(paths["vae"])
        network.get_submodule(part).bias.data += 1
        network.save_pretrained(tmp_path / "encoder" / "vae")
        with pytest.raises(DataError, match="is stale, as the VAE") if stale else nullcontext():
            TrainUnet(config(TrainUnetConfig, cache, tmp_path / "r"))


def test_latents_made_anew_are_another_parent(latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents, tmp_path / "latents")
    settings = config(TrainUnetConfig, tmp_path / "latents", tmp_path / "r", images=8)
    train_unet.run(settings)
    file = tmp_path / "latents" / "cache" / "train" / "moments.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match="other contents of data than"):
        train_unet.run(settings)
