"""The losses: CLIP's and SigLIP's own where pictures are distinct, no push between captions of one picture, drift."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from limner.training.losses import contrastive, drift, missed, sigmoid
from tiny import CAPTIONS, tiny_clip, tiny_siglip, tiny_siglip_tokenizer, tiny_tokenizer


def features(count: int, seed: int) -> Tensor:
    """Unit-length features (count, 8) in double precision, for checks of gradients."""
    drawn = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(drawn, dim=1)


def double(value: float) -> Tensor:
    """A scalar in double precision."""
    return torch.tensor(value, dtype=torch.float64)


# ---- InfoNCE


def test_it_is_clips_own_loss_for_distinct_pictures(tmp_path: object) -> None:
    clip, tokenizer = tiny_clip(), tiny_tokenizer(tmp_path)  # type: ignore[arg-type]
    ids = tokenizer(CAPTIONS, padding=True, return_tensors="pt")["input_ids"]
    pixels = torch.randn(len(CAPTIONS), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    out = clip(input_ids=ids, pixel_values=pixels, return_loss=True)
    owners = torch.randperm(len(CAPTIONS))
    ours = contrastive(out.text_embeds, out.image_embeds, clip.logit_scale.exp(), owners)
    assert_close(ours, out.loss)
    grads = [torch.autograd.grad(loss, list(clip.parameters()), retain_graph=True) for loss in (ours, out.loss)]
    for one, other in zip(*grads):
        assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_three_pairs_by_hand() -> None:
    """Two pictures along the axes, one between them."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
    logits = [[2.0, 0.0, 1.2], [0.0, 2.0, 1.6], [1.2, 1.6, 2.0]]  # the same both ways
    wanted = -sum(math.log(math.exp(row[i]) / sum(map(math.exp, row))) for i, row in enumerate(logits)) / 3
    assert_close(contrastive(images, images, double(2.0), torch.arange(3)).item(), wanted)


def test_views_of_one_picture_attract_each_others_captions() -> None:
    """Where CLIP's own loss pushes a caption away from another crop of its picture, this one draws it near."""
    images, scale = torch.eye(8, dtype=torch.float64)[:4], torch.tensor(5.0, dtype=torch.float64)
    for owners, attracted in ((torch.tensor([5, 5, 7, 2]), True), (torch.arange(4), False)):
        text = features(4, 0).requires_grad_()
        (gradient,) = torch.autograd.grad(contrastive(text, images, scale, owners), text)
        towards = -gradient @ images.T  # (4, 4): how a step of descent moves each caption towards each image
        assert (towards[0, 1] > 0) == (towards[1, 0] > 0) == attracted
        assert towards[0, 2] < 0


def test_a_batch_of_one_picture_teaches_nothing_where_its_features_agree() -> None:
    text, images = (torch.ones(3, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = contrastive(text, images, torch.tensor(50.0, dtype=torch.float64), torch.zeros(3))
    assert_close(loss.item(), float(torch.tensor(3.0).log()))
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss, [text, images]))


def test_the_target_is_shared_among_the_pairs_of_a_picture() -> None:
    """Against the definition, row by row."""
    text, images = features(5, 0), features(5, 1)
    owners, scale = torch.tensor([0, 1, 0, 2, 1]), torch.tensor(3.0, dtype=torch.float64)
    total = 0.0
    for one, other in ((text, images), (images, text)):
        for i in range(5):
            p = torch.softmax(scale * other @ one[i], dim=0)
            same = [j for j in range(5) if owners[j] == owners[i]]
            total -= sum(float(p[j].log()) for j in same) / len(same) / 5
    assert_close(contrastive(text, images, scale, owners).item(), total / 2)


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = [features(4, 0), features(4, 1), torch.tensor(7.0, dtype=torch.float64)]
    owners = torch.tensor([0, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda *given: contrastive(*given, owners), [x.requires_grad_() for x in inputs])


# ---- the sigmoid loss


def test_it_is_siglips_own_loss_for_distinct_pictures(tmp_path: object) -> None:
    siglip, tokenizer = tiny_siglip(), tiny_siglip_tokenizer(tmp_path)  # type: ignore[arg-type]
    with torch.no_grad():
        siglip.logit_scale.fill_(1.5)
        siglip.logit_bias.fill_(-2.5)
    ids = tokenizer(CAPTIONS, padding="max_length", return_tensors="pt")["input_ids"]
    pixels = torch.randn(len(CAPTIONS), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    out = siglip(input_ids=ids, pixel_values=pixels, return_loss=True)
    owners = torch.randperm(len(CAPTIONS))
    ours = sigmoid(out.text_embeds, out.image_embeds, siglip.logit_scale.exp(), siglip.logit_bias, owners)
    assert_close(ours, out.loss)
    grads = [torch.autograd.grad(loss, list(siglip.parameters()), retain_graph=True) for loss in (ours, out.loss)]
    for one, other in zip(*grads):
        assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_sigmoid_loss_by_hand() -> None:
    """Every pair by itself, over the number of pictures; the first and the last pair are of one picture."""
    text, images, owners = features(3, 0), features(3, 1), torch.tensor([4, 9, 4])
    scale, bias, total = 3.0, -1.0, 0.0
    for i in range(3):
        for j in range(3):
            belongs = 1 if owners[i] == owners[j] else -1
            total += math.log1p(math.exp(-belongs * (scale * float(text[i] @ images[j]) + bias)))
    assert_close(sigmoid(text, images, double(scale), double(bias), owners).item(), total / 3)


def test_captions_of_one_picture_are_never_each_others_negatives() -> None:
    images = torch.eye(8, dtype=torch.float64)[:4]
    for owners, attracted in ((torch.tensor([5, 5, 7, 2]), True), (torch.arange(4), False)):
        text = features(4, 0).requires_grad_()
        (gradient,) = torch.autograd.grad(sigmoid(text, images, double(5.0), double(-2.0), owners), text)
        towards = -gradient @ images.T  # (4, 4)
        assert (towards[0, 1] > 0) == (towards[1, 0] > 0) == attracted
        assert towards[0, 2] < 0


def test_gradients_of_the_sigmoid_loss_are_those_of_finite_differences() -> None:
    inputs = [features(4, 0), features(4, 1), double(7.0), double(-3.0)]
    owners = torch.tensor([0, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda *given: sigmoid(*given, owners), [x.requires_grad_() for x in inputs])


@given(st.integers(1, 8), st.lists(st.integers(0, 3), min_size=8, max_size=8), st.permutations(range(8)))
def test_the_order_in_a_batch_is_nothing_to_either(count: int, numbers: list[int], order: list[int]) -> None:
    text, images, owners = features(count, 0), features(count, 1), torch.tensor(numbers[:count])
    places = [place for place in order if place < count]
    for loss in (
        lambda *pairs: contrastive(*pairs[:2], double(9.0), pairs[2]),
        lambda *pairs: sigmoid(*pairs[:2], double(9.0), double(-4.0), pairs[2]),
    ):
        assert_close(loss(text[places], images[places], owners[places]), loss(text, images, owners))


def test_without_a_pair_there_is_nothing_to_learn() -> None:
    text, images = (features(0, seed).requires_grad_() for seed in range(2))
    for loss in (
        contrastive(text, images, double(9.0), torch.arange(0)),
        sigmoid(text, images, double(9.0), double(-4.0), torch.arange(0)),
    ):
        assert loss.item() == 0
        loss.backward()


# ---- what is missed of a teacher


def test_nothing_is_missed_where_all_similarities_agree() -> None:
    """Also where the student has turned all features, or has them in more numbers."""
    read, seen = features(5, 0), features(5, 1)
    turned, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    assert_close(missed(read @ turned[:8], seen @ turned[:8], read, seen), double(0.0))
    assert missed(seen, read, read, seen).item() > 0.5, "the captions are no pictures"


def test_what_is_missed_by_hand() -> None:
    """A pair that a teacher has at right angles and a student in one place: 2 of 4 similarities are 1 and not 0."""
    axes, same = torch.eye(2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    assert_close(missed(same, same, axes[:1], axes[1:]), double(0.5 / 0.25))


def test_a_student_is_drawn_to_where_the_teacher_is() -> None:
    read, seen = features(6, 0), features(6, 1)
    text, images = (features(6, seed).requires_grad_() for seed in (2, 3))
    assert torch.autograd.gradcheck(lambda *given: missed(*given, read, seen), [text, images])
    lost = missed(text, images, read, seen)
    steps = torch.autograd.grad(lost, [text, images])
    moved = (normalize(rows - 0.1 * step, dim=1) for rows, step in zip((text, images), steps))
    assert missed(*moved, read, seen) < lost


# ---- drift


@pytest.mark.parametrize(("factor", "wanted"), [(1.0, 0.0), (2.0, 1.0), (0.0, 1.0), (-1.0, 4.0)])
def test_drift_counts_in_lengths_of_what_was(factor: float, wanted: float) -> None:
    frozen = 7 * features(6, 0).reshape(2, 3, 8)
    assert_close(drift(factor * frozen, frozen, torch.ones(2, 3, dtype=torch.bool)), double(wanted).expand(2))


def test_only_the_tokens_of_the_text_count_and_each_text_as_much() -> None:
    frozen = features(12, 0).reshape(3, 4, 8)
    states = frozen + 0.3 * features(12, 1).reshape(3, 4, 8)
    lengths = [1, 3, 4]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    wanted = [
        sum(float((states[n, i] - frozen[n, i]).norm() / frozen[n, i].norm()) ** 2 for i in range(length)) / length
        for n, length in enumerate(lengths)
    ]
    assert_close(drift(states, frozen, mask), torch.tensor(wanted, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: drift(x, frozen, mask), [states.requires_grad_()])
    (gradient,) = torch.autograd.grad(drift(states, frozen, mask).sum(), states)
    assert not gradient[~mask].any()
