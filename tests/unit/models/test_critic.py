"""A critic and what it judges learn from one sum of losses, each from its own part alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from limner.models.critic import Critic, contest, turned


def test_the_losses_are_those_of_the_papers() -> None:
    critic = nn.Conv2d(3, 1, 1, bias=False)
    critic.weight.data.fill_(1 / 3)  # its judgement is the grey value
    real, drawn = torch.full((2, 3, 4, 4), 0.25), torch.full((2, 3, 4, 4), -0.5)
    learned, fooled = contest(critic, real, drawn)
    assert learned.item() == pytest.approx((1 - 0.25) + (1 - 0.5))
    assert fooled.item() == pytest.approx(torch.tensor(0.5).exp().log1p().item())
    sure = contest(critic, 4 * torch.ones_like(real), -4 * torch.ones_like(drawn))[0]
    assert sure.item() == 0, "past the margins there is nothing to learn"


def test_each_side_is_moved_by_its_own_loss_alone() -> None:
    torch.manual_seed(0)
    critic = Critic((8, 16))
    real, drawn = torch.randn(2, 2, 3, 16, 16)
    drawn.requires_grad_()
    learned, fooled = contest(critic, real, drawn)
    own = torch.autograd.grad(learned, list(critic.parameters()), retain_graph=True)
    pull = torch.autograd.grad(fooled, drawn, retain_graph=True)[0]
    (learned + fooled).backward()
    assert drawn.grad is not None
    assert pull.abs().max() > 0
    assert torch.equal(drawn.grad, pull)
    for parameter, gradient in zip(critic.parameters(), own, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    better = contest(critic, real, drawn.detach() - 0.1 * pull / pull.abs().max())[1]
    assert better < fooled


@pytest.mark.parametrize("side", [4, 16, 24, 64])
def test_a_critic_judges_patches_of_eight_pixels(side: int) -> None:
    assert Critic()(torch.zeros(2, 3, side, side)).shape == (2, 1, -(-side // 8), -(-side // 8))


def test_turning_is_by_quarters_image_by_image() -> None:
    x = torch.arange(4 * 2 * 3 * 3).float().reshape(4, 2, 3, 3)
    found = turned(x, torch.tensor([0, 1, 2, 3]))
    assert_close(found[0], x[0])
    assert_close(found[1], x[1].transpose(1, 2).flip(1))
    assert_close(found[2], x[2].flip(1, 2))
    assert_close(found[3], x[3].transpose(1, 2).flip(2))
    assert turned(x, torch.zeros(4, dtype=torch.long)) is x
