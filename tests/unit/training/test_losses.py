"""The contrastive loss: CLIP's own where pictures are distinct, and no push between captions of one picture."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from limner.training.losses import contrastive
from tiny import CAPTIONS, tiny_clip, tiny_tokenizer


def features(count: int, seed: int) -> Tensor:
    """Unit-length features (count, 8) in double precision, for checks of gradients."""
    drawn = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(drawn, dim=1)


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
