"""What sees a picture or reads a caption as a vector: networks behind small protocols, and their features kept on disk.

`load_extractor` takes a kind and a name:

    clip:REF               the image tower of any CLIP or SigLIP that Limner loads, such as clip:builtin
    judge:FOLDER           the judge that recipes/judge.py made
    transformers:REF       the pooled output, or else the mean of the last states, of an image model of Transformers
    inception              the Inception of the usual FID, as torch-fidelity has it
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from limner import artifacts
from limner.artifacts import atomic_file, sha256
from limner.data.pictures import load_pixels
from limner.errors import ConfigError, DataError, ModelError
from limner.evaluation.agreement import each_once
from limner.evaluation.judge import load_judge
from limner.models import hub, loading
from limner.models.clip import Clip, normalised
from limner.progress import progress

BATCH = 32
READ = 512  # captions that a reader is given at once
FILTER = "lanczos"  # by which `data.pictures` resizes
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


class Extractor(Protocol):
    """A network's view of pictures, and what must be told of it beside every figure that it gives."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def sha256(self) -> str:
        """Of its weights."""

    @property
    def size(self) -> int:
        """Side of the pictures that it reads, in pixels."""

    @property
    def filter(self) -> str:
        """How pictures of another size come to `size`."""

    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, size, size) in [-1, 1] -> features (N, D), on CPU."""


class Reader(Protocol):
    """A network's view of captions."""

    @property
    def name(self) -> str:
        """What is told while it reads."""

    @property
    def sha256(self) -> str:
        """Of its weights."""

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """One or more captions -> features (M, D), on CPU."""


@dataclass(frozen=True)
class Network:
    """An extractor made of any network that answers pixels with vectors."""

    name: str
    sha256: str
    size: int
    see: Callable[[Tensor], Tensor]
    """Pixels (N, 3, size, size) in [-1, 1] -> (N, D)."""
    filter: str = FILTER

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, size, size) in [-1, 1] -> features (N, D), on CPU."""
        return self.see(pixels).float().cpu()


def load_extractor(spec: str) -> Extractor:
    """The extractor that `spec` names, as above. Raises ConfigError where it names none, ModelError as loading does."""
    kind, _, name = spec.partition(":")
    if spec == "inception":
        return _inception()
    if not name or kind not in ("clip", "judge", "transformers"):
        raise ConfigError(f"{spec} names no extractor; write clip:REF, judge:FOLDER, transformers:REF or inception.")
    if kind == "judge":
        return load_judge(Path(name))
    if kind == "clip":
        return clip_extractor(name, loading.load_clip(name), loading.identity(name, "clip"))
    return _transformers(name)


def clip_extractor(name: str, clip: Clip, digest: str) -> Network:
    """The image tower of a CLIP of sha256 `digest`, whose features have unit length."""

    def see(pixels: Tensor) -> Tensor:
        return clip.image_features(pixels.to(clip.network.device))

    return Network(f"clip:{name}", digest, clip.size, see)


def _transformers(ref: str) -> Network:
    """Raises ModelError where `ref` is no image model that can be read."""
    from transformers import AutoModel

    folder = loading.resolve(ref)
    names = [path.name for path in folder.iterdir()]
    hub.refuse_pickles(names, names, {}, ref)
    with loading.reading("image model", folder):
        network: Any = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True).eval()
    if network.main_input_name != "pixel_values" or hasattr(network.config, "text_config"):
        raise ModelError(f"{ref} is a {type(network).__name__}, not a model of pictures alone; a CLIP is clip:{ref}.")
    side = getattr(network.config, "image_size", 224)
    statistics = loading.read_normalisation(folder)

    def see(pixels: Tensor) -> Tensor:
        answer = network(normalised(pixels, statistics))
        pooled = getattr(answer, "pooler_output", None)
        states: Tensor = answer.last_hidden_state if pooled is None else pooled  # (N, D), (N, L, D) or (N, D, h, w)
        return states.mean(dim=1) if states.ndim == 3 else states.flatten(2).mean(dim=2) if states.ndim == 4 else states

    size = int(side if isinstance(side, int) else side[0])
    return Network(f"transformers:{ref}", artifacts.identity(folder), size, see)


def _inception() -> Network:
    """Raises ModelError where torch-fidelity or its weights are not there."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError):  # a torchvision that is for another torch raises the second
        raise ModelError(
            "The Inception needs torch-fidelity, and the torchvision of your torch; install both, or name another one."
        ) from None
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not file.is_file():
        raise ModelError(
            f"The weights of the Inception are not there; put torch-fidelity's release file {INCEPTION} "
            f"into {file.parent}, or leave inception out."
        )
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file)).eval()

    def see(pixels: Tensor) -> Tensor:
        features: Tensor = network((pixels * 127.5 + 127.5).round().clamp(0, 255).byte())[0]
        return features

    return Network("inception", sha256(file), network.INPUT_IMAGE_SIZE, see)


def batches(extractor: Extractor, paths: Sequence[Path], batch_size: int = BATCH) -> Iterator[Tensor]:
    """Features of the centre squares of pictures, in their order, no more than a batch at once -> (batch, D) each.

    Raises DataError where a picture can't be read, or where its features are no numbers.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, len(paths), batch_size):
            some = paths[start : start + batch_size]
            pixels = torch.stack(list(pool.map(load_pixels, some, itertools.repeat(extractor.size))))
            features = extractor.image_features(pixels)  # of (batch, 3, size, size)
            if not (finite := features.isfinite().all(dim=1)).all():
                bad = some[int((~finite).int().argmax())]
                raise DataError(
                    f"{extractor.name} sees no numbers in the picture {bad}; leave it out or judge otherwise."
                )
            yield features


def features_of(
    extractor: Extractor,
    paths: Sequence[Path],
    batch_size: int = BATCH,
    *,
    cache: Path | None = None,
) -> Tensor:
    """Features of one or more pictures -> (N, D) float32.

    Where there is a folder `cache` they are kept there, by the sha256 of the pictures and of the extractor, and read
    from it the next time; the answer is then that file, of which no more is in memory than what is looked at. Raises
    DataError as `batches` does, OSError as the writing does.
    """
    how = f"{extractor.name} {extractor.sha256} {extractor.size} {extractor.filter}"

    def see() -> Iterator[Tensor]:
        with progress(f"pictures seen by {extractor.name}", len(paths)) as advance:
            for part in batches(extractor, paths, batch_size):
                yield part.float()
                advance(len(part))

    if cache is None:
        return torch.cat(list(see()))
    return _kept(cache, [how, *map(sha256, paths)], len(paths), see)


def text_features_of(reader: Reader, captions: Sequence[str], *, cache: Path) -> Tensor:
    """Features of one or more captions -> (M, D) float32; each text is read once, so that equals tie.

    They are kept in the folder `cache`, by the captions and the sha256 of the reader, and read from it the next time.
    """
    texts, places = each_once(captions)

    def read() -> Iterator[Tensor]:
        with progress(f"captions read by {reader.name}", len(texts)) as advance:
            for start in range(0, len(texts), READ):
                some = texts[start : start + READ]
                yield reader.text_features(some).float()
                advance(len(some))

    key = [f"{reader.name} {reader.sha256}", *texts]
    return _kept(cache, key, len(texts), read)[places]


def _kept(cache: Path, key: Sequence[str], count: int, make: Callable[[], Iterator[Tensor]]) -> Tensor:
    """What `make` yields in parts (count, D), or the file that was kept of that; `key` is all that decides it."""
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()
    file = cache / f"{digest}.npy"
    if not file.is_file():
        with atomic_file(file) as partial, partial.open("wb") as out:
            for part in make():
                if not out.tell():
                    shape = (count, part.shape[1])
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(out, header)
                out.write(part.numpy().astype("<f4").tobytes())
    return torch.from_numpy(np.load(file, mmap_mode="c"))
