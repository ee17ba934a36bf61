"""A painter that computes with OpenVINO, on a CPU.

U-Net and decoder are converted once and kept in a cache. They are kept for any size; as fixed shapes are what makes
OpenVINO fast, each process compiles them for the size that it draws, in about a second.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limner import artifacts
from limner.diffusion.guidance import is_folded
from limner.errors import ConfigError, ModelError
from limner.generation.jobs import Job, Spec
from limner.generation.painters import Alter, LatentDiffusion
from limner.generation.setup import Setup
from limner.models import export, loading, staged

Load = Callable[[Path, Sequence[Sequence[int]], int], "list[Compiled]"]
"""Compiles a file for inputs of certain shapes, to be called so many times at once."""

VERSION = 2  # of what is kept; higher when the same weights would be converted to something else
PROMPT, STEP, OUTERMOST, DECODER = "prompt.xml", "step.xml", "outermost.xml", "decoder.xml"
COMPILED = 4  # sizes of pictures that stay compiled
EXAMPLE = 16  # sides and tokens of what networks are traced with
ROOM = 16 * 2**30  # bytes of the cache, beyond which what was used least recently goes
HINTS = {"fp32": "f32", "bf16": "bf16"}


def cache() -> Path:
    """Where converted networks are kept: in $LIMNER_CACHE, or else in `limner` among the user's caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LIMNER_CACHE") or Path(caches) / "limner") / "openvino"


def make_room(folder: Path) -> None:
    """Remove of the cache what was used least recently and has no room any more; what is in `folder` stays."""
    left, others = ROOM, [other for other in folder.parent.iterdir() if other.is_dir() and other != folder]
    for model in (folder, *sorted(others, key=lambda other: other.stat().st_mtime, reverse=True)):
        left -= sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
        if left < 0 and model != folder:
            shutil.rmtree(model, ignore_errors=True)


class Step(nn.Module):
    """A step of a U-Net, with all inputs side by side."""

    def __init__(self, unet: staged.Staged) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timestep: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """latents (1, C, h, w), timestep (), the embedding of guidance (1, width) where that is an input, and keys and
        values -> as `Network.step`.
        """
        condition, prompt = _parted(self.unet, others)
        return self.unet.step(latents, timestep, prompt, condition)


class OutermostStep(Step):
    """The same where the blocks between are not computed."""

    def forward(self, latents: Tensor, timestep: Tensor, deep: Tensor, *others: Tensor) -> Tensor:  # type: ignore[override]
        """As `Step`, with `deep` and the keys and values of the outermost blocks alone -> what is predicted."""
        condition, prompt = _parted(self.unet, others)
        return self.unet.step(latents, timestep, prompt, condition, deep)[0]


def _parted(unet: staged.Staged, others: Sequence[Tensor]) -> tuple[Tensor | None, Sequence[Tensor]]:
    """Condition, and keys and values."""
    return (others[0], others[1:]) if is_folded(unet.unet) else (None, others)


class Prompt(nn.Module):
    """What a U-Net needs of a prompt."""

    def __init__(self, unet: staged.Staged) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        """(N, L, D) -> keys, values, keys, values, ..."""
        return tuple(self.unet.keys_and_values(states))


class Decoder(nn.Module):
    """A VAE's decoder."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, drawn: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, H, W)."""
        pixels: Tensor = self.vae.decode(drawn, return_dict=False)[0]
        return pixels


class Compiled:
    """A network that OpenVINO has compiled for certain shapes, for one caller at a time."""

    def __init__(self, compiled: Any, tensor: Any) -> None:
        self.request, self.tensor = compiled.create_infer_request(), tensor
        self.takes = len(compiled.inputs)
        self.shapes = [list(output.shape) for output in compiled.outputs]
        """Of what it gives."""
        self._given: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """All outputs. Inputs behind those that it takes are left alone, and one that is the same tensor as at the call
        before costs nothing.
        """
        self.begin(*inputs)
        return [output.clone() for output in self.end()]

    def begin(self, *inputs: Tensor) -> None:
        """Compute while the caller does something else."""
        for number, given in enumerate(inputs[: self.takes]):
            if number not in self._given or self._given[number][0] is not given:
                read = given.contiguous()  # which OpenVINO reads where it lies
                self._given[number] = given, read
                self.request.set_input_tensor(number, self.tensor(read.numpy(), shared_memory=True))
        self.request.start_async()

    def end(self) -> list[Tensor]:
        """All outputs of what was begun, where OpenVINO put them: until the next is begun."""
        self.request.wait()
        return [torch.from_numpy(output.data) for output in self.request.output_tensors]


class CompiledUNet:
    """A U-Net as `staged.Network`, of the files in a folder, for token states and latents of certain shapes.

    Both passes of guidance are computed at once, each by a part of the threads: they wait for each other once a step,
    where threads that share a layer do at each of some hundred.
    """

    def __init__(
        self, load: Load, folder: Path, states: Sequence[int], latents: Sequence[int], condition: int | None
    ) -> None:
        """`condition` is the width of the embedding of guidance, where that is an input."""
        self.load, self.folder = load, folder
        self.passes, *one = states
        self.given: list[Sequence[int]] = [latents, []]
        self.condition = [] if condition is None else [[1, condition]]
        [self.prompt] = load(folder / PROMPT, [[1, *one]], 1)
        self.whole = load(folder / STEP, [*self.given, *self.condition, *self.prompt.shapes], self.passes)

    def keys_and_values(self, states: Tensor) -> Sequence[Tensor]:
        """Those of the first pass, and then those of the second."""
        return [tensor for one in states.split(1) for tensor in self.prompt(one)]

    def step(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt: Sequence[Tensor],
        condition: Tensor | None = None,
        deep: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """As `Network` says."""
        given = [latents, timestep.float()]
        conditions = [] if condition is None else [condition]
        own = len(prompt) // self.passes
        networks = self.whole if deep is None else self.outermost
        for number, network in enumerate(networks):
            between = [] if deep is None else [deep[number]]
            network.begin(*given, *between, *conditions, *prompt[number * own : (number + 1) * own])
        predicted, *others = zip(*(network.end() for network in networks))
        return torch.cat(predicted), others[0] if deep is None else deep

    @functools.cached_property
    def outermost(self) -> list[Compiled]:
        """`OutermostStep`, which most drawings need not."""
        shapes = [*self.given, self.whole[0].shapes[1], *self.condition, *self.prompt.shapes]
        return self.load(self.folder / OUTERMOST, shapes, self.passes)


class Later:
    """A network that is read when more than its settings is wanted, which may be never."""

    def __init__(self, config: dict[str, Any], read: Callable[[], Any]) -> None:
        self.config, self.read = config, functools.cache(read)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.read(), name)


class DecodedByOpenVino(Later):
    """A VAE whose decoder is `Compiled`."""

    dtype = torch.float32

    def __init__(self, vae: Later, decoder: Compiled) -> None:
        super().__init__(vae.config, vae.read)
        self.decoder = decoder

    def decode(self, drawn: Tensor, return_dict: bool = False) -> list[Tensor]:
        """As Diffusers' VAE without `return_dict`. (1, C, h, w) -> (1, 3, H, W)."""
        assert not return_dict
        return self.decoder(drawn)


class OpenVinoDiffusion(LatentDiffusion):
    """A CLIP text encoder as torch runs it; a U-Net and a VAE's decoder as OpenVINO does."""

    def __init__(self, spec: Spec, setup: Setup, alter: Alter | None, identity: Callable[[], str]) -> None:
        """`identity` tells the model's weights and what is added to them. Raises as `LatentDiffusion`, and ConfigError
        where the processor can't compute in the precision.
        """
        self.openvino = export.import_openvino()
        self.core = self.openvino.Core()
        if setup.precision == "bf16" and "BF16" not in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ConfigError("OpenVINO computes in bf16 only on processors made for it; leave out --precision here.")
        self.precision, self.identity = setup.precision, identity
        self.compiled = functools.lru_cache(COMPILED)(self._compiled_anew)
        super().__init__(spec, setup, alter)

    def _read(self, name: str) -> Any:
        """The text encoder; the others are read where they are converted, or a picture is encoded."""
        if name == "text_encoder":
            return super()._read(name)
        config = loading.read_config(loading.component(self.ref, name) / "config.json")
        return Later(config, functools.partial(super()._read, name))

    def threads(self, job: Job) -> int:
        """All: OpenVINO shares a picture out well, and what it has compiled is for one caller at a time."""
        return torch.get_num_threads()

    def networks(self, job: Job, states: Tensor) -> tuple[Any, Any]:
        network, vae = self.compiled(tuple(states.shape), self._latent_shape(job))
        return staged.Passes(self.unet.config, network, job.reuse), vae

    def _compiled_anew(self, states: Sequence[int], shape: Sequence[int]) -> tuple[CompiledUNet, DecodedByOpenVino]:
        """U-Net and VAE for token states (1 or 2, L, D) and latents of `shape` (C, h, w)."""
        kept, decoder = self._kept_in("unet", self._convert_unet), self._kept_in("decoder", self._convert_decoder)
        unet = CompiledUNet(self._compile, kept, states, [1, *shape], self.unet.config.get("time_cond_proj_dim"))
        return unet, DecodedByOpenVino(self.vae, *self._compile(decoder / DECODER, [[1, *shape]], 1))

    def _compile(self, file: Path, shapes: Sequence[Sequence[int]], at_once: int) -> list[Compiled]:
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[self.precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": min(at_once, torch.get_num_threads()),
        }
        try:
            model = self.core.read_model(file)
        except RuntimeError:
            raise ModelError(f"{file} is not what was written there; delete {file.parent}.") from None
        model.reshape(dict(zip(model.inputs, map(list, shapes))))  # whose inputs may be fewer
        compiled = self.core.compile_model(model, "CPU", settings)
        return [Compiled(compiled, self.openvino.Tensor) for _ in range(at_once)]

    def _kept_in(self, name: str, fill: Callable[[Path], None]) -> Path:
        """The folder of that name in the cache, which `fill` fills where it is not there."""
        what = json.dumps([VERSION, self.openvino.__version__, self.identity(), self.unet.config, self.vae.config])
        model = cache() / hashlib.sha256(what.encode()).hexdigest()[:24]
        folder = model / name
        if not folder.is_dir():
            with artifacts.atomic_folder(folder) as partial:
                fill(partial)
            make_room(model)
        os.utime(model)
        return folder

    def _convert_unet(self, folder: Path) -> None:
        unet = super()._read("unet")  # and not `self.unet.read`, which would keep it
        if not staged.fits(unet.config):
            raise ModelError(f"The U-Net of {self.ref} is of a kind that is drawn with torch; leave out --engine.")
        taken_apart, config = staged.Staged(unet), unet.config
        states = torch.randn(1, EXAMPLE, config["cross_attention_dim"])
        latents = torch.randn(1, config["in_channels"], EXAMPLE, EXAMPLE)
        condition = [torch.randn(1, config["time_cond_proj_dim"])] if is_folded(unet) else []
        with torch.no_grad():
            prompt = taken_apart.keys_and_values(states)
            given = latents, torch.tensor(500.0)
            deep = taken_apart.step(*given, prompt, *condition)[1]
        self._convert(Prompt(taken_apart), [states], folder / PROMPT)
        self._convert(Step(taken_apart), [*given, *condition, *prompt], folder / STEP)
        read = prompt[: 2 * taken_apart.outermost]
        self._convert(OutermostStep(taken_apart), [*given, deep, *condition, *read], folder / OUTERMOST)

    def _convert_decoder(self, folder: Path) -> None:
        latents = torch.randn(1, self.vae.config["latent_channels"], EXAMPLE, EXAMPLE)
        self._convert(Decoder(self.vae.read()), [latents], folder / DECODER)

    def _convert(self, module: nn.Module, inputs: Sequence[Tensor], file: Path) -> None:
        with torch.no_grad(), export.silence():
            converted = self.openvino.convert_model(module.eval(), example_input=tuple(inputs))
            self.openvino.save_model(converted, file, compress_to_fp16=False)
