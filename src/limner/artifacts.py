"""Folders on disk: atomic writes, hashes, manifests, and the run folder that every stage leaves behind.

Three kinds of folder pass between stages (docs/pipeline.md): a *dataset*, a *run* and a *model*. Whatever has
value is written beside its place, flushed to disk and renamed into it, so that a kill at any moment leaves
either the old content or the new one.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from limner.errors import ConfigError, RunError

if TYPE_CHECKING:
    from limner.config import StageConfig

PARTIAL = ".partial"  # suffix of what is being written; safe to delete at any time
OLD = f".old{PARTIAL}"  # of what is being replaced where that takes two renames; safe to delete after `_restore`
LOCK = ".lock"  # which a process holds while it is at work in a folder


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Name `path` in an OSError that names no file, and make one of what safetensors raises in its place."""
    try:
        yield
    except Exception as error:
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else quoted and int(quoted[1])
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it replaces `path`, on any error it is removed.

    Raises OSError as the writing does (a full disk, a folder without rights).
    """
    path = _named(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")  # threads may write the same file
    try:
        with _disk_errors(path):
            yield partial
        _fsync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _named(path: Path) -> Path:
    """The same path with a name, which `.` and `..` lack, so that what is written can lie beside it."""
    return path.resolve() if path.name in ("", "..") else path


def check_writable(folder: Path, flag: str) -> None:
    """Raise ConfigError where nothing can be written into a folder, before time is spent on what would be."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ConfigError(f"{there} is a file; choose another {flag}.")
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ConfigError(f"There is no right to write in {there}; choose another {flag}.")


def write_new(paths: Iterable[Path], write: Callable[[Path], None]) -> Path:
    """Let `write` write a file, give it the first name of `paths` that no file has, and return that.

    `paths` are of one folder, and enough of them. Whenever this is killed, under such a name lies a whole file or none,
    and no file is ever replaced, whoever else writes there. Raises OSError as the writing does.
    """
    names = iter(paths)
    path = next(names)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(8)}{PARTIAL}")  # threads and processes may want the same name
    try:
        with _disk_errors(path):
            write(partial)
        _fsync(partial)
        while not _take(path, partial):
            path = next(names)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _take(path: Path, partial: Path) -> bool:
    """Give `partial` the name `path` too, unless a file has it."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links, such as FAT: a kill may leave an empty file there
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
        partial.replace(path)
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step where the system can (Linux: renameat2 with RENAME_EXCHANGE); tell whether it did."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _replace(path: Path, partial: Path) -> None:
    """Put a folder into the place of another, which goes."""
    if not _exchange(partial, path):
        old = path.with_name(f".{path.name}{OLD}")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)


def _restore(folder: Path) -> None:
    """Put back whatever below a folder `_replace` had moved away when it was killed, and nothing has replaced."""
    for old in list(folder.rglob(f".*{OLD}")):
        place = old.with_name(old.name.removeprefix(".").removesuffix(OLD))
        if not place.exists():
            old.rename(place)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it replaces the folder `path`, on any error it is removed."""
    path = _named(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")  # others may write the same folder
    partial.mkdir()
    try:
        with _disk_errors(path):
            yield partial
        for file in partial.rglob("*"):
            _fsync(file)
        try:
            partial.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            _replace(path, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises RunError in one sentence where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing; is {path.parent} the folder you meant?") from None
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); restore it or start in a new folder.") from None


def sha256(path: Path) -> str:
    """SHA-256 of one file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of every file under `folder` whose name matches `pattern`, by path relative to `folder`."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob(pattern) if p.is_file())
    return {name: sha256(folder / name) for name in sorted(names) if PARTIAL not in name}


def identity(folder: Path, pattern: str = "*.safetensors") -> str:
    """One SHA-256 for the weights below `folder`: the hash of their names and hashes."""
    text = "".join(f"{name} {digest}\n" for name, digest in sha256_folder(folder, pattern).items())
    return hashlib.sha256(text.encode()).hexdigest()


def hardware() -> dict[str, Any]:
    """What this run ran on, for its manifest."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Run:
    """A run folder: `config.json`, `manifest.json`, `checkpoints/`, `samples/`, logs, and the result."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, config: StageConfig, parents: dict[str, str]) -> Self:
        """Create the run folder, or come back to it when it was made with the same configuration from the same parents.

        In a run that was begun nothing changes before `work`. `parents` maps a role ("data", "vae") to the sha256 of
        what is used. Raises RunError when the folder holds something else, naming the settings or parents that differ.
        """
        wanted = json.loads(config.model_dump_json())
        file = folder / "config.json"
        if file.exists():
            # What a run of an older version doesn't say was as the default is
            defaults = json.loads(type(config).model_construct().model_dump_json())
            names = set(_differences({**defaults, **read_json(file)}, wanted)) - {"out", *config.changeable}
            if names:
                raise RunError(
                    f"{folder} was started with other settings ({', '.join(sorted(names))}); "
                    "repeat that command to resume it, or choose another --out."
                )
        elif folder.is_file() or (folder.is_dir() and not is_empty(folder)):
            raise RunError(f"{folder} exists and is not a run folder; choose another --out.")
        manifest = folder / "manifest.json"
        if manifest.exists() and (roles := _differences(read_json(manifest)["parents"], parents)):
            raise RunError(
                f"{folder} was made from other contents of {' and '.join(sorted(roles))} than are there now; "
                "choose another --out."
            )
        if not file.exists():
            write_json(file, wanted)  # first, since it is what makes the folder a run's
        if not manifest.exists():
            write_json(manifest, {"parents": parents})
        return cls(folder)

    @contextmanager
    def work(self, config: StageConfig) -> Iterator[None]:
        """Note the configuration, as what may change of it may have, and clear away what killed processes left.

        Raises RunError where another process is at work in the folder.
        """
        with alone(self.folder):
            _restore(self.folder)
            for partial in list(self.folder.rglob(f".*{PARTIAL}")):
                if partial.is_dir():
                    shutil.rmtree(partial)
                else:
                    partial.unlink(missing_ok=True)
            write_json(self.folder / "config.json", json.loads(config.model_dump_json()))
            yield

    @property
    def finished(self) -> bool:
        """Whether the run reached its end; a finished run is not run again."""
        return is_finished(self.folder)

    @property
    def manifest(self) -> dict[str, Any]:
        """Where the result came from and what it cost."""
        manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
        return manifest

    @property
    def checkpoints(self) -> Path:
        """Where training checkpoints lie."""
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        """Where validations leave pictures, in a folder named by the images seen."""
        return self.folder / "samples"

    @property
    def model(self) -> Path:
        """The result: the part of a Diffusers model folder that this stage makes."""
        return self.folder / "model"

    def finish(self, *, started: float, **facts: Any) -> None:
        """Complete `manifest.json`; `started` is `time.time()` at the beginning of this process's part of the run."""
        from limner import __version__

        manifest = {
            "limner": __version__,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "parents": self.manifest["parents"],
            "seconds": round(time.time() - started, 1),
            "hardware": hardware(),
            **facts,
        }
        write_json(self.folder / "manifest.json", manifest)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which is made; the system lets go of it when this process ends, however it ends.

    The lock is of POSIX's kind, which forked workers don't inherit and so can't outlive. Raises RunError where another
    process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # has none of that kind
        yield
        return
    import fcntl

    with (folder / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunError(
                f"Another process is at work in {folder}; let it end, stop it, or choose another --out."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, but for a lock and what killed processes were writing."""
    return all(path.name == LOCK or PARTIAL in path.name for path in folder.iterdir())


def is_finished(folder: Path) -> bool:
    """Whether a run folder's run reached its end."""
    file = folder / "manifest.json"
    return file.exists() and "finished" in read_json(file)


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]
