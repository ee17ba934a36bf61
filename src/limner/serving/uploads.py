"""Pictures that clients send to begin with: bounded before they are decoded, kept under the SHA-256 of their bytes."""

from __future__ import annotations

import base64
import io
import os
import re
import time
import zipfile
from collections.abc import Container
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from limner.artifacts import atomic_file
from limner.errors import DataError
from limner.generation import sources

if TYPE_CHECKING:
    from PIL.Image import Image

    from limner.generation.sources import Source
    from limner.serving.schemas import JobRequest

FRESH = 60  # seconds that a picture stays without a job, which may be about to be stored; as long as an ended job does
DIGEST = re.compile("[0-9a-f]{64}")
HEAD = re.compile(r"data:[\w/+.-]+;base64,")
OTHER_KINDS = re.compile(rb"<script|<html|<\?php|%PDF-", re.IGNORECASE)
"""What a file has in it that is a page, a program or a document beside a picture; an archive is known by its end."""


class Uploads:
    """The folder of what was sent."""

    def __init__(self, folder: Path, most_pixels: int) -> None:
        self.folder, self.most_pixels = folder, most_pixels

    def read(self, text: str, *, mask: bool) -> tuple[bytes, Source]:
        """A picture that comes in base64, perhaps as a data: URL, or whose digest a client has: its file, and decoded.

        Raises DataError where it is no picture or is too large.
        """
        if DIGEST.fullmatch(text):
            data = self._kept(text)
        else:
            try:
                data = base64.b64decode(HEAD.sub("", text[:100], count=1) + text[100:], validate=True)
            except ValueError:
                what = "mask" if mask else "picture"
                raise DataError(f"The {what} is neither base64 nor the digest of one that was sent before.") from None
        return data, self._decoded(data, mask=mask)

    def keep(self, data: bytes, digest: str) -> None:
        """Write the file of a picture that was read; where it lies there already it is fresh again."""
        file = self._file(digest)
        try:
            os.utime(file)
        except FileNotFoundError:
            with atomic_file(file) as partial:
                partial.write_bytes(data)

    def inverted(self, text: str) -> str:
        """The mask that redraws what this one keeps, in base64. Raises DataError as `read`."""
        from PIL import ImageOps

        return _png(ImageOps.invert(self.read(text, mask=True)[1].image))

    def white_mask(self, data: bytes) -> str:
        """OpenAI's mask, which is see-through where to redraw, as ours, which is white there; one that is not
        see-through is ours already. In base64. Raises DataError as `read`."""
        from PIL import Image, ImageOps

        self._decoded(data, mask=False)  # so that it is known to be within bounds, and whole
        image = Image.open(io.BytesIO(data))
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() == (255, 255):
            return in_base64(data)
        return _png(ImageOps.invert(alpha))

    def sources(self, request: JobRequest) -> dict[str, Source]:
        """What a request begins with, whose pictures are kept. Raises DataError where one is not there."""
        return {name: self.read(digest, mask=name == "mask")[1] for name, digest in request.pictures.items()}

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its name, which is a digest."""
        return {file.name: file.stat().st_size for file in self._files()}

    def remove_others(self, digests: Container[str]) -> None:
        """Remove what is none of these, and not fresh: of requests that were refused, and of jobs that are gone."""
        for file in self._files():
            if file.name not in digests and file.stat().st_mtime < time.time() - FRESH:
                file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Whole ones, and what a server that was killed had not written yet."""
        return list(self.folder.glob("??/*"))

    def _kept(self, digest: str) -> bytes:
        assert DIGEST.fullmatch(digest)
        try:
            return self._file(digest).read_bytes()
        except FileNotFoundError:
            raise DataError(f"There is no picture {digest[:12]}… here; send it again.") from None

    def _decoded(self, data: bytes, *, mask: bool) -> Source:
        if OTHER_KINDS.search(data) or zipfile.is_zipfile(io.BytesIO(data)):
            what = "mask" if mask else "picture"
            raise DataError(f"The {what} is a file of another kind too; open it and save it again as a PNG.")
        name = sha256(data).hexdigest()
        decode = sources.mask_of if mask else sources.picture_of
        return decode(data, name, self.most_pixels)

    def _file(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest


def in_base64(data: bytes) -> str:
    """A file as the field of a request."""
    return base64.b64encode(data).decode()


def _png(image: Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return in_base64(out.getvalue())
