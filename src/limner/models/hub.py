"""Fetching models from a Hugging Face hub: only what is needed, only safetensors, and one sentence when it fails.

Hub, cache, token and offline mode are those of huggingface_hub: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from limner.errors import ModelError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
READABLE = (".json", ".txt", ".model", ".safetensors")
NOT_LOADED = {"safety_checker", "feature_extractor"}
"""Parts of a pipeline that Limner does without."""
WEIGHTLESS = re.compile("Tokenizer|Scheduler|Processor|Extractor")
"""In the names of classes that have no weights."""
SHARD = re.compile(r"-\d{5}-of-(\d{5})")


def looks_like_hub_id(ref: str) -> bool:
    """Whether `ref` has the shape `name` or `owner/name`, either with `@revision`."""
    return HUB_ID.fullmatch(ref) is not None


@functools.cache  # one command asks for several parts of the same model
def fetch(ref: str) -> Path:
    """The folder that holds the hub model `ref`, fetched if it is not in the cache.

    Without a connection, or in offline mode, the cache alone decides. Raises ModelError: unknown, gated, pickles
    only, code in place of classes, or no connection and not cached.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    repo, _, revision = ref.partition("@")
    at = revision or None
    try:
        with _quiet():
            names = [file.rfilename for file in HfApi().model_info(repo, revision=at).siblings or ()]
            index: dict[str, Any] = {}
            if "model_index.json" in names:
                file = hf_hub_download(repo, "model_index.json", revision=at)
                index = json.loads(Path(file).read_text(encoding="utf-8"))
                refuse_code(index, ref)
            wanted = choose(names, index)
            refuse_pickles(names, wanted, index, ref)
            folder = Path(snapshot_download(repo, revision=at, allow_patterns=[_escape(name) for name in wanted]))
            if not all((folder / name).is_file() for name in wanted):
                raise ConnectionError  # the client gives what it has when the hub falls silent
            return folder
    except ModelError as error:
        raise ModelError(f"{str(error).removesuffix('.')} ({_held()}).") from None
    except Exception as error:  # whatever the HTTP client and the hub's client raise; nothing of ours runs in here
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk, not the hub
        if _status(error) not in (401, 403, 404) and (found := cached(ref)):
            return found
        _fail(ref, error)


def fetch_card(ref: str) -> None:
    """Fetch the card of a hub model too, which has its licence; one without a card or a connection has none."""
    from huggingface_hub import hf_hub_download

    repo, _, revision = ref.partition("@")
    try:
        with _quiet():
            hf_hub_download(repo, "README.md", revision=revision or None)
    except Exception as error:  # whatever the HTTP client and the hub's client raise; nothing of ours runs in here
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk, not the hub


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub client's warnings to itself, and its progress bars to terminals."""
    from huggingface_hub.utils import disable_progress_bars, logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def choose(names: Iterable[str], index: dict[str, Any]) -> list[str]:
    """The files of a hub model to fetch: those of its parts, no pickles, no code, no second copy at lower precision.

    `index` is its model_index.json; empty for the hub model of a single part, such as a CLIP.
    """
    parts = set(pipeline_parts(index)) | {"clip"}
    readable = [name for name in names if name.endswith(READABLE)]
    if index:
        readable = [n for n in readable if n.split("/")[0] in parts or ("/" not in n and n.endswith(".json"))]
    else:
        readable = [n for n in readable if "/" not in n or n.split("/")[0] in parts]
    plain = {_folder(n) for n in readable if n.endswith(".safetensors") and not variant_of(n)}
    return [n for n in readable if not variant_of(n) or _folder(n) not in plain]


def pipeline_parts(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The parts that a model_index.json names, as {folder: (library, class)}, without those that are absent."""
    listed = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and len(v) == 2}
    return {k: (v[0], v[1]) for k, v in listed.items() if v[0] and v[1] and k not in NOT_LOADED}


def refuse_pickles(names: Iterable[str], wanted: Iterable[str], index: dict[str, Any], ref: str) -> None:
    """Raise ModelError where a part of the model has its weights only as a pickle, which can run code."""
    parts = set(pipeline_parts(index)) or {""}
    safe = {_folder(name) for name in wanted if name.endswith(".safetensors")}
    for name in names:
        if name.endswith(PICKLES) and _folder(name) in parts - safe:
            raise ModelError(
                f"{ref} has the weights {name} only as a pickle, which can run code when it is read; "
                "choose a model with safetensors weights."
            )


def refuse_code(index: dict[str, Any], ref: str) -> None:
    """Raise ModelError where a model_index.json names no class, or code of the model's own in place of Diffusers'."""
    whole = index.get("_class_name")
    if whole is None:
        raise ModelError(f"The model_index.json of {ref} names no pipeline; choose another model.")
    code = [] if isinstance(whole, str) else [whole]
    code += [f"{library}.{cls}" for library, cls in pipeline_parts(index).values() if not _is_known(library)]
    if code:
        raise ModelError(
            f"{ref} brings Python code of its own ({code[0]}), which Limner does not run; "
            "choose a model of Diffusers' own classes."
        )


def _is_known(library: str) -> bool:
    """Whether a part's class comes from Transformers, Diffusers or one of Diffusers' pipelines."""
    if library in ("diffusers", "transformers"):
        return True
    spec = importlib.util.find_spec("diffusers")  # found, not imported
    places = spec.submodule_search_locations if spec else None
    return library.isidentifier() and any((Path(p) / "pipelines" / library).is_dir() for p in places or ())


def variant_of(name: str) -> str | None:
    """The variant in a weight file's name: `model.fp16.safetensors` -> `fp16`, `model.safetensors` -> None."""
    stem = PurePosixPath(name).name.removesuffix(".index.json").removesuffix(".safetensors")
    is_weight = name.endswith((".safetensors", ".safetensors.index.json"))
    found = SHARD.sub("", stem).partition(".")[2].removeprefix("safetensors").lstrip(".")
    return found or None if is_weight else None


def variant(names: Iterable[str]) -> str | None:
    """The variant to load of these weight files: None where there is a plain one, or else the first."""
    variants = {variant_of(name) for name in names if name.endswith(".safetensors")}
    return None if None in variants else min((v for v in variants if v), default=None)


def weight_files(folder: Path) -> list[Path]:
    """The files of a part that are read for its weights, which may lie there in several variants."""
    files = sorted(folder.glob("*.safetensors"))
    read = variant(file.name for file in files)
    return [file for file in files if variant_of(file.name) == read]


def _has_weights(folder: Path) -> bool:
    """Whether a part's config is there and all shards of its weights."""
    names = [file.name for file in weight_files(folder)]
    shards = [int(found[1]) for name in names if (found := SHARD.search(name))]
    return bool(names) and (folder / "config.json").is_file() and set(shards) <= {len(shards)}


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _escape(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)  # a name, not a pattern


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def cached(ref: str) -> Path | None:
    """The cached snapshot of a hub model; None where there is none or a fetch broke off between its parts."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repo, _, revision = ref.partition("@")
    for name in ("model_index.json", "config.json"):
        try:
            found = try_to_load_from_cache(repo, name, revision=revision or None)
        except HFValidationError:
            return None
        if isinstance(found, str):
            folder = Path(found).parent
            try:
                index = json.loads(Path(found).read_text(encoding="utf-8")) if name == "model_index.json" else {}
            except ValueError:  # cut off
                return None
            parts = {folder / part: cls for part, (_, cls) in pipeline_parts(index).items()} or {folder: ""}
            if (folder / "clip").is_dir():
                parts[folder / "clip"] = ""
            whole = all(part.is_dir() if WEIGHTLESS.search(cls) else _has_weights(part) for part, cls in parts.items())
            return folder if whole else None
    return None


def cached_models() -> list[str]:
    """The ids of the models that are whole in the local cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        ids = [repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        return []
    return sorted(name for name in ids if cached(name))


def _held() -> str:
    return f"the local cache holds {', '.join(cached_models()) or 'no model'}"


def _fail(ref: str, error: Exception) -> NoReturn:
    """Say in one sentence why the hub did not give the model, and what there is without it.

    The client's own messages are left out: they may quote the request, and with it the token.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

    name, _, revision = ref.partition("@")
    hub, status = constants.ENDPOINT, _status(error)
    if isinstance(error, HFValidationError):
        reason = "that is not a hub id either"
    elif isinstance(error, GatedRepoError) or status == 403:
        reason = f"{hub} gives it only to those allowed; accept its terms there and set HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        reason = f"{name} at {hub} has no revision {revision}"
    elif status in (401, 404):
        reason = f"{hub} has none of that name, or only for a valid HF_TOKEN"
    elif status is not None:
        reason = f"{hub} answered with HTTP status {status}; try again later"
    else:
        offline = isinstance(error, OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else f"{hub} can't be reached ({type(error).__name__})"
        reason = f"{why} and it is not whole in the local cache"
    raise ModelError(f"There is no model folder {ref}, and {reason} ({_held()}).") from None
