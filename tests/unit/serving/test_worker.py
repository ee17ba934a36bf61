"""What the worker does with batches of several jobs, as on a GPU, and with pictures side by side, as on a CPU; with two
models, and where something fails."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sqlalchemy")
from limner.config import ServeConfig
from limner.errors import ConfigError
from limner.generation.model import Model, Picture
from limner.serving import worker
from limner.serving.keeper import folder_of
from limner.serving.schemas import JobRequest, JobView
from limner.serving.service import Draining, Service
from limner.serving.store import QueueFull
from limner.serving.tables import OPEN, ImageRow
from tiny import tiny_model, tiny_unet

BATCH = 8
PROMPTS = ("A dog.", "A cat on a beach.", "Two children play.")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models."""
    place = tmp_path_factory.mktemp("worker")
    return [str(tiny_model(place / "first")), str(tiny_model(place / "second", "ddpm"))]


@pytest.fixture
def beside(folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    """One that begins to draw when it is started, two pictures side by side."""
    monkeypatch.setattr(Model, "at_once", lambda *_: 2)
    return Service(ServeConfig(models=tuple(folders), out=tmp_path / "served", device="cpu", queue=20))


@pytest.fixture
def service(folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    """One that begins to draw when it is started, several pictures at once."""
    monkeypatch.setattr(Model, "at_once", lambda *_: BATCH)
    service = Service(ServeConfig(models=tuple(folders), out=tmp_path / "served", device="cpu", queue=20))
    service.worker._side_by_side = False
    return service


def ended(service: Service, *jobs: JobView) -> list[JobView]:
    """The jobs once they have ended, drawn from now on; the service ends then too."""
    service.start()
    until = time.monotonic() + 120
    while set(service.store.counts()) & set(OPEN):
        assert time.monotonic() < until
        time.sleep(0.02)
    found = [service.get(job.id) for job in jobs]
    service.stop()
    assert all(found)
    return [job for job in found if job]


def pixels(service: Service, job: JobView) -> list[Any]:
    """Of the pictures of a job."""
    files = [service.file(image.id) for image in job.images]
    return [np.asarray(Image.open(file)).astype(int) for file in files if file]


def noise() -> str:
    """A picture to begin with, in base64."""
    out = io.BytesIO()
    Image.effect_noise((16, 16), 80).convert("RGB").save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def steps_told(service: Service, monkeypatch: pytest.MonkeyPatch, *jobs: JobView) -> list[list[int | None]]:
    """How far each job is after each step that is told, from now on."""
    draw, told = Model.draw, []

    def watched(self: Model, drawn: Sequence[Any], *, on_step: Callable[[int], None], **more: Any) -> Any:
        def step(amount: int) -> None:
            on_step(amount)
            told.append([service.worker.step_of(job.id) for job in jobs])

        return draw(self, drawn, on_step=step, **more)

    monkeypatch.setattr(Model, "draw", watched)
    return told


def test_jobs_drawn_at_once_are_as_each_alone(service: Service, folders: list[str]) -> None:
    """Of two models, of which one has jobs of one and of several pictures."""
    requests = [JobRequest(prompt=text, seed=7 + n, n=n, steps=3) for n, text in enumerate(PROMPTS, 1)]
    requests.append(requests[0])  # the same twice
    other = JobRequest(prompt=PROMPTS[0], seed=7, steps=3, model="second")
    jobs = ended(service, *map(service.submit, [*requests, other]))
    assert {job.state for job in jobs} == {"done"}
    assert len({job.started for job in jobs[:-1]}) == 1, "taken together"
    assert all(job.step == job.steps for job in jobs)
    for job, request, folder in zip(jobs, [*requests, other], [*folders[:1] * 4, folders[1]], strict=True):
        model, drawn = Model.load(folder, device="cpu"), pixels(service, job)
        assert len(drawn) == request.n
        for number, image in enumerate(drawn):
            (alone,) = model(request.prompt, seed=(request.seed or 0) + number, steps=3).images
            assert np.abs(image - np.asarray(alone)).max() <= 1


def test_what_is_told_of_a_picture_draws_it_again(service: Service, folders: list[str]) -> None:
    requests = [JobRequest(prompt="A dog.", seed=5, n=2, steps=2, variation=about) for about in (None, "20:0.25")]
    jobs = ended(service, *map(service.submit, requests))
    told = [(image.number, image.seed, image.variation) for job in jobs for image in job.images]
    assert told == [(0, 5, None), (1, 6, None), (0, 5, "20:0.25"), (1, 5, "21:0.25")]
    model = Model.load(folders[0], device="cpu")
    for job in jobs:
        for view, drawn in zip(job.images, pixels(service, job), strict=True):
            (alone,) = model("A dog.", seed=view.seed, variation=view.variation, steps=2).images
            assert np.abs(drawn - np.asarray(alone)).max() <= 1


def test_a_job_that_can_t_be_drawn_fails_alone(service: Service) -> None:
    bad = service.submit(JobRequest(prompt="A dog.", seed=1, steps=2, image=noise(), strength=1))
    good = service.submit(JobRequest(prompt="A dog.", seed=1, steps=2))
    for file in service.uploads.folder.glob("??/*"):
        file.unlink()
    bad, good = ended(service, bad, good)
    assert bad.started == good.started, "taken together"
    assert (good.state, good.error) == ("done", None)
    assert (bad.state, bad.fault) == ("failed", True)
    assert "no picture" in str(bad.error)


def test_a_batch_that_fails_is_drawn_one_by_one(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, sizes = Model.draw, []

    def fails(self: Model, jobs: Sequence[Any], **more: Any) -> Any:
        sizes.append(len(jobs))
        if len(jobs) > 1:
            more["on_step"](1)
            raise RuntimeError("out of memory")
        return draw(self, jobs, **more)

    monkeypatch.setattr(Model, "draw", fails)
    two, one = (service.submit(JobRequest(prompt="A dog.", seed=1, n=n, steps=2)) for n in (2, 1))
    two, one = ended(service, two, one)
    assert sizes == [3, 1, 1, 1]
    assert [(job.state, job.step, len(job.images)) for job in (two, one)] == [("done", 4, 2), ("done", 2, 1)]


def test_of_jobs_drawn_together_each_is_as_far_as_its_share(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The painter draws one after the other, as on a GPU where their prompts are not of one length."""
    jobs = [service.submit(JobRequest(prompt="A dog.", seed=seed, steps=2)) for seed in (1, 2)]
    told = steps_told(service, monkeypatch, *jobs)
    ended(service, *jobs)
    assert told == [[0, 0], [1, 1], [1, 1], [2, 2]]


def test_of_another_pipeline_each_picture_is_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(tmp_path / "lcm", "lcm", unet=tiny_unet(time_cond_proj_dim=16))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "LatentConsistencyModelPipeline"}))
    service = Service(ServeConfig(models=(str(folder),), out=tmp_path / "served", device="cpu"))
    job = service.submit(JobRequest(prompt="A dog.", n=2))
    told = steps_told(service, monkeypatch, job)
    (job,) = ended(service, job)
    assert told == [[1], [2]], "who draws it has its own number of steps"
    assert (job.state, job.step, job.steps) == ("done", 2, 2)


def test_a_picture_that_another_kept_before_its_first_step_was_told_stays(service: Service) -> None:
    job = service.submit(JobRequest(prompt="A dog.", seed=1, n=2, steps=1))
    store, file = service.store, folder_of(service.config.out, job.id) / "kept.png"
    store.take("before", service.specs, pictures=2, lease=60)
    file.parent.mkdir(parents=True)
    file.touch()
    name = file.relative_to(service.config.out).as_posix()
    assert store.keep("before", ImageRow(id="kept", job=job.id, number=0, file=name, width=16, height=16), step=0)
    store.give_back("before")
    (job,) = ended(service, job)
    assert (job.state, [image.id == "kept" for image in job.images]) == ("done", [True, False])
    assert file.exists()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError(5, "I/O error")])
def test_a_first_model_that_does_not_load_leaves_the_other(
    service: Service, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    get: Callable[..., Model] = service.shelf.get

    def fails(name: str, *more: Any) -> Model:
        if name == "first":
            raise error
        return get(name, *more)

    monkeypatch.setattr(service.shelf, "get", fails)
    requests = [JobRequest(prompt="A dog.", steps=1, model=name) for name in ("first", "second")]
    first, second = ended(service, *map(service.submit, requests))
    assert (first.state, first.fault, second.state) == ("failed", True, "done")


def test_what_is_refused_leaves_no_file(service: Service) -> None:
    with pytest.raises(ConfigError, match="strength"):
        service.submit(JobRequest(prompt="A dog.", steps=2, image=noise(), strength=0.1))
    with pytest.raises(ConfigError, match="divisible"):
        service.submit(JobRequest(prompt="A dog.", size="17", image=noise()))
    for seed in range(20):
        service.submit(JobRequest(prompt="A dog.", seed=seed))
    with pytest.raises(QueueFull):
        service.submit(JobRequest(prompt="A dog.", image=noise()))
    assert not service.uploads.folder.exists()
    assert "limner_jobs_refused_total 1.0" in service.metrics.render({}, 0).decode()
    service.store.close()


def test_jobs_of_other_settings_are_drawn_side_by_side(beside: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, together = Model.draw, threading.Barrier(2)

    def meets(self: Model, jobs: Sequence[Any], **more: Any) -> Any:
        together.wait(60)  # where the other is never begun this fails
        return draw(self, jobs, **more)

    monkeypatch.setattr(Model, "draw", meets)
    requests = [JobRequest(prompt="A dog.", seed=1, steps=2), JobRequest(prompt="A cat.", seed=2, steps=3, guidance=2)]
    requests.append(JobRequest(prompt="A dog.", seed=3, steps=2, n=2))
    jobs = ended(beside, *map(beside.submit, requests))
    assert [(job.state, job.step, len(job.images)) for job in jobs] == [("done", 2, 1), ("done", 3, 1), ("done", 4, 2)]
    assert [image.seed for image in jobs[2].images] == [3, 4]


def test_of_pictures_side_by_side_only_the_job_of_one_that_fails_fails(
    beside: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Model.draw

    def fails(self: Model, jobs: Sequence[Any], **more: Any) -> Any:
        if jobs[0].seed == 8:
            raise RuntimeError("no")
        return draw(self, jobs, **more)

    monkeypatch.setattr(Model, "draw", fails)
    bad, good = (beside.submit(JobRequest(prompt="A dog.", seed=seed, steps=2, n=2)) for seed in (7, 1))
    bad, good = ended(beside, bad, good)
    assert (bad.state, bad.fault) == ("failed", True)
    assert (good.state, len(good.images)) == ("done", 2)


def test_what_can_t_be_kept_is_drawn_again(beside: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "TROUBLED", 0.1)
    save, tries = Picture.save, []

    def full(self: Picture, folder: Path | str, *more: Any) -> Path:
        tries.append(self.record["seed"])
        if len(tries) < 3:
            raise OSError(28, "No space left on device")
        return save(self, folder, *more)

    monkeypatch.setattr(Picture, "save", full)
    jobs = [beside.submit(JobRequest(prompt="A dog.", seed=seed, steps=1, n=2)) for seed in (1, 5)]
    jobs = ended(beside, *jobs)
    assert [(job.state, len(job.images)) for job in jobs] == [("done", 2), ("done", 2)]
    assert len(tries) >= 6
    rows = [beside.store.get(job.id) for job in jobs]
    assert all(row is not None and row.attempts == 1 for row in rows), "nobody's fault"


def test_a_server_leaves_jobs_of_models_that_it_has_not_to_others(folders: list[str], tmp_path: Path) -> None:
    first, second = (Service(ServeConfig(models=(model,), out=tmp_path / "served", device="cpu")) for model in folders)
    second.start()
    jobs = [first.submit(JobRequest(prompt=prompt, steps=1)) for prompt in PROMPTS]
    own = second.submit(JobRequest(prompt=PROMPTS[0], steps=1))  # which has to wait for none of them
    until = time.monotonic() + 60
    while (view := second.get(own.id)) is not None and view.state in OPEN:
        assert time.monotonic() < until
        time.sleep(0.02)
    second.stop()
    assert [job.state for job in ended(first, *jobs)] == ["done"] * 3


def test_who_waits_hears_of_an_end_at_another_server(service: Service) -> None:
    queue = service.store
    service.worker._take = lambda: time.sleep(0.01)  # type: ignore[method-assign]  # so that it is the other's

    async def drawn_elsewhere() -> JobView:
        waiting = asyncio.create_task(service.draw(JobRequest(prompt=PROMPTS[0], steps=2)))
        models = service.specs
        while not (taken := await asyncio.to_thread(queue.take, "elsewhere/1/ab", models, pictures=1, lease=60.0)):
            await asyncio.sleep(0.01)
        await asyncio.sleep(worker.PULSE + 0.5)
        assert not waiting.done()
        queue.fail("elsewhere/1/ab", taken[0].id, "no luck", fault=False)
        return (await asyncio.wait_for(waiting, 60))[0]

    service.start()
    job = asyncio.run(drawn_elsewhere())
    assert (job.state, job.error) == ("failed", "no luck")
    service.stop()


def test_who_waits_for_what_is_handed_back_is_told_so(beside: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawing goes on until it is told to halt, so the job can't end."""
    begun, halting = threading.Event(), beside.worker._halting

    def draw(*_: Any, on_step: Callable[[int], None], **__: Any) -> Any:
        begun.set()
        halting.wait(60)
        on_step(1)

    monkeypatch.setattr(Model, "draw", draw)

    async def wait() -> None:
        waiting = asyncio.create_task(beside.draw(JobRequest(prompt=PROMPTS[0], steps=2)))
        assert await asyncio.to_thread(begun.wait, 60)
        beside.drain()
        beside.worker.halt()
        with pytest.raises(Draining, match="goes on when it is back"):
            await asyncio.wait_for(waiting, 60)

    beside.start()
    asyncio.run(wait())
    beside.stop()
