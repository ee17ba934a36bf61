"""Textual inversion draws as it does in Diffusers, in both layouts, and is refused where it doesn't fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from limner import load
from limner.artifacts import sha256
from limner.errors import ConfigError, ModelError, UserError
from limner.generation import provenance
from limner.generation.jobs import read_embeddings, read_spec
from limner.generation.model import Model
from limner.generation.painters import LatentDiffusion
from tiny import WIDTH

PROMPT = "A <toy> on the beach, <toy>"


def made(file: Path, name: str = "<toy>", vectors: int = 1, seed: int = 0, width: int = WIDTH) -> Path:
    """A file of random vectors, in Diffusers' layout, or as `emb_params` in A1111's. -> `file`."""
    values = torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))
    save_file({name: values}, file)
    return file


def states(model: Model, prompt: str) -> Tensor:
    """Token states of a prompt (1, L, D)."""
    assert isinstance(model.painter, LatentDiffusion)
    return model.painter._encode(prompt)


def theirs(folder: Path, prompt: str, *embeddings: tuple[Tensor, str]) -> Tensor:
    """Token states as Diffusers has them (1, 77, D)."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    for vectors, token in embeddings:
        pipeline.load_textual_inversion(vectors, token=token)
    return pipeline.encode_prompt(prompt, "cpu", 1, False)[0]


def vectors(count: int, seed: int = 0) -> Tensor:
    """What `made` puts into a file (V, D)."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("layout", ["<toy>", "emb_params"])
def test_a_token_means_what_it_means_in_diffusers(folder: Path, tmp_path: Path, layout: str, count: int) -> None:
    file = made(tmp_path / "<toy>.safetensors", layout, count)
    found = states(load(str(folder), device="cpu", precision="fp32", embeddings=[str(file)]), PROMPT)
    assert_close(found, theirs(folder, PROMPT, (vectors(count), "<toy>")), atol=1e-5, rtol=0)
    assert (found - states(load(str(folder), device="cpu", precision="fp32"), PROMPT)).abs().max() > 0.01


def test_several_share_a_prompt_and_a_token_can_be_named(folder: Path, tmp_path: Path) -> None:
    one, two = made(tmp_path / "one.safetensors", "emb_params", 2), made(tmp_path / "two.safetensors", seed=1)
    model = load(str(folder), device="cpu", precision="fp32", embeddings=[str(one), f"{two}:My-Style"])
    wanted = theirs(folder, "a one, my-style", (vectors(2), "one"), (vectors(1, 1), "my-style"))
    for prompt in ("a one, my-style", "A ONE, My-Style"):  # CLIP knows no case
        assert_close(states(model, prompt), wanted, atol=1e-5, rtol=0)
    plain = load(str(folder), device="cpu", precision="fp32")
    assert torch.equal(states(model, "none of them; ones"), states(plain, "none of them; ones")), "a word, not a part"


def test_a_folder_and_one_vector_without_rows_will_do(folder: Path, tmp_path: Path) -> None:
    save_file({"<toy>": vectors(1)[0]}, tmp_path / "learned_embeds.safetensors")
    model = load(str(folder), device="cpu", precision="fp32", embeddings=[str(tmp_path)])
    assert_close(states(model, PROMPT), theirs(folder, PROMPT, (vectors(1), "<toy>")), atol=1e-5, rtol=0)


def test_vectors_take_places_and_weights_as_words_do(folder: Path, tmp_path: Path) -> None:
    file = made(tmp_path / "toy.safetensors", "emb_params", 40)
    model = load(str(folder), device="cpu", precision="fp32", embeddings=[str(file)])
    assert states(model, "toy").shape[1] == 77
    assert states(model, "toy toy").shape[1] == 154, "80 places"
    assert not torch.equal(states(model, "(toy:1.5)"), states(model, "toy"))


def test_other_models_stay_as_they_are_and_the_record_knows(folder: Path, tmp_path: Path) -> None:
    file = made(tmp_path / "toy.safetensors", "emb_params", 2)
    with_it, without = (
        load(str(folder), device="cpu", precision="fp32", embeddings=[str(file)]),
        load(str(folder), device="cpu", precision="fp32"),
    )
    picture = with_it("A toy.", steps=1).pictures[0]
    assert picture.record["model"]["embeddings"] == [{"ref": str(file), "sha256": sha256(file), "token": "toy"}]
    assert f'TI hashes: "toy: {sha256(file)[:12]}"' in provenance.parameters(picture.record)
    plain = without("A toy.", steps=1).pictures[0]
    assert plain.record["model"]["embeddings"] == []
    assert plain.record["model"]["weights"] == picture.record["model"]["weights"]
    assert plain.image.tobytes() != picture.image.tobytes()
    assert without("A dog.", steps=1).images[0].tobytes() == with_it("A dog.", steps=1).images[0].tobytes()


# ---- refusals


def refused(kind: type[UserError], call: Callable[[], object], *said: str) -> None:
    """Assert that a call is refused in one sentence that says this."""
    with pytest.raises(kind) as caught:
        call()
    for part in said:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    def with_(*texts: str) -> Callable[[], object]:
        return lambda: load(str(folder), device="cpu", precision="fp32", embeddings=texts)

    wide = made(tmp_path / "wide.safetensors", width=768)
    refused(ModelError, with_(str(wide)), f"{wide} is of shape (1, 768), and this model's text encoder is 32 wide")
    save_file({"<toy>": torch.randn(1, 2, WIDTH)}, wide)
    refused(ModelError, with_(str(wide)), "is of shape (1, 2, 32)")
    toy, other = made(tmp_path / "toy.safetensors", "emb_params", 3), made(tmp_path / "other.safetensors", "emb_params")
    for first, second in (("toy", "toy"), ("toy", "toy_1"), ("toy", "toy_3"), ("toy_3", "toy")):
        pair = (f"{toy}:{first}", f"{other if second != 'toy' or first == 'toy' else toy}:{second}")
        refused(ModelError, with_(*pair), f"The token {second} of ", "is in the vocabulary already; name another, as ")
    refused(ModelError, with_(f"{toy}:a</w>"), "The token a</w> of ")


def test_files_that_are_no_embedding_are_named(folder: Path, tmp_path: Path) -> None:
    spec, file = read_spec(str(folder)), tmp_path / "toy.safetensors"

    def read(text: str = str(file)) -> Callable[[], object]:
        return lambda: read_embeddings(spec, [text])

    refused(ModelError, read(), f"There is no embedding {file}; name a safetensors file")
    refused(ModelError, read(f"{file}:toy"), f"There is no embedding {file}; name")
    refused(ModelError, read(str(tmp_path)), f"There is no embedding {tmp_path}; name")
    for content in (b"", pickle.dumps({"string_to_param": 1}), b"\xff" * 64):
        file.write_bytes(content)
        refused(ModelError, read(), "not a whole safetensors file", "may carry code")
    save_file({"clip_l": vectors(1), "clip_g": vectors(1)}, file)
    refused(ModelError, read(), "holds 2 tensors (clip_g, clip_l) in place of one; choose one for Stable Diffusion 1")
    save_file({}, file)
    refused(ModelError, read(), "holds nothing")
    made(file)
    for token in ("\n\t\x01", "\udce4"):
        refused(ConfigError, read(f"{file}:{token}"), "name another, as toy.safetensors:TOKEN")
    refused(ModelError, lambda: read_embeddings(replace(spec, own_loop=False), [str(file)]), "Stable Diffusion 1 and 2")
