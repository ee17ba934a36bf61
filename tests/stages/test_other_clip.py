"""recipes/other_clip.py: a U-Net reads another CLIP's token states as what it makes of those that it knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from limner.data.dataset import read_split
from limner.generation.engine import encode_prompts
from limner.models import loading
from limner.models.clip import new_tokenizer
from tiny import VOCABULARY, tiny_model, tiny_text_encoder
from trainings import script


def test_keys_and_values_read_the_states_nearest_to_the_old(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, other = tiny_model(tmp_path / "known"), tiny_model(tmp_path / "other")
    tiny_text_encoder(seed=1).save_pretrained(other / "text_encoder")
    given = ["--model", known, "--clip", known, "--other", other, "--data", data]
    script(monkeypatch, "other_clip.py", *given, "--out", tmp_path / "out")

    captions = [caption for record in read_split(data, "train") for caption in record.captions]
    new, old = (
        encode_prompts(*loading.load_text_encoder(str(model)), captions).flatten(0, 1) for model in (other, known)
    )
    nearest = torch.linalg.pinv(new.double()) @ old.double()  # (D, D)
    states = torch.randn(2, 7, new.shape[1])
    before, after = (loading.load_unet(str(model)).eval() for model in (known, tmp_path / "out"))
    with torch.no_grad():
        expected = before(x := torch.randn(2, 4, 8, 8), 5, states @ nearest.float()).sample
        assert_close(after(x, 5, states).sample, expected, rtol=1e-3, atol=1e-4)
    assert loading.load_scheduler(str(tmp_path / "out")).config == loading.load_scheduler(str(known)).config


def test_another_vocabulary_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, other = tiny_model(tmp_path / "known"), tiny_model(tmp_path / "other")
    new_tokenizer(["zebras quiz jackdaws", "vexed sphinx"], VOCABULARY).save_pretrained(other / "tokenizer")
    given = ["--model", known, "--clip", known, "--other", other, "--data", data, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match="different tokens"):
        script(monkeypatch, "other_clip.py", *given)
    assert not (tmp_path / "out").exists()
