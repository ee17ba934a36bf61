"""`limner serve` as its clients meet it: a process, two clients of others unmodified, and its safety."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from commands import limner, no_special_rights
from limner.artifacts import sha256
from limner.generation import provenance
from limner.serving.store import Store
from serving import PROMPT, Queue, Server
from tiny import tiny_model

openai = pytest.importorskip("openai")
webuiapi = pytest.importorskip("webuiapi")
NOWHERE = "0" * 32


def generated(folder: Path, out: Path, *options: object) -> list[np.ndarray]:
    """What `limner generate` draws, by seed."""
    assert limner("generate", PROMPT, "--model", folder, "--out", out, "--device", "cpu", *options) == 0
    return [np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))]


def test_a_job_from_begin_to_end(server: Server, tmp_path: Path) -> None:
    status, job = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "seed": 3, "steps": 4, "n": 2})
    assert status == 202
    told = list(server.events(job["id"]))
    names = [name for name, _ in told]
    assert names.count("image") == 2
    assert names[-1] == "done"
    steps = [data["step"] for name, data in told if name == "step"]
    assert steps == sorted(steps)
    done = server.call("GET", f"/v1/jobs/{job['id']}")[1]
    assert (done["state"], done["step"], done["steps"]) == ("done", 8, 8)
    assert [image["seed"] for image in done["images"]] == [3, 4]
    file = tmp_path / "picture.png"
    file.write_bytes(server.call("GET", done["images"][1]["url"])[1])
    record = provenance.read(file)
    assert (record["prompt"], record["seed"]) == (PROMPT, 4)
    assert PROMPT not in str(server.lines()), "a prompt is nobody's business"


def test_previews_come_while_it_is_drawn(server: Server) -> None:
    """From the server that draws: of two it is nearly always the one that was asked, and once is enough."""

    def names(seed: int) -> list[str]:
        body = {"prompt": PROMPT, "seed": seed, "steps": 20}
        return [name for name, _ in server.events(server.call("POST", "/v1/jobs", body)[1]["id"])]

    assert any("preview" in names(seed) for seed in range(5))


def test_openai_s_client_draws_what_generate_draws(server: Server, folder: Path, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    drawn = client.images.generate(
        model=client.models.list().data[0].id,
        prompt=PROMPT,
        n=2,
        size="16x16",
        extra_body={"seed": 7, "steps": 3, "guidance": 2.0, "negative_prompt": "A cat."},
    )
    wanted = generated(folder, tmp_path, "-n", 2, "--seed", 7, "--steps", 3, "--guidance", 2, "--negative", "A cat.")
    assert len(drawn.data) == len(wanted) == 2
    for image, pixels in zip(drawn.data, wanted):
        assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(image.b64_json))), pixels)
    by_url = client.images.generate(
        prompt=PROMPT,
        response_format="url",
        extra_body={"seed": 8, "steps": 3, "guidance": 2.0, "negative_prompt": "A cat."},
    )
    content = server.call("GET", by_url.data[0].url.removeprefix(server.url))[1]
    assert np.array_equal(Image.open(io.BytesIO(content)), wanted[1])
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    with pytest.raises(openai.UnprocessableEntityError, match="divisible"):
        client.images.generate(prompt=PROMPT, size="17x17")


def test_webuiapi_draws_what_generate_draws(server: Server, folder: Path, tmp_path: Path) -> None:
    client = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")
    drawn = client.txt2img(prompt=PROMPT, seed=7, steps=3, cfg_scale=2, width=16, height=16, batch_size=2)
    wanted = generated(folder, tmp_path, "-n", 2, "--seed", 7, "--steps", 3, "--guidance", 2, "--scheduler", "euler_a")
    assert all(np.array_equal(*both) for both in zip(drawn.images, wanted, strict=True))
    assert drawn.info["all_seeds"] == [7, 8]
    assert "Seed: 7" in drawn.info["infotexts"][0]
    assert client.get_progress()["progress"] == 0
    assert client.util_get_model_names() == ["tiny"]
    client.util_set_model("tiny")
    assert client.util_get_current_model() == "tiny"
    assert "Euler a" in client.util_get_sampler_names()
    assert client.interrupt() == {}
    client.util_wait_for_ready(0.1)
    named = client.txt2img(
        prompt=PROMPT, steps=1, width=16, height=16, sampler_name="DPM++ 2M Karras", scheduler="Karras"
    )
    assert "Karras" in named.info["infotexts"][0]


def test_a1111_s_side_that_is_left_out_is_the_model_s_own(server: Server) -> None:
    for sides, drawn in (({"width": 24}, (24, 16)), ({"height": 24}, (16, 24)), ({}, (16, 16))):
        status, answer = server.call("POST", "/sdapi/v1/txt2img", {"prompt": PROMPT, "steps": 1, **sides})
        info = json.loads(answer["info"])
        assert (status, info["width"], info["height"]) == (200, *drawn)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A picture to begin with, and a mask that is white on its left half."""
    folder = tmp_path_factory.mktemp("begun")
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    image.save(folder / "image.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    mask.save(folder / "mask.png")
    return folder / "image.png", folder / "mask.png"


def see_through(mask: Path) -> bytes:
    """The mask as OpenAI wants it: see-through where to redraw."""
    white = Image.open(mask)
    image = Image.new("RGBA", white.size)
    image.putalpha(white.point(lambda value: 255 - value))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_others_clients_begin_with_a_picture(
    server: Server, folder: Path, tmp_path: Path, begun: tuple[Path, Path]
) -> None:
    image, mask = begun
    settings = ("--seed", 5, "--steps", 4, "--guidance", 2)
    (plain,) = generated(folder, tmp_path / "1", *settings, "--image", image, "--strength", 0.5)
    (masked,) = generated(folder, tmp_path / "2", *settings, "--image", image, "--mask", mask, "--strength", 0.5)
    (euler,) = generated(
        folder, tmp_path / "3", *settings, "--image", image, "--mask", mask, "--strength", 0.5, "--scheduler", "euler"
    )
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    own = {"seed": 5, "steps": 4, "guidance": 2, "strength": 0.5}
    drawn = client.images.edit(image=image.open("rb"), prompt=PROMPT, extra_body=own)
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(drawn.data[0].b64_json))), plain)
    drawn = client.images.edit(
        image=image.open("rb"), mask=("mask.png", see_through(mask)), prompt=PROMPT, extra_body=own
    )
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(drawn.data[0].b64_json))), masked)

    client = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", sampler="Euler")
    both = {"seed": 5, "steps": 4, "cfg_scale": 2, "denoising_strength": 0.5, "width": 16, "height": 16}
    white = Image.open(mask)
    for kept, invert in ((white, 0), (white.point(lambda value: 255 - value), 1)):
        given = {"mask_image": kept, "inpainting_mask_invert": invert}
        assert np.array_equal(client.img2img(images=[Image.open(image)], prompt=PROMPT, **both, **given).image, euler)

    body = {"prompt": PROMPT, **own, "image": base64.b64encode(image.read_bytes()).decode()}
    first = server.ended(server.call("POST", "/v1/jobs", body)[1]["id"])
    again = server.ended(server.call("POST", "/v1/jobs", first["settings"])[1]["id"])
    for job in (first, again):
        shown = Image.open(io.BytesIO(server.call("GET", job["images"][0]["url"])[1]))
        assert np.array_equal(shown, plain)
    assert first["steps"] == 2


def test_the_best_of_several_are_those_that_generate_keeps(server: Server, folder: Path, tmp_path: Path) -> None:
    settings = ("-n", 2, "--best-of", 5, "--seed", 3, "--steps", 3, "--guidance", 2)
    wanted = {str(pixels.tolist()) for pixels in generated(folder, tmp_path / "generated", *settings)}
    own = {"n": 2, "best_of": 5, "seed": 3, "steps": 3, "guidance": 2}
    job = server.call("POST", "/v1/jobs", {"prompt": PROMPT, **own})[1]
    told = list(server.events(job["id"]))
    done = told[-1][1]
    assert (done["state"], done["step"], len(done["images"])) == ("done", 15, 2)
    assert [name for name, _ in told].count("image") == 2
    scores = [image["score"] for image in done["images"]]
    assert scores == sorted(scores, reverse=True)
    files = []
    for image in done["images"]:
        files.append(tmp_path / f"{image['id']}.png")
        files[-1].write_bytes(server.call("GET", image["url"])[1])
    assert {str(np.asarray(Image.open(file)).tolist()) for file in files} == wanted
    records = [provenance.read(file) for file in files]
    assert [(record["best_of"], record["score"]) for record in records] == [(5, score) for score in scores]
    assert [record["seed"] for record in records] == [image["seed"] for image in done["images"]]
    there = list((server.data / "pictures").glob(f"*/{job['id']}/*.png"))
    assert len(there) == 2, "those that were not kept leave no file"
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    drawn = client.images.generate(prompt=PROMPT, extra_body=own, n=2)
    assert [image.seed for image in drawn.data] == [image["seed"] for image in done["images"]]
    status, answer = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "n": 3, "best_of": 2})
    assert (status, "best_of" in answer["error"]["message"]) == (422, True)


def test_a_lora_of_the_list_is_drawn_with(server: Server, folder: Path, lora: Path, tmp_path: Path) -> None:
    settings = ("--seed", 3, "--steps", 3, "--guidance", 2)
    (plain,) = generated(folder, tmp_path / "1", *settings)
    (light,) = generated(folder, tmp_path / "2", *settings, "--lora", f"{lora}:0.5")
    (euler,) = generated(folder, tmp_path / "3", *settings, "--lora", f"{lora}:0.5", "--scheduler", "euler_a")
    assert not np.array_equal(plain, light)
    own = {"seed": 3, "steps": 3, "guidance": 2}
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].loras == ["wild"]
    for loras, wanted in ((["wild:0.5"], light), ([], plain)):
        drawn = client.images.generate(prompt=PROMPT, extra_body={**own, "loras": loras})
        assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(drawn.data[0].b64_json))), wanted)
    begun = io.BytesIO()
    Image.fromarray(plain).save(begun, "PNG")
    edits = [
        client.images.edit(image=image, prompt=PROMPT, extra_body={**own, "strength": 0.7, "loras": loras})
        .data[0]
        .b64_json
        for image, loras in ((begun.getvalue(), []), (begun.getvalue(), ["wild"]), ([begun.getvalue()], ["wild"]))
    ]
    assert edits[0] != edits[1] == edits[2]
    with pytest.raises(openai.UnprocessableEntityError, match="LoRA"):
        client.images.edit(image=begun.getvalue(), prompt=PROMPT, extra_body={"loras": ["tame"]})
    web = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")
    assert [lora["name"] for lora in web.get_loras()] == ["wild"]
    drawn = web.txt2img(prompt=f"{PROMPT} <lora:wild:0.5>", seed=3, steps=3, cfg_scale=2, width=16, height=16)
    assert np.array_equal(drawn.image, euler)
    for name in ("tame", str(lora), "wild:heavy", "wild:11", "wild:nan"):
        status, answer = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "loras": [name]})
        assert status == 422, name
        assert "LoRA" in answer["error"]["message"]


def test_a_lora_that_is_not_for_the_model_fails_its_jobs_only(queue: Queue, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "strange.safetensors"
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(2, 2), "unet.nowhere.lora_B.weight": torch.zeros(2, 2)}, file)
    with queue.serving(tmp_path / "served", folder, "--lora", file) as server:
        status, answer = server.call("POST", "/v1/images/generations", {"prompt": PROMPT, "loras": ["strange"]})
        assert (status, "not for this model" in answer["error"]["message"]) == (422, True)
        assert server.call("POST", "/v1/images/generations", {"prompt": PROMPT, "steps": 1})[0] == 200


def test_the_report_of_a_model_is_shown_and_does_nothing_else(server: Server) -> None:
    (model,) = server.call("GET", "/v1/models")[1]["data"]
    with urllib.request.urlopen(server.url + model["report"]) as answer:
        assert b"It draws like a tiny model." in answer.read()
        assert answer.headers["content-type"].startswith("text/html")
        assert "sandbox" in answer.headers["content-security-policy"]
    assert server.call("GET", "/v1/reports/other")[0] == 404
    assert server.call("GET", "/v1/reports/..%2Freport.html")[0] == 404


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_bad_uploads_are_refused_in_a_sentence(server: Server, begun: tuple[Path, Path]) -> None:
    good = begun[0].read_bytes()
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    frames = io.BytesIO()
    Image.new("L", (16, 16)).save(frames, "GIF", save_all=True, append_images=[Image.new("L", (16, 16), 255)])
    wide = io.BytesIO()  # small enough for Pillow, which only warns of it, and too large for here
    Image.new("1", (13_000, 13_000)).save(wide, "PNG", transparency=0)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as inner:
        inner.writestr("run.class", b"program")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for name, data in {
        "nothing": b"",
        "text": b"a picture",
        "cut off": good[: len(good) // 2],
        "see-through and cut off": see_through(begun[1])[:60],
        "bomb": bomb.getvalue(),
        "wide": wide.getvalue(),
        "huge": good[:16] + (2**31 - 1).to_bytes(4, "big") * 2 + good[24:],
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "frames": frames.getvalue(),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "a page too": good + b"<script>alert(1)</script>",
        "an archive too": good + archive.getvalue(),
        "a document too": good[:33] + chunk(b"tEXt", b"a\0%PDF-1.4") + good[33:],
    }.items():
        for field in ("image", "mask"):
            sent = {"image": base64.b64encode(good).decode(), field: base64.b64encode(data).decode()}
            status, answer = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 2, **sent})
            assert status == 422, (name, field, answer)
            assert answer["error"]["message"].endswith("."), name
            files = {"image": ("a.png", good), field: ("b.png", data)}
            with pytest.raises(openai.UnprocessableEntityError):
                client.images.edit(prompt=PROMPT, **files)
        body = {"prompt": PROMPT, "init_images": [base64.b64encode(data).decode()]}
        assert server.call("POST", "/sdapi/v1/img2img", body)[0] == 422, name
    for text in ("0" * 64, "!!!", "../../etc/passwd", "file:///etc/passwd"):
        assert server.call("POST", "/v1/jobs", {"prompt": PROMPT, "image": text})[0] == 422
    padded = good + bytes(100)  # as some cameras leave behind a picture
    sent = {"prompt": PROMPT, "steps": 2, "image": base64.b64encode(padded).decode()}
    assert server.ended(server.call("POST", "/v1/jobs", sent)[1]["id"])["state"] == "done"


def test_cancel_within_a_step_and_the_next_goes_on(server: Server) -> None:
    long = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 150, "n": 16})[1]["id"]
    waiting = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 150, "n": 16})[1]["id"]  # or drawn by another
    last = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 1})[1]["id"]
    for name, data in server.events(long):
        if name == "step" and data["step"] > 3:
            break
    assert server.call("DELETE", f"/v1/jobs/{waiting}")[1]["state"] == "cancelled"
    at = server.call("DELETE", f"/v1/jobs/{long}")[1]
    assert at["state"] == "cancelled"
    before = server.steps()
    assert server.ended(last)["state"] == "done"
    allowed = 4 if type(server) is Server else 1000  # another server hears of it within a second
    assert server.steps() <= before + allowed, "of 2,400, with that of the last job"
    assert server.call("DELETE", f"/v1/jobs/{last}")[1]["state"] == "done", "what has ended stays"
    assert server.call("GET", f"/v1/jobs/{long}")[1] == at


def test_what_is_refused(server: Server) -> None:
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"prompt": ""}, 422, "empty"),
        ({"prompt": "a\0b"}, 422, "null"),
        ({"prompt": "x" * 5000}, 422, "characters"),
        ({"prompt": PROMPT, "n": 17}, 422, "up to 16"),
        ({"prompt": PROMPT, "steps": 151}, 422, "up to 150"),
        ({"prompt": PROMPT, "size": "2048x2048"}, 422, "pixels"),
        ({"prompt": PROMPT, "size": "17"}, 422, "divisible"),
        ({"prompt": PROMPT, "model": "/etc"}, 404, "no model"),
        ({"prompt": PROMPT, "model": "../tiny"}, 404, "no model"),
        ({"prompt": PROMPT, "seed": -1}, 422, "seed"),
        ({"prompt": PROMPT, "wings": 2}, 422, "wings"),
        ({"prompt": PROMPT, "n": 10**4000}, 422, "n: "),
        ({"prompt": PROMPT, "size": "64" + " " * 100_000}, 422, "size"),
        ({"prompt": PROMPT, "scheduler": "e" * 100_000}, 422, "scheduler"),
        ({"prompt": PROMPT, "variation": "8:0.2" + "0" * 100_000}, 422, "variation"),
    ]
    for body, wanted, words in cases:
        status, answer = server.call("POST", "/v1/jobs", body)
        assert status == wanted, (str(body)[:80], answer)
        assert words in answer["error"]["message"]
    others: list[tuple[dict[str, Any], str]] = [
        ({"prompt": f"{PROMPT} <lora:wild>" + "<lora:wild>" * 9}, "loras"),
        ({"prompt": PROMPT, "batch_size": 10**3000, "n_iter": 10**3000}, "batch_size"),
        ({"prompt": PROMPT, "batch_size": 1000, "n_iter": 100}, "up to 16"),
        ({"prompt": " " * 400_000}, "characters"),
        ({"prompt": "<lora:" + "a" * 400_000}, "characters"),
        ({"prompt": PROMPT, "sampler_name": "e" * 60, "scheduler": "Karras"}, "scheduler"),
    ]
    for body, words in others:
        status, answer = server.call("POST", "/sdapi/v1/txt2img", body)
        assert (status, words in answer["error"]["message"]) == (422, True), (str(body)[:80], answer)
    for path in (f"/v1/jobs/{NOWHERE}", f"/v1/images/{NOWHERE}", "/v1/images/..%2Fjobs.sqlite", "/v1/jobs/%00", "/x"):
        assert server.call("GET", path)[0] == 404, path


def test_a_body_that_is_too_large_is_not_read(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    lines = ("POST /v1/jobs HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 99999999")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall("\r\n".join([*lines, "", "{"]).encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 413
        assert "larger than" in json.loads(answer.read())["error"]["message"]


def test_pages_of_other_sites_are_refused(server: Server) -> None:
    """Neither by their Origin, nor by a name of theirs that leads to this machine."""
    host, port = server.url.removeprefix("http://").split(":")
    for headers, status in (
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "null"}, 403),
        ({"Authorization": "Basic \u00e9"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Origin": server.url}, 200),
        ({"Host": f"localhost:{port}"}, 200),
    ):
        connection = http.client.HTTPConnection(host, int(port))
        connection.request("GET", "/v1/jobs", headers=headers)
        answer = connection.getresponse()
        assert answer.status == status, headers
        assert answer.getheader("access-control-allow-origin") is None
        connection.close()


def test_clients_that_leave_in_the_middle_lose_nothing(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")

    def newest() -> Any:
        return server.call("GET", "/v1/jobs?limit=1")[1]["jobs"][0]

    def leave(method: str, path: str, body: dict[str, Any] | None = None) -> None:
        """Ask, wait until the stream or the job has begun, and hang up without a word."""
        content = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall("\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content)
            if body is None:
                assert b" 200 " in connection.recv(100)
            while body is not None and newest()["settings"]["prompt"] != body["prompt"]:
                time.sleep(0.02)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # with a reset

    job = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 50, "n": 2})[1]["id"]
    for _ in range(20):
        leave("GET", f"/v1/jobs/{job}/events")
    leave("POST", "/v1/images/generations", {"prompt": "A cat that nobody waits for.", "steps": 20})
    assert server.ended(job)["state"] == "done"
    assert server.ended(newest()["id"])["state"] == "done"
    assert not [line for line in server.lines() if line["level"] == "error"]


def test_old_jobs_make_room_for_new_ones(queue: Queue, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "served"
    body = {"prompt": PROMPT, "steps": 1}
    with queue.serving(data, folder) as server:
        old = [server.ended(server.call("POST", "/v1/jobs", body)[1]["id"]) for _ in range(2)]
        queue.change(data, "UPDATE jobs SET finished = finished - 3600")
        new = server.ended(server.call("POST", "/v1/jobs", body)[1]["id"])
    with queue.serving(data, folder, sets=("disk=1e-6",)) as server:
        until = time.monotonic() + 60
        while len(server.call("GET", "/v1/jobs")[1]["jobs"]) > 1:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert server.call("GET", new["images"][0]["url"])[0] == 200
        for job in old:
            assert server.call("GET", f"/v1/jobs/{job['id']}")[0] == 404
            assert server.call("GET", job["images"][0]["url"])[0] == 404
    assert [folder.name for folder in data.glob("pictures/*/*")] == [new["id"]]


def test_metrics_count(server: Server) -> None:
    server.ended(server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 1})[1]["id"])
    for _ in range(2):
        assert server.call("BREW", "/v1/jobs")[0] == 405
    texts = [server.call("GET", "/metrics")[1].decode() for _ in range(2)]  # of either server, where there are two
    assert any('limner_jobs_ended_total{state="done"}' in text for text in texts)
    assert all('route="/v1/jobs/{id}"' in text for text in texts)
    assert all('method="other"' in text and "BREW" not in text for text in texts)


def test_tokens_and_their_limits(queue: Queue, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "served"
    where = ["--data", data, *(word for one in queue.sets(data) for word in ("--set", one))]
    assert limner("serve", folder, "--host", "0.0.0.0", "--port", 0, *where) == 2
    assert "limner token add" in capfd.readouterr().err
    tokens = []
    for name in ("anna", "ben"):
        assert limner("token", "add", name, *where) == 0
        tokens.append(capfd.readouterr().out.strip())
        assert tokens[-1] not in str(queue.rows(data, "SELECT * FROM tokens"))
    assert limner("token", "add", "anna", *where) == 2
    anna, ben = tokens
    with queue.serving(data, folder, sets=("rate=4", "open_jobs=2"), host="0.0.0.0") as server:
        assert server.call("GET", "/v1/jobs")[0] == 401
        assert server.call("GET", "/v1/jobs", token=anna + "x")[0] == 401
        assert server.call("GET", "/metrics")[0] == 401
        assert server.call("GET", "/openapi.json")[0] == 401
        assert server.call("GET", "/healthz")[0] == 200
        long = {"prompt": PROMPT, "steps": 150, "n": 16}
        first, second = (server.call("POST", "/v1/jobs", long, anna) for _ in range(2))
        status, answer = server.call("POST", "/v1/jobs", long, anna)
        assert status == 429
        assert "are open" in answer["error"]["message"]
        assert server.call("GET", f"/v1/jobs/{first[1]['id']}", token=ben)[0] == 404, "it is Anna's"
        assert server.call("DELETE", f"/v1/jobs/{first[1]['id']}", token=ben)[0] == 404
        assert server.call("GET", "/v1/jobs", token=ben)[1] == {"jobs": []}
        for job in (first, second):
            assert server.call("DELETE", f"/v1/jobs/{job[1]['id']}", token=anna)[0] == 200
        for _ in range(2):
            id_ = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 1}, anna)[1]["id"]
            server.call("DELETE", f"/v1/jobs/{id_}", token=anna)
        status, answer = server.call("POST", "/v1/jobs", long, anna)
        assert (status, "within a minute" in answer["error"]["message"]) == (429, True)
        head = {"Content-Type": "application/json", "Authorization": f"Bearer {anna}"}
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/jobs", json.dumps(long).encode(), head))
        assert 0 < int(refused.value.headers["Retry-After"]) <= 60
        client = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1", username="anyone", password=ben)
        assert client.txt2img(prompt=PROMPT, steps=1, cfg_scale=1, width=16, height=16).image.size == (16, 16)
        assert limner("serve", "token", "remove", "ben", *where) == 0
        assert server.call("GET", "/v1/jobs", token=ben)[0] == 401, "at once"
    log = str(server.lines())
    assert anna not in log
    assert ben not in log


def test_two_models_draw_each_their_own(queue: Queue, folder: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", "euler")
    settings = ("--seed", 3, "--steps", 3, "--guidance", 2)
    wanted = [generated(one, tmp_path / one.name / "drawn", *settings)[0] for one in (folder, other)]
    assert not np.array_equal(*wanted)
    with queue.serving(tmp_path / "served", folder, other, sets=("memory=1e-9",)) as server:
        assert [model["id"] for model in server.call("GET", "/v1/models")[1]["data"]] == ["tiny", "other"]
        for name, pixels in (("tiny", wanted[0]), ("other", wanted[1]), ("tiny", wanted[0])):
            body = {"prompt": PROMPT, "seed": 3, "steps": 3, "guidance": 2, "model": name}
            drawn = server.call("POST", "/v1/images/generations", body)[1]["data"][0]["b64_json"]
            assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(drawn))), pixels), name


def test_without_disk_or_database_it_says_so(
    queue: Queue, folder: Path, tmp_path: Path, begun: tuple[Path, Path]
) -> None:
    data = tmp_path / "served"
    with queue.serving(data, folder) as server:
        data.mkdir(exist_ok=True)
        (data / "uploads").write_bytes(b"")  # no folder can be made there
        body = {"prompt": "A secret.", "image": base64.b64encode(begun[0].read_bytes()).decode()}
        status, answer = server.call("POST", "/v1/jobs", body)
        assert (status, "disk" in answer["error"]["message"]) == (503, True)
        queue.change(data, "ALTER TABLE jobs RENAME TO gone")
        queue.change(data, "ALTER TABLE tokens RENAME TO lost")
        for method, path, token in (("POST", "/v1/jobs", None), ("GET", "/v1/models", "anything")):
            status, answer = server.call(method, path, {"prompt": "A secret."}, token)
            assert (status, "database" in answer["error"]["message"]) == (503, True)
    assert "A secret." not in str(server.lines())


def test_told_to_end_it_finishes_and_hands_the_rest_back(queue: Queue, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "served"
    with queue.serving(data, folder) as server:
        jobs = [server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 60})[1]["id"] for _ in range(8)]
        assert server.kill(signal.SIGTERM) in (0, -signal.SIGTERM)
    with queue.serving(data, folder) as server:
        assert {server.ended(job)["state"] for job in jobs} == {"done"}
    attempts = [line["attempt"] for line in server.lines() if line["event"] == "job started"]
    assert len(attempts) == len(jobs), "none was begun twice"


def test_a_drain_that_takes_too_long_hands_the_job_back(queue: Queue, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "served"
    with queue.serving(data, folder, sets=("drain=0",)) as server:
        job = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 150, "n": 16})[1]["id"]
        next(server.events(job))
        server.kill(signal.SIGTERM)
    assert any(line.get("given_back") == 1 for line in server.lines())


def test_told_twice_it_hands_the_job_back_at_once(queue: Queue, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "served"
    with queue.serving(data, folder, sets=("drain=50",)) as server:
        job = server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 150, "n": 16})[1]["id"]
        next(server.events(job))
        started = time.monotonic()
        for pid in {server.process.pid, getattr(server, "other", server).process.pid}:
            os.kill(pid, signal.SIGINT)
        time.sleep(1)
        server.kill(signal.SIGINT)
        assert time.monotonic() - started < 25
    assert any(line.get("given_back") == 1 for line in server.lines())


def test_a_damaged_database_is_moved_aside(queue: Queue, folder: Path, tmp_path: Path) -> None:
    if queue.postgres:
        pytest.skip("PostgreSQL looks after its own files")
    data = tmp_path / "served"
    with queue.serving(data, folder) as server:
        server.ended(server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 1})[1]["id"])
        server.kill(signal.SIGTERM)
    file = data / "jobs.sqlite"
    file.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 64)
    damaged = sha256(file)
    script = "from limner.cli import main; main()"
    listed = [sys.executable, "-c", script, "token", "list", "--data", str(data)]
    assert "damaged and moved to" in subprocess.run(listed, check=True, capture_output=True, text=True).stderr
    (aside,) = data.glob("jobs.sqlite.damaged-*[0-9]")
    aside.rename(file)
    with queue.serving(data, folder) as server:
        assert server.call("GET", "/v1/jobs")[1] == {"jobs": []}
        server.ended(server.call("POST", "/v1/jobs", {"prompt": PROMPT, "steps": 1})[1]["id"])
    (aside,) = data.glob("jobs.sqlite.damaged-*[0-9]")
    assert sha256(aside) == damaged
    assert any(f"damaged and moved to {aside}" in line["event"] for line in server.lines())


def test_bad_starts_are_one_sentence(
    folder: Path, lora: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, words in (
            ((folder, "--port", port), "in use"),
            ((folder, "--host", "no.such.host.invalid"), "Can't listen"),
            ((tmp_path / "missing",), "no model folder"),
            ((folder, folder), "Two models"),
            ((folder, "--lora", lora, "--lora", lora), "Two LoRAs"),
            ((folder, "--lora", tmp_path / "missing"), "no LoRA"),
            ((folder, "--set", 'reports={"other": "x"}'), "no model of this server"),
            ((folder, "--set", 'reports={"tiny": "x"}'), "no report x"),
            ((folder, "--device", "abacus"), "no device"),
            ((folder, "--set", "database=mysql://x"), "postgresql://"),
            ((folder, "--set", "database=postgresql://nobody@127.0.0.1:1/x"), "can't be used"),
        ):
            assert limner("serve", "--port", 0, "--data", tmp_path / "served", *arguments) == 2, arguments
            said = capfd.readouterr().err
            assert words in said, said
            assert said.count("\n") == 1, said


def test_a_plan_fetches_nothing_and_looks_at_all_that_is_here(
    folder: Path, lora: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    planned = ("serve", folder, "nobody/nothing", "--dry-run")
    assert limner(*planned, "--lora", f"{lora}:0.7", "--set", 'reports={"nobody/nothing": "x"}') == 0
    told = capfd.readouterr().out
    assert "model tiny " in told
    assert "to be fetched" in told
    assert "wild at 0.7" in told
    for arguments, words in (
        (("--lora", tmp_path / "missing"), "no LoRA"),
        (("--set", 'reports={"other": "x"}'), "no model of this server"),
        (("--set", 'reports={"tiny": "x"}'), "no report x"),
    ):
        assert limner(*planned, *arguments) == 2
        assert words in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_rights_is_one_sentence(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for part in (folder, *folder.rglob("*")):
        part.chmod(part.stat().st_mode | (stat.S_IROTH | (stat.S_IXOTH if part.is_dir() else 0)))
    with no_special_rights() as place:
        place.chmod(0o500)
        assert limner("serve", "builtin", "--port", 0, "--data", place / "served") == 2
        assert limner("serve", "builtin", "--port", 0, "--data", place) == 2
        place.chmod(0o700)
        Store(place).close()  # of a server that once might write here
        (place / "jobs.sqlite").chmod(0o400)
        place.chmod(0o500)
        assert limner("serve", "builtin", "--port", 0, "--data", place) == 2
    assert capfd.readouterr().err.count("\n") == 3
