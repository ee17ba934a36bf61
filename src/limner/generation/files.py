"""Picture files: PNG, JPEG and WebP with two texts in each, what other programs show and Limner's own record.

In PNG both are text chunks, `parameters` and `limner`. In JPEG and WebP the first is EXIF's UserComment, where
stable-diffusion-webui (A1111) writes and looks for it, and the second a property in XMP, whose namespace is Limner's.
"""

from __future__ import annotations

import zlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from limner.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

    from limner.config import Format

SUFFIXES: dict[Format, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
RECORD, PARAMETERS = "limner", "parameters"
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
RDF, NAMESPACE = "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "urn:limner"


def write(image: Image, target: Path | BytesIO, kind: Format, quality: int, parameters: str, record: str) -> None:
    """Write the picture with both texts; `quality`, 1 to 100, is of JPEG and WebP. Raises OSError, and ConfigError
    where the texts are too long for a JPEG."""
    from PIL.PngImagePlugin import PngInfo

    if kind == "png":
        info = PngInfo()
        info.add_text(PARAMETERS, parameters)
        info.add_text(RECORD, record)
        # Half the time for as many bytes: photographs don't repeat themselves
        image.save(target, "PNG", pnginfo=info, compress_type=zlib.Z_RLE)
        return
    extra: dict[str, Any] = {"subsampling": "4:4:4"} if kind == "jpeg" else {}
    try:
        image.save(target, kind.upper(), quality=quality, exif=_exif(parameters), xmp=_xmp(record), **extra)
    except ValueError as error:
        if "too long" not in str(error):
            raise
        raise ConfigError("The prompt is too long for what a JPEG says of its origin; choose --format png.") from None


def reencoded(image: Image, kind: Format, quality: int) -> Image:
    """The picture as it comes out of a file of that kind."""
    from PIL import Image as Images

    buffer = BytesIO()
    write(image, buffer, kind, quality, "", "")
    return Images.open(buffer).convert("RGB")


def read(file: Path) -> tuple[Image, Format, str]:
    """A picture, its kind, and its record, "" where it has none. Raises DataError where it can't be read."""
    from PIL import Image as Images
    from PIL import UnidentifiedImageError

    try:
        with Images.open(file, formats=[kind.upper() for kind in SUFFIXES]) as image:
            image.load()
            kind = next((kind for kind in SUFFIXES if kind.upper() == image.format), None)
            text = image.info.get(RECORD, "") if kind == "png" else _record(image.info.get("xmp", b""))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Images.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a whole picture"
        raise DataError(f"{file} can't be read ({reason}).") from None
    if kind is None:  # what Pillow takes for a JPEG and then calls otherwise; Limner writes none
        raise DataError(f"{file} can't be read (it is of a kind that Limner does not write).")
    return image, kind, text


def _exif(parameters: str) -> Exif:
    from PIL.Image import Exif

    exif = Exif()
    # The eight bytes before the text name its encoding (Exif 3.0, section 4.6.6.4)
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + parameters.encode("utf-16-be")
    return exif


def _xmp(record: str) -> bytes:
    meta = ElementTree.Element("{adobe:ns:meta/}xmpmeta")
    description = ElementTree.SubElement(ElementTree.SubElement(meta, f"{{{RDF}}}RDF"), f"{{{RDF}}}Description")
    description.set(f"{{{RDF}}}about", "")
    ElementTree.SubElement(description, f"{{{NAMESPACE}}}record").text = record
    return ElementTree.tostring(meta)


def _record(xmp: bytes) -> str:
    """The record in an XMP packet, as an element or, as other programs may write it again, an attribute."""
    try:
        meta = ElementTree.fromstring(xmp.rstrip(b"\0 \n"))
    except (ElementTree.ParseError, ValueError):
        return ""
    name = f"{{{NAMESPACE}}}record"
    for element in meta.iter():
        if element.tag == name:
            return element.text or ""
        if name in element.attrib:
            return element.attrib[name]
    return ""
