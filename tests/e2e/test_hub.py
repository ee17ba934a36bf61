"""Models from a Hugging Face hub: fetched once, drawn from the cache ever after, refused in a sentence.

The hub is a small HTTP server on this machine that speaks as much of the protocol as huggingface_hub needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from limner.artifacts import read_json
from limner.config import PrepareConfig
from limner.generation import provenance
from limner.models import loading
from limner.settings import resolve
from limner.stages import prepare
from tiny import CAPTIONS, tiny_clip, tiny_model, tiny_siglip, tiny_siglip_tokenizer, tiny_tokenizer
from trainings import TRAINING, shapes

TOKEN = "hf_secretsecretsecretsecret"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LIMNER = [sys.executable, "-c", "from limner.cli import main; main()"]


@dataclass
class Hub:
    """A hub that serves the folders `root/owner/name`; those in `gated` only to nobody."""

    root: Path
    gated: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Authorization of each request."""
    url: str = ""
    breaks_off: set[str] = field(default_factory=set)
    """Files of which half is sent before the connection is closed."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer a GET or a HEAD."""
        self.requests.append((request.command, request.path, request.headers.get("Authorization", "")))
        path = request.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._describe(request, *match.groups())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._list(request, *match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(request, *match.groups())
        else:
            self._refuse(request, 404, "EntryNotFound")

    def _describe(self, request: BaseHTTPRequestHandler, repo: str, revision: str | None) -> None:
        if self._is_open(request, repo, revision or "main"):
            files = [{"rfilename": name} for name in self._files(repo)]
            body = json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode()
            self._send(request, body, {"Content-Type": "application/json"})

    def _list(self, request: BaseHTTPRequestHandler, repo: str, revision: str) -> None:
        if self._is_open(request, repo, revision):
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self._files(repo).items()
            ]
            self._send(request, json.dumps(files).encode(), {"Content-Type": "application/json"})

    def _files(self, repo: str) -> dict[str, bytes]:
        files = sorted(p for p in (self.root / repo).rglob("*") if p.is_file())
        return {p.relative_to(self.root / repo).as_posix(): p.read_bytes() for p in files}

    def _send_file(self, request: BaseHTTPRequestHandler, repo: str, revision: str, name: str) -> None:
        if self._is_open(request, repo, revision):
            file = self.root / repo / name
            if file.is_file():
                content = file.read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
                self._send(request, content, headers, whole=f"{repo}/{name}" not in self.breaks_off)
            else:
                self._refuse(request, 404, "EntryNotFound")

    def _is_open(self, request: BaseHTTPRequestHandler, repo: str, revision: str) -> bool:
        if not (self.root / repo).is_dir():
            self._refuse(request, 401, "RepoNotFound")  # the real hub does not tell whether there is a secret one
        elif repo in self.gated:
            self._refuse(request, 403, "GatedRepo")
        elif revision not in ("main", COMMIT):
            self._refuse(request, 404, "RevisionNotFound")
        else:
            return True
        return False

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        # What a careless proxy might do: repeat the request, token and all.
        request.send_header("X-Error-Message", f"refused {request.headers.get('Authorization', '')}")
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _send(
        self, request: BaseHTTPRequestHandler, body: bytes, headers: dict[str, str], *, whole: bool = True
    ) -> None:
        request.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body if whole else body[: len(body) // 2])
            request.close_connection = not whole


def serve(hub: Hub) -> tuple[ThreadingHTTPServer, Thread]:
    """Start the server on a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    return server, thread


def pickled(model: Path) -> None:
    """Take away the U-Net's safetensors and put a pickle there."""
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(model / "unet" / "diffusion_pytorch_model.bin")


def with_code(model: Path) -> None:
    """Let the model's index name a pipeline of its own."""
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Pipeline"]}))
    (model / "pipeline.py").write_text("raise SystemExit('code was run')")


def with_more_than_is_needed(model: Path) -> None:
    """Add what hubs hold beside the parts."""
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, model / "whole-model.safetensors")
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (model / "safety_checker").mkdir()
    (model / "safety_checker" / "model.safetensors").write_bytes(b"large")
    (model / "README.md").write_text("# Tiny")


def clips(owner: Path) -> None:
    """Put a CLIP into `owner/clip` and a SigLIP into `owner/siglip`, and beside them what hubs hold."""
    tiny_clip().save_pretrained(owner / "clip")
    tiny_tokenizer(owner / "clip")
    tiny_siglip().save_pretrained(owner / "siglip")
    tiny_siglip_tokenizer(owner / "siglip")
    for folder in (owner / "clip", owner / "siglip"):
        (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3]}')
        (folder / "onnx").mkdir()
        for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md", "onnx/model.onnx"):
            (folder / name).write_bytes(b"large")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with one good model, two CLIPs, and several that are refused."""
    root = tmp_path_factory.mktemp("hub")
    made: dict[str, Callable[[Path], None]] = {
        "owner/tiny": with_more_than_is_needed,
        "owner/gated": lambda _: None,
        "owner/pickled": pickled,
        "owner/code": with_code,
    }
    tiny_model(root / "owner" / "original", "dpm-flow")
    for name, change in made.items():
        shutil.copytree(root / "owner" / "original", root / name)
        change(root / name)
    clips(root / "owner")
    hub = Hub(root, gated={"owner/gated"})
    server, thread = serve(hub)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass(frozen=True)
class User:
    """Somebody with a home and a hub."""

    home: Path
    hub: str

    def limner(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `limner` with these arguments."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        settings = {"HF_ENDPOINT": self.hub, "HF_HOME": str(self.home / "hf"), "OMP_NUM_THREADS": "1", **environment}
        done = subprocess.run(
            [*LIMNER, *map(str, arguments)],
            env={**inherited, **settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert TOKEN not in done.stdout + done.stderr
        return done

    def generate(self, model: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `limner generate` for a model."""
        out = self.home / "pictures"
        return self.limner("generate", "A dog.", "--steps", 2, "--model", model, "--out", out, **environment)

    def draws(self, model: str, **environment: str) -> dict[str, object]:
        """The record of the picture that the model draws."""
        done = self.generate(model, **environment)
        assert done.returncode == 0, done.stderr
        assert [line.split()[0] for line in done.stderr.splitlines()] == ["Drawing"]
        return provenance.read(Path(done.stdout.strip()))

    def is_refused(self, model: str, **environment: str) -> str:
        """The sentence that a model is refused with."""
        done = self.generate(model, **environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert not (self.home / "pictures").exists()
        return done.stderr.strip().removeprefix("limner: ")


def snapshot_of(user: User, name: str) -> Path:
    """Where the user's cache has the model `owner/name`."""
    return user.home / "hf" / "hub" / f"models--owner--{name}" / "snapshots" / COMMIT


def cached_files(user: User, name: str) -> set[str]:
    """The files of `owner/name` in the user's cache."""
    snapshot = snapshot_of(user, name)
    return {p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def before(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[User, dict[str, object]]:
    """Somebody who drew with `owner/tiny` once, and the record of that picture."""
    user = User(tmp_path_factory.mktemp("user"), hub.url)
    return user, user.draws("owner/tiny", HF_TOKEN=TOKEN)


@pytest.fixture
def user(before: tuple[User, dict[str, object]], tmp_path: Path) -> User:
    """The same user, in an empty folder, with a copy of that cache."""
    shutil.copytree(before[0].home / "hf", tmp_path / "hf", symlinks=True)
    return User(tmp_path, before[0].hub)


def test_what_is_needed_is_fetched_and_no_more(before: tuple[User, dict[str, object]], hub: Hub) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    assert cached_files(before[0], "tiny") == {
        "model_index.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        f"unet/{weights}",
        "vae/config.json",
        f"vae/{weights}",
        "scheduler/scheduler_config.json",
    }
    assert before[1]["model"]["ref"] == "owner/tiny"  # type: ignore[index]


def test_the_token_goes_to_the_hub(before: tuple[User, dict[str, object]], hub: Hub) -> None:
    assert any(path.startswith("/owner/tiny/resolve") for _, path, _ in hub.requests)
    asked = [authorization for _, path, authorization in hub.requests if "owner/tiny" in path]
    assert f"Bearer {TOKEN}" in asked


def test_offline_the_cache_draws_the_same(before: tuple[User, dict[str, object]], user: User, hub: Hub) -> None:
    asked = len(hub.requests)
    assert user.draws("owner/tiny", HF_HUB_OFFLINE="1") == before[1]
    assert len(hub.requests) == asked


def test_what_a_picture_names_is_not_fetched(user: User, hub: Hub, tmp_path: Path) -> None:
    user.draws("owner/tiny")
    [picture] = (tmp_path / "pictures").iterdir()
    asked = len(hub.requests)
    again = user.limner("replay", picture)
    assert (again.returncode, again.stdout) == (0, "identical\n"), again.stderr
    stranger = User(tmp_path / "stranger", hub.url)
    for flags in ([], ["--dry-run"]):
        refused = stranger.limner("replay", picture, *flags)
        assert refused.returncode == 2
        assert "drawn with owner/tiny, which is not here; fetch it with --model owner/tiny" in refused.stderr
    planned = stranger.limner("replay", picture, "--model", "owner/tiny", "--dry-run")
    assert "owner/tiny, to be fetched" in planned.stdout
    assert len(hub.requests) == asked
    fetched = stranger.limner("replay", picture, "--model", "owner/tiny")
    assert (fetched.returncode, fetched.stdout) == (0, "identical\n"), fetched.stderr


def test_without_the_hub_the_cache_draws_the_same(before: tuple[User, dict[str, object]], user: User) -> None:
    gone = User(user.home, "http://127.0.0.1:9")  # nobody listens there
    assert gone.draws("owner/tiny") == before[1]


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("owner/unknown", "has none of that name"),
        ("owner/gated", "only to those allowed; accept its terms there and set HF_TOKEN"),
        ("owner/pickled", "only as a pickle"),
        ("owner/code", "Python code of its own"),
        ("owner/tiny@v9", "has no revision v9"),
    ],
)
def test_what_cannot_be_had_is_refused_and_the_cache_named(user: User, model: str, complaint: str) -> None:
    sentence = user.is_refused(model, HF_TOKEN=TOKEN)
    assert complaint in sentence
    assert "the local cache holds owner/tiny)" in sentence
    weights = (user.home / "hf" / "hub").glob(f"models--{model.replace('/', '--')}/snapshots/*/*/*.safetensors")
    assert not list(weights), "nothing large is fetched of a model that is refused"


def test_offline_what_is_not_cached_is_refused(user: User) -> None:
    sentence = user.is_refused("owner/unknown", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set and it is not whole in the local cache (the local cache holds owner/tiny)" in sentence


def test_an_empty_cache_is_said(hub: Hub, tmp_path: Path) -> None:
    assert "the local cache holds no model" in User(tmp_path, hub.url).is_refused("owner/unknown")


def test_without_the_hub_what_is_not_cached_is_refused(user: User) -> None:
    sentence = User(user.home, "http://127.0.0.1:9").is_refused("owner/unknown")
    assert "can't be reached" in sentence
    assert "the local cache holds owner/tiny" in sentence


def test_a_model_is_pulled_listed_and_shown_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    user = User(tmp_path, hub.url)
    missing = user.limner("models", "show", "owner/tiny")
    assert missing.returncode == 2
    assert "limner models pull owner/tiny" in missing.stderr
    for _ in range(2):  # the second finds all there
        pulled = user.limner("models", "pull", "owner/tiny", HF_TOKEN=TOKEN)
        assert (pulled.returncode, pulled.stderr) == (0, "")
        assert Path(pulled.stdout.strip()) == snapshot_of(user, "tiny")
    assert "README.md" in cached_files(user, "tiny"), "which has the licence"
    assert not any(name.endswith(".bin") for name in cached_files(user, "tiny"))
    listed = user.limner("models", "list", tmp_path / "hf", "--json", HF_HUB_OFFLINE="1")
    rows = {row["model"]: row for row in json.loads(listed.stdout)}
    assert rows["owner/tiny"]["class"] == "StableDiffusionPipeline"
    shown = user.limner("models", "show", "owner/tiny", "--json", HF_HUB_OFFLINE="1")
    assert json.loads(shown.stdout)["size"] == "16x16"
    refused = user.limner("models", "pull", "owner/pickled")
    assert refused.returncode == 2
    assert "only as a pickle" in refused.stderr


def test_a_pull_that_broke_off_says_so_and_goes_on(hub: Hub, tmp_path: Path) -> None:
    user, weights = User(tmp_path, hub.url), "unet/diffusion_pytorch_model.safetensors"
    hub.breaks_off.add(f"owner/tiny/{weights}")
    broken = user.limner("models", "pull", "owner/tiny")
    hub.breaks_off.clear()
    assert (broken.returncode, broken.stdout, broken.stderr.count("\n")) == (2, "", 1)
    assert "it is not whole in the local cache (the local cache holds no model)" in broken.stderr
    assert weights not in cached_files(user, "tiny")
    assert user.limner("models", "pull", "owner/tiny").returncode == 0
    assert weights in cached_files(user, "tiny")


# ---- a CLIP of its own

TOKENIZERS = {"clip": {"tokenizer.json"}, "siglip": {"spiece.model"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of a few captioned shapes."""
    folder = tmp_path_factory.mktemp("data")
    values = {"kind": "imagefolder", "source": shapes(folder / "source", 24), "out": folder / "data", "workers": 1}
    return prepare.run(resolve(PrepareConfig, values | {"val_share": 0.25}))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_clip_of_the_hub_is_trained_and_read_from_the_cache_ever_after(
    hub: Hub, data: Path, tmp_path: Path, name: str
) -> None:
    user = User(tmp_path, hub.url)
    (tmp_path / "smallest.json").write_text(json.dumps(TRAINING | {"images": 8}))
    asked = ("--model", f"owner/{name}", "--data", data, "--config", tmp_path / "smallest.json")
    done = user.limner("train", "clip", *asked, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert cached_files(user, name) == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer_config.json",
        *TOKENIZERS[name],
    }
    original = hub.root / "owner" / name
    assert read_json(tmp_path / "run" / "manifest.json")["parents"]["model"] == loading.identity(str(original), "clip")
    before, after = loading.load_clip(str(original)), loading.load_clip(str(tmp_path / "run"))
    assert after.tokenize(CAPTIONS).equal(before.tokenize(CAPTIONS))
    assert after.normalisation == before.normalisation
    assert after.normalisation["image_mean"] == [0.5, 0.4, 0.3]

    again = user.limner("train", "clip", *asked, "--out", tmp_path / "run", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert "Nothing to do" in again.stdout
    (snapshot_of(user, name) / "model.safetensors").unlink()  # as if the fetch had broken off
    broken = user.limner("train", "clip", *asked, "--out", tmp_path / "other", HF_HUB_OFFLINE="1")
    assert broken.returncode == 2
    assert "it is not whole in the local cache (the local cache holds no model)" in broken.stderr
