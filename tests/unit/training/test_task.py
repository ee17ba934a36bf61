"""One step: the gradient in parts is that of the whole, and recomputed activations give the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from limner.config import TrainClipConfig, TrainConfig
from limner.errors import ConfigError
from limner.models import kernels
from limner.models import vae as vaes
from limner.training import optimizers, processes
from limner.training.lanes import Lanes
from limner.training.task import place, recompute, step
from tiny import VOCABULARY, WIDTH, tiny_clip, tiny_unet, tiny_vae
from trainings import Summing, config


class Noting(Summing):
    """Without dropout; notes how many images each call of its loss had."""

    dropout = 0.0

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.sizes: list[int] = []

    def loss(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.sizes.append(len(batch["x"]))
        error = network(batch["x"]) - batch["y"]
        return error.square().mean(), {"error": error.mean()}


def stepped(given: TrainConfig, images: int) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
    """Figures, weights and sizes after a step with so many images."""
    torch.manual_seed(0)
    task, accelerator = Noting(given), processes.join(None)
    place(task.network, accelerator)
    optimizer = optimizers.new(task.network, given, {})
    batch = next(task.stream.batches(0, images, images))
    figures = step(
        task, Lanes(task.network), optimizer, batch, rate=0.01, seed=0, config=given, accelerator=accelerator
    )
    return figures, list(task.network.parameters()), task.sizes


@settings(max_examples=15)
@given(st.integers(1, 12), st.integers(1, 12))
def test_a_batch_in_parts_makes_the_step_of_the_whole(images: int, micro: int) -> None:
    """Parts of different sizes too; all figures are means over images."""
    whole = config(TrainConfig, Path("nowhere"), Path("r"), clip_norm=1e9)
    figures, weights, sizes = stepped(whole, images)
    in_parts, other, noted = stepped(whole.model_copy(update={"micro_batch_size": micro}), images)
    assert (sizes, sum(noted), max(noted)) == ([images], images, min(micro, images))
    assert list(figures) == list(in_parts) == ["gradient", "loss", "error"]
    for name, value in figures.items():
        assert_close(in_parts[name], value, rtol=1e-5, atol=1e-6)
    for one, two in zip(weights, other, strict=True):
        assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_contrastive_loss_is_not_taken_in_parts() -> None:
    with pytest.raises(ConfigError, match="no mean over images; set chunk_size in place of micro_batch_size"):
        config(TrainClipConfig, Path("nowhere"), Path("r"), micro_batch_size=4)


def test_a_network_on_a_cpu_is_placed_with_the_layers_that_learn_faster_there() -> None:
    network = tiny_unet()
    place(network, processes.join(None))
    kinds = {type(layer) for layer in network.modules()}
    assert {kernels.GroupNorm, kernels.Convolution} <= kinds
    assert not {nn.GroupNorm, nn.Conv2d} & kinds


# ---- recomputed activations


def unet_answer(network: nn.Module) -> Tensor:
    """A number that depends on all weights of a U-Net."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 7, WIDTH, generator=generator)
    found: Tensor = network(latents, torch.tensor([3.0, 700.0]), encoder_hidden_states=states, return_dict=False)[0]
    return found.square().mean()


def vae_answer(network: nn.Module) -> Tensor:
    """The same for a VAE."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    moments = vaes.encode(network, pixels)
    again: Any = network.decode(moments.chunk(2, dim=1)[0], return_dict=False)[0]  # type: ignore[operator]
    return (again - pixels).square().mean() + moments.square().mean()


def clip_answer(network: nn.Module) -> Tensor:
    """The same for a CLIP."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    ids = torch.randint(0, VOCABULARY - 2, (2, 9), generator=generator)
    ids[:, -1] = VOCABULARY - 1
    found: Tensor = network(input_ids=ids, pixel_values=pixels).logits_per_image
    return found.square().mean()


@pytest.mark.parametrize(
    ("make", "answer"),
    [(tiny_unet, unet_answer), (tiny_vae, vae_answer), (tiny_clip, clip_answer)],
    ids=["unet", "vae", "clip"],
)
def test_recomputed_activations_give_the_same_gradients_and_fewer_are_kept(make: Any, answer: Any) -> None:
    found = []
    for again in (False, True):
        network = nn.Sequential(make()).train()  # within another module, as the stages have it
        if again:
            recompute(network)
        kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = answer(network[0])
        loss.backward()
        found.append((loss.detach(), [p.grad for p in network.parameters()], kept))
    assert torch.equal(found[0][0], found[1][0])
    assert sum(gradient is not None for gradient in found[0][1]) > 20
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert_close(one, two, rtol=1e-6, atol=1e-9)
    assert found[1][2] < 0.7 * found[0][2]


def test_what_can_not_recompute_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave out checkpointing"):
        recompute(nn.Sequential(nn.Linear(2, 2)))
