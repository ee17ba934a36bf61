"""A model's networks in another program's format: ONNX, or OpenVINO's own.

Shapes are fixed, since that is what makes those programs fast; weights stay in fp32, and the program that loads them
chooses the arithmetic.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limner.errors import ConfigError
from limner.models import loading
from limner.models import vae as vaes

Format = Literal["onnx", "openvino"]
NEEDED = {"onnx": ("onnx", "onnxscript"), "openvino": ("openvino",)}
SUFFIX = {"onnx": ".onnx", "openvino": ".xml"}


@dataclass(frozen=True)
class Network:
    """A network to export, with what it takes and gives."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    output: str


class _TextEncoder(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids)[0]
        return states


class _UNet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        predicted: Tensor = self.unet(latents, timestep, encoder_hidden_states=states, return_dict=False)[0]
        return predicted


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return vaes.decode(self.vae, latents)


def networks(ref: str, size: tuple[int, int], *, guided: bool) -> Iterator[Network]:
    """Text encoder, U-Net and VAE decoder of a model for pictures of `size`, width and height in pixels, one at a time.

    input_ids (1, L) -> states (1, L, D); latents (N, C, h, w), timestep (), states (N, L, D) -> predicted (N, C, h, w);
    latents (1, C, h, w) as the U-Net sees them -> pixels (1, 3, H, W). N is 2 where `guided`, else 1. Raises
    ModelError, and ConfigError for a U-Net with guidance as an input.
    """
    encoder, tokenizer = loading.load_text_encoder(ref)
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    ids = torch.full((1, length), tokenizer.eos_token_id)
    yield Network("text_encoder", _TextEncoder(encoder), {"input_ids": ids}, "states")
    del encoder
    unet = loading.load_unet(ref)
    if unet.config.get("time_cond_proj_dim") is not None:
        raise ConfigError(f"The U-Net of {ref} takes guidance as an input, which limner models export doesn't write.")
    vae = loading.load_vae(ref)
    width, height = (side // vaes.factor(vae.config) for side in size)
    torch.manual_seed(0)
    latents = torch.randn(2 if guided else 1, unet.config["in_channels"], height, width)
    states = torch.randn(len(latents), length, unet.config["cross_attention_dim"])
    inputs = {"latents": latents, "timestep": torch.tensor(500.0), "states": states}
    yield Network("unet", _UNet(unet), inputs, "predicted")
    del unet
    yield Network("vae_decoder", _Decoder(vae), {"latents": latents[:1]}, "pixels")


def require(to: Format) -> None:
    """Raise ConfigError where what writes the format, or draws with it, is not installed."""
    if missing := [name for name in NEEDED[to] if find_spec(name) is None]:
        raise ConfigError(f"{missing[0]} is not installed; install it with: pip install 'limner[{to}]'.")


def write(network: Network, to: Format, folder: Path) -> Path:
    """Write a network into a folder -> its file, with one more beside it for the weights."""
    file = folder / f"{network.name}{SUFFIX[to]}"
    arguments = tuple(network.inputs.values())
    with torch.no_grad(), silence():
        if to == "onnx":
            torch.onnx.export(
                network.module.eval(),
                arguments,
                file,
                input_names=list(network.inputs),
                output_names=[network.output],
                dynamo=True,
                external_data=True,
                verbose=False,
            )
        else:
            openvino = import_openvino()
            converted = openvino.convert_model(network.module.eval(), example_input=arguments)
            for port, (name, example) in zip(converted.inputs, network.inputs.items()):
                port.get_tensor().set_names({name})
                port.get_node().set_partial_shape(openvino.PartialShape(list(example.shape)))
            converted.outputs[0].get_tensor().set_names({network.output})
            converted.validate_nodes_and_infer_types()
            openvino.save_model(converted, file, compress_to_fp16=False)
    return file


def import_openvino() -> Any:
    """OpenVINO without what tells its makers of each import and conversion."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@contextmanager
def silence() -> Iterator[None]:
    """Keep tracers from warning of every shape that they make constant, which is what is wanted."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), loading.quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
