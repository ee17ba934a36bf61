"""Flickr8k in the three layouts that people hold: Illinois, Kaggle, Karpathy; zipped, unpacked or half of each."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limner.data.archives import Entry, Listing, base, list_source, list_zip
from limner.data.checks import clean_caption, is_junk
from limner.data.dataset import Split
from limner.data.findings import (
    BAD_LINE,
    ESCAPES,
    MISSING,
    NO_PICTURE,
    NOT_A_PICTURE,
    NOT_UTF8,
    OUTSIDE,
    SAME_NAME,
    Finding,
)
from limner.data.sources import SPLIT_NAMES, Picture, Source, decode_lines, is_picture_name, read_csv, read_text
from limner.errors import DataError

ILLINOIS, KAGGLE, KARPATHY = "Flickr8k.token.txt", "captions.txt", "dataset_flickr8k.json"
LISTS: dict[str, Split] = {
    "Flickr_8k.trainImages.txt": "train",
    "Flickr_8k.devImages.txt": "val",
    "Flickr_8k.testImages.txt": "test",
}
COMPANIONS = {
    *(ILLINOIS, KAGGLE, KARPATHY, *LISTS),
    *("Flickr8k.lemma.token.txt", "CrowdFlowerAnnotations.txt", "ExpertAnnotations.txt", "readme.txt"),
    *("dataset_flickr30k.json", "dataset_coco.json"),  # in the zip of Karpathy's JSON
}
LICENCE = (
    "Flickr8k: for non-commercial research and education only; each photograph belongs to its author on Flickr. "
    "Hodosh, Young, Hockenmaier: Framing Image Description as a Ranking Task, JAIR 47 (2013)."
)


@dataclass
class Texts:
    """What the text files say, by the base name of the picture."""

    captions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    splits: dict[str, Split] = field(default_factory=dict)
    split_by: str | None = None
    findings: list[Finding] = field(default_factory=list)


def read_flickr8k(path: Path) -> Source:
    """Find the layout, the captions, the split lists and the pictures. Raises DataError where there is no layout."""
    loose, zipped, findings = _gather(path)
    texts_at = {base(entry.name): entry for entry in [*zipped, *loose]}  # what is unpacked goes before
    texts = Texts()
    if ILLINOIS in texts_at:
        layout = "the University of Illinois release"
        _read_tokens(texts_at[ILLINOIS], texts)
    elif KARPATHY in texts_at:
        layout = "Karpathy's JSON beside pictures"
        _read_karpathy(texts_at[KARPATHY], texts)
    elif KAGGLE in texts_at:
        layout = "Kaggle's layout (captions.txt)"
        for name, caption in read_csv(texts_at[KAGGLE], texts.findings):
            texts.captions[base(name)].append(caption)
    else:
        raise DataError(
            f"{path} is none of Flickr8k's layouts, as it holds neither {ILLINOIS} nor {KAGGLE} nor {KARPATHY}; "
            "give the folder that holds both pictures and captions, or use `limner prepare imagefolder`."
        )
    if not texts.splits:
        _read_lists(texts_at, texts)
    files = max((loose, zipped), key=lambda entries: sum(is_picture_name(entry.name) for entry in entries))
    if not any(is_picture_name(entry.name) for entry in files):
        raise DataError(f"{path} holds Flickr8k's captions but no pictures; put their zip or folder beside.")
    packed = "zipped" if files and files[0].kind == "zip" else "unpacked"
    findings += texts.findings
    pictures = _match(files, texts, findings)
    return Source("Flickr8k", f"{layout}, {packed}", pictures, findings, texts.split_by, LICENCE)


def _gather(path: Path) -> tuple[list[Entry], list[Entry], list[Finding]]:
    """Files as they lie in the source, those in zips that lie there, and what must not be read."""
    files, findings = list_source(path)
    loose: list[Entry] = []
    zipped: list[Entry] = []
    for entry in files:
        if entry.kind == "file" and entry.name.lower().endswith(".zip"):
            inner: Listing = list_zip(entry.path)
            zipped += inner[0]
            findings += inner[1]
        else:
            loose.append(entry)
    return loose, zipped, findings


def _match(files: list[Entry], texts: Texts, findings: list[Finding]) -> list[Picture]:
    """Join files and captions by base name; what is left over on either side is a finding."""
    rejected = {base(finding.file) for finding in findings if finding.reason == ESCAPES}
    found: dict[str, Entry] = {}
    pictures: list[Picture] = []
    for entry in files:
        name = base(entry.name)
        if name in found:
            findings.append(Finding(entry.name, SAME_NAME, f"{found[name].name} is used"))
        elif not is_picture_name(name) and name not in texts.captions:
            if name not in COMPANIONS:
                findings.append(Finding(entry.name, NOT_A_PICTURE, "its name is not that of a picture"))
        else:
            found[name] = entry
            if texts.split_by is not None and name not in texts.splits:
                junk = [caption for caption in map(clean_caption, texts.captions.get(name, ())) if is_junk(caption)]
                findings.append(Finding(name, OUTSIDE, f"a caption says nothing: {junk[0]}" if junk else ""))
            else:
                pictures.append(Picture(entry, name, tuple(texts.captions.get(name, ())), texts.splits.get(name)))
    for name in sorted(texts.captions.keys() | texts.splits.keys()):
        if name in found or name in rejected:
            continue
        count = len(texts.captions.get(name, ()))
        detail = f"{count} caption{'s' * (count != 1)}"
        if name in texts.splits:
            findings.append(Finding(name, MISSING, f"named by the {texts.splits[name]} list; {detail}"))
        else:
            findings.append(Finding(name, NO_PICTURE, detail))
    return pictures


def _read_tokens(entry: Entry, texts: Texts) -> None:
    """Lines `NAME#NUMBER<tab>CAPTION`."""
    for number, (line, valid) in enumerate(decode_lines(read_text(entry)), start=1):
        key, tab, caption = line.partition("\t")
        name = base(key.rpartition("#")[0])
        if not tab or not name:
            if line.strip():
                texts.findings.append(Finding(entry.name, BAD_LINE, f"line {number}: {line.strip()[:100]}"))
            continue
        if not valid:
            detail = f"{entry.name}, line {number}; read as Windows-1252"
            texts.findings.append(Finding(name, NOT_UTF8, detail, kept=True))
        texts.captions[name].append(caption)


def _read_lists(texts_at: dict[str, Entry], texts: Texts) -> None:
    """The official lists, one name a line. Raises DataError where some are there and some are not."""
    missing = [name for name in LISTS if name not in texts_at]
    if len(missing) == len(LISTS):
        return
    if missing:
        raise DataError(f"The split list {missing[0]} is missing beside the others; add it, or remove those as well.")
    for file, split in LISTS.items():
        for line, _ in decode_lines(read_text(texts_at[file])):
            if line.strip():
                name = base(line.strip())
                if texts.splits.setdefault(name, split) != split:
                    detail = f"in the {split} list, and before in the {texts.splits[name]} list, where it stays"
                    texts.findings.append(Finding(name, "in two split lists", detail, kept=True))
    texts.split_by = "the official lists Flickr_8k.{train,dev,test}Images.txt"


def _read_karpathy(entry: Entry, texts: Texts) -> None:
    """`{"images": [{"filename", "split", "sentences": [{"raw"}]}]}`; restval, where there is one, is train."""
    text = "".join(line for line, _ in decode_lines(read_text(entry)))
    try:
        for image in _images(json.loads(text)):
            name = base(image["filename"])
            texts.captions[name] += [sentence["raw"] for sentence in image["sentences"]]
            texts.splits[name] = SPLIT_NAMES.get(image.get("split", ""), "train")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{entry.name} is not Karpathy's JSON, or is damaged; fetch it again.") from None
    texts.split_by = f"the splits in {KARPATHY}"


def _images(value: Any) -> Iterator[dict[str, Any]]:
    for image in value["images"]:
        if not all(isinstance(sentence["raw"], str) for sentence in image["sentences"]):
            raise ValueError("a caption is not text")
        yield image
