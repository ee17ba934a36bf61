"""A source with twenty planted faults, as a zip in Flickr8k's layout or with a metadata.csv.

Each fault is a `Planted`: a picture, its captions, or only one of both. What must become of each is written where
they are tested.
"""

from __future__ import annotations

import struct
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from photos import encoded, jpeg, photo

SIZE = (64, 48)
SEE_THROUGH = Image.new("L", SIZE, 255)
SEE_THROUGH.paste(0, (32, 0, 64, 48))  # the right half
RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))  # (H, W), black to white
UNICODE = "Дворняга 犬 café.jpg"


@dataclass(frozen=True)
class Planted:
    """A fault: the name of its picture, the picture where there is one, and the captions where there are some."""

    name: str
    data: bytes | None
    captions: tuple[bytes, ...] = (b"A dog runs .", b"Two dogs run .")


def header_bomb(side: int) -> bytes:
    """A PNG of some hundred bytes that announces `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def rotated() -> bytes:
    """`photo(4)` lying on its side, with the EXIF tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it
    return encoded(photo(4, *SIZE).transpose(Image.Transpose.ROTATE_90), quality=95, subsampling="4:4:4", exif=exif)


def rgba() -> Image.Image:
    """`photo(3)`, whose right half can't be seen."""
    image = photo(3, *SIZE)
    image.putalpha(SEE_THROUGH)
    return image


def faults(elsewhere: Path) -> dict[str, Planted]:
    """The twenty, by what is wrong; `elsewhere` is an absolute path at which one would be extracted."""
    return {
        "truncated JPEG": Planted("truncated.jpg", jpeg(1)[:900]),
        "text named .jpg": Planted("text.jpg", b"This is no picture.\n" * 20),
        "zero bytes": Planted("zero.jpg", b""),
        "1x1": Planted("one_pixel.png", encoded(Image.new("RGB", (1, 1), "red"), "PNG")),
        "header bomb": Planted("bomb.png", header_bomb(30_000)),
        "CMYK": Planted("cmyk.jpg", encoded(photo(2, *SIZE).convert("CMYK"), quality=95, subsampling="4:4:4")),
        "16-bit PNG": Planted("deep.png", encoded(Image.fromarray(RAMP), "PNG")),
        "RGBA": Planted("rgba.png", encoded(rgba(), "PNG")),
        "EXIF-rotated": Planted("rotated.jpg", rotated()),
        "wrong extension": Planted("wrong_extension.jpg", encoded(photo(5), "PNG")),
        "../escape.jpg": Planted("../escape.jpg", jpeg(6)),
        "duplicate": Planted("z_duplicate.jpg", jpeg(100)),  # of the first sound picture
        "missing file": Planted("missing.jpg", None),
        "caption without image": Planted("caption_only.jpg", None),
        "image without caption": Planted("image_only.jpg", jpeg(7), ()),
        "empty caption": Planted("empty_caption.jpg", jpeg(8), (b" ", b"A dog sleeps .")),
        "non-UTF-8 caption": Planted("latin.jpg", jpeg(9), ("A café terrace .".encode("cp1252"),)),
        "300-token caption": Planted("long.jpg", jpeg(10), (b" ".join([b"dog"] * 298),)),
        "unicode name": Planted(unicodedata.normalize("NFD", UNICODE), jpeg(11)),  # as macOS writes it
        "absolute path": Planted((elsewhere / "absolute.jpg").as_posix(), jpeg(12)),
    }


SOUND = {f"sound_{n}.jpg": Planted(f"sound_{n}.jpg", jpeg(100 + n)) for n in range(12)}


def illinois_zip(path: Path, elsewhere: Path) -> Path:
    """All twenty faults among sound pictures, as the University of Illinois released Flickr8k. -> `path`.

    The sound pictures and the faults are in the train list, but for one of each in the other two.
    """
    planted = faults(elsewhere)
    everything = {**SOUND, **planted}
    lines = [
        unicodedata.normalize("NFC", each.name).rsplit("/")[-1].encode() + b"#%d\t" % number + caption + b"\n"
        for each in everything.values()
        for number, caption in enumerate(each.captions)
    ]
    val, test = {SOUND["sound_1.jpg"].name}, {SOUND["sound_2.jpg"].name, planted["duplicate"].name}
    unlisted = {planted["caption without image"].name}
    names = {unicodedata.normalize("NFC", each.name).rsplit("/")[-1] for each in everything.values()}
    with zipfile.ZipFile(path, "w") as archive:
        for each in everything.values():
            if each.data is not None:
                rooted = each.name.startswith(("..", "/"))
                archive.writestr(each.name if rooted else f"Flicker8k_Dataset/{each.name}", each.data)
        archive.writestr("Flickr8k.token.txt", b"".join(lines))
        for file, members in (
            ("Flickr_8k.trainImages.txt", names - val - test - unlisted),
            ("Flickr_8k.devImages.txt", val),
            ("Flickr_8k.testImages.txt", test),
        ):
            archive.writestr(file, "".join(f"{name}\n" for name in sorted(members)))
    return path


def metadata_zip(path: Path, elsewhere: Path) -> Path:
    """All twenty faults among sound pictures, with a metadata.csv; one caption is in a .txt of its own. -> `path`."""
    planted = faults(elsewhere)
    alone = planted.pop("caption without image")
    everything = {**SOUND, **planted}
    with zipfile.ZipFile(path, "w") as archive:
        lines = [b"file_name,text\n"]
        for each in everything.values():
            if each.data is not None:
                archive.writestr(each.name, each.data)
            name = unicodedata.normalize("NFC", each.name).encode()
            lines += [name + b',"' + caption + b'"\n' for caption in each.captions]
        archive.writestr("metadata.csv", b"".join(lines))
        archive.writestr(f"{alone.name.removesuffix('.jpg')}.txt", b"\n".join(alone.captions))
    return path
