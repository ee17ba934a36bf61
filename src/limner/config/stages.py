"""Settings of the stages that train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from limner.config.base import FLAG, Argument, Flag, StageConfig

Format = Literal["png", "jpeg", "webp"]
Precision = Literal["auto", "fp32", "bf16"]
Engine = Literal["torch", "openvino"]
PILLOW_PIXELS = 178_956_970  # of the largest picture that Pillow opens
MOST_PICTURES = 100_000  # of one command, whose jobs are all in memory


class PrepareConfig(StageConfig):
    """From a source archive or folder to a dataset folder."""

    kind: Annotated[Literal["flickr8k", "imagefolder", "webdataset"], Argument()]
    """What the source is: flickr8k (any of its three layouts), imagefolder, or webdataset."""
    source: Annotated[Path, FLAG]
    """The archive, or the folder that holds the archives or the extracted files."""
    size: Annotated[PositiveInt | None, FLAG] = None
    """Shrink pictures whose shorter side is above this many pixels; without it they keep their size."""
    drop_duplicates: Annotated[bool, FLAG] = False
    """Leave out pictures whose file or pixels equal an earlier one's; otherwise they are only reported."""
    uncaptioned: Annotated[bool, FLAG] = False
    """Keep pictures that have no caption (for `train vae`); otherwise they are quarantined."""
    keep_alpha: Annotated[bool, FLAG] = False
    """Keep what is see-through as a mask, in PNG: `train unet` then learns from what is opaque. Otherwise see-through
    parts become white."""
    val_share: Annotated[float, FLAG, Field(ge=0, lt=1)] = 0.1
    """Share of the pictures for val where the source has no split lists."""
    test_share: Annotated[float, FLAG, Field(ge=0, lt=1)] = 0.1
    """Share of the pictures for test where the source has no split lists."""
    seed: int = 0
    """Seed of the split where the source has no split lists."""
    min_side: PositiveInt = 16
    """Pictures with a side below this many pixels are quarantined."""
    max_pixels: int = Field(default=100_000_000, gt=0, le=PILLOW_PIXELS)
    """Pictures whose header announces more pixels than this are quarantined undecoded; Pillow's own limit is the most
    that it may be."""
    workers: Annotated[PositiveInt | None, FLAG] = None
    """Processes that decode; the number of cores when left out."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.val_share + self.test_share >= 1:
            raise ValueError("val_share and test_share leave nothing to train on; lower one")
        return self


class EncodeConfig(StageConfig):
    """Store what the U-Net trains on: VAE moments of every picture, token states of every caption."""

    changeable: ClassVar[frozenset[str]] = frozenset({"batch_size", "threads", "data", "vae", "clip", "features"})

    data: Annotated[Path, FLAG]
    """The dataset folder."""
    vae: Annotated[str, FLAG]
    """The VAE: a `train vae` run, a model folder, a hub id or `builtin`."""
    clip: Annotated[str, FLAG]
    """The text encoder: a `train clip` run, a model folder, a hub id or `builtin`."""
    size: Annotated[PositiveInt, FLAG] = 128
    """Side of the pictures in pixels."""
    flips: Annotated[bool, FLAG] = True
    """Store each picture mirrored too."""
    views: PositiveInt = 1
    """Parts stored of each train picture: the centre, then random crops; of a val picture it is the centre alone."""
    min_scale: float = Field(default=0.5, gt=0, le=1)
    """Smallest share of the picture that a random crop takes."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random crops."""
    features: str | None = None
    """A CLIP whose image tower looks at each view of the train pictures too, for `align_weight` of `train unet`."""
    buckets: bool = False
    """Store each picture in the shape nearest to its own, of about as many pixels as the square, instead of as a
    square."""
    bucket_step: PositiveInt = 32
    """Sides of `buckets` are multiples of this, in pixels: best the VAE's factor times what the U-Net halves (64 for
    Stable Diffusion)."""
    batch_size: PositiveInt = 32
    """Views of pictures, or captions, a step."""
    threads: PositiveInt | None = None
    """Threads of the arithmetic on CPU; torch's choice when left out."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.buckets and self.size % self.bucket_step:
            raise ValueError(f"size {self.size} is not divisible by bucket_step {self.bucket_step}; choose a multiple")
        return self


class AssembleConfig(StageConfig):
    """Join a text encoder, a VAE and a U-Net to a model that any Diffusers program loads."""

    out: Annotated[Path, FLAG]
    """The model folder to write."""
    clip: Annotated[str, FLAG]
    """The CLIP: a `train clip` run, a model folder, a hub id or `builtin`."""
    vae: Annotated[str, FLAG]
    """The VAE: a `train vae` run, a model folder, a hub id or `builtin`."""
    unet: Annotated[str, FLAG]
    """The U-Net with its scheduler: a `train unet` run, a model folder, a hub id or `builtin`."""
    precision: Annotated[Literal["fp32", "bf16", "fp16"], FLAG] = "fp32"
    """How weights are stored; the built-in model uses bf16."""
    steps: PositiveInt = 25
    """Steps that `generate` takes with this model when none are asked for."""
    guidance: float = Field(default=7.5, ge=1)
    """Guidance that `generate` uses with this model when none is asked for."""
    card: Path | None = None
    """Markdown for MODEL_CARD.md, of what only you know: purpose, data, licence, limits; the facts are added."""
    grid: bool = True
    """Draw the same captions with the CLIP before and after tuning, where it was tuned; kept as grid.png."""


class GenerateConfig(StageConfig):
    """Draw pictures for prompts."""

    prompts: Annotated[tuple[str, ...], Argument()] = ()
    """What to draw; several prompts draw several pictures. Read from standard input when it is piped. (word:1.3) counts
    more, [word] less, and of {dog|cat} each picture has one."""
    prompts_file: Annotated[Path | None, Flag(("--prompts",))] = None
    """File with one prompt a line."""
    n: Annotated[int, Flag(("-n",)), Field(ge=1, le=MOST_PICTURES)] = 1
    """Pictures a prompt; picture i has the seed `seed + i`."""
    seed: Annotated[int, FLAG, Field(ge=0, lt=2**63)] = 0
    """Seed of the first picture; the same seed draws the same picture, whatever the batch."""
    steps: Annotated[int | None, FLAG, Field(gt=0, le=1000)] = None
    """Denoising steps; the model's own default when left out."""
    guidance: Annotated[float | None, FLAG, Field(ge=1, le=100)] = None
    """How strongly the prompt is followed; 1 is off; the model's own default when left out."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """Share of guidance's contrast that is taken back, against overexposure; 0.7 is usual."""
    reuse: PositiveInt = 1
    """Compute the inner blocks of the U-Net at each so many steps alone, as DeepCache does: 2 is faster and a little
    less faithful."""
    scheduler: Annotated[str | None, FLAG] = None
    """euler, euler_a, heun, dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, unipc, deis, ddim, ddpm, pndm, lms, dpm2, dpm2_a or lcm;
    some also with _karras; the model's own when left out."""
    negative: Annotated[str, FLAG] = ""
    """What the pictures should not show."""
    size: Annotated[str | None, FLAG] = None
    """Pixels as SIDE or WIDTHxHEIGHT; the model's own when left out."""
    image: Annotated[Path | None, FLAG] = None
    """Picture to begin with, of which `strength` makes something new."""
    mask: Annotated[Path | None, FLAG] = None
    """Picture that is white where `image` is redrawn and black where it stays."""
    strength: Annotated[float | None, FLAG, Field(gt=0, le=1)] = None
    """Share of the steps that are taken from `image`; 0.6 when left out, 1 with a mask."""
    variation: Annotated[str | None, FLAG] = None
    """SEED:STRENGTH: turn the noise of `seed` towards that seed's, 0 not at all, 1 all the way; with `n`, that seed
    rises in place of the first."""
    best_of: Annotated[int | None, FLAG, Field(ge=1, le=MOST_PICTURES)] = None
    """Draw so many a prompt and keep the `n` that fit it best, as the model's own CLIP sees it."""
    grid: Annotated[str | None, FLAG] = None
    """Draw with each of several values of a setting or two, as "steps=4,8 guidance=1,3", and show all on a grid."""
    sheet: Annotated[bool, FLAG] = False
    """Put all pictures of the command on one more, a contact sheet."""
    model: Annotated[str, FLAG] = "builtin"
    """`builtin`, a Diffusers folder or a hub id."""
    loras: Annotated[tuple[str, ...], Flag(("--lora",))] = ()
    """LoRA to draw with, a safetensors file or a `train lora` run, as FILE or FILE:WEIGHT; may be repeated."""
    embeddings: Annotated[tuple[str, ...], Flag(("--embedding",))] = ()
    """Textual inversion to draw with, a safetensors file, as FILE or FILE:TOKEN; may be repeated."""
    out: Annotated[Path, FLAG] = Path("pictures")
    """Folder for the pictures."""
    format: Annotated[Format, FLAG] = "png"
    """Kind of file: png, jpeg or webp; each says how the picture was drawn."""
    quality: int = Field(default=95, ge=1, le=100)
    """How faithful JPEG and WebP are to the pixels."""
    preview: Annotated[Path | None, FLAG] = None
    """PNG file that shows the picture while it is drawn, for a viewer that looks again when it changes."""
    show: Annotated[bool, FLAG] = False
    """Show the pictures in the terminal."""
    device: Annotated[str | None, FLAG] = None
    """`cpu` or `cuda`; the GPU when there is one."""
    precision: Annotated[Precision, FLAG] = "auto"
    """Arithmetic: fp32, bf16, or auto, which is bf16 where the processor or GPU is faster in it."""
    engine: Annotated[Engine, FLAG] = "torch"
    """What computes: torch, or openvino, about twice as fast on a CPU; its first picture with a model takes longer."""
    low_memory: Annotated[bool, FLAG] = False
    """Keep only that network in memory which is in use, in bf16, and decode pictures above 512 pixels in tiles."""
    batch_size: PositiveInt = 8
    """Pictures drawn at once; changes speed and memory, not the pictures."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.grid is not None and self.best_of is not None:
            raise ValueError("a grid shows every picture and best_of keeps some; leave one out")
        return self


class ReplayConfig(StageConfig):
    """Draw a picture again from what its file says, and tell whether the pixels are the same."""

    image: Annotated[Path, Argument()]
    """The picture, PNG, JPEG or WebP, drawn by Limner."""
    model: Annotated[str | None, FLAG] = None
    """Where the model is now; where it was then when left out."""
    out: Annotated[Path, FLAG] = Path("replayed")
    """Folder for the new picture where it differs."""
    device: Annotated[str | None, FLAG] = None
    """`cpu` or `cuda`; the GPU when there is one."""


class EvaluateConfig(StageConfig):
    """Score models by the pictures that they draw for captions, beside the photographs.

    Writes metrics.json, report.html and the pictures.
    """

    models: Annotated[tuple[str, ...], Argument()] = ()
    """The models: `builtin`, a Diffusers folder or a hub id; several are compared on the same captions and noise."""
    images: Annotated[tuple[Path, ...], FLAG] = ()
    """Folder of pictures that something else drew; may be repeated. A metadata.jsonl in it gives their captions, or
    their names do, which are then those of the photographs."""
    data: Annotated[Path, FLAG]
    """The dataset folder."""
    out: Annotated[Path, FLAG]
    """The folder to write; pictures that lie there already are kept where they would be drawn the same."""
    split: Annotated[Literal["val", "test"], FLAG] = "test"
    """Whose captions are drawn: choose by val, report by test."""
    n: Annotated[int | None, Flag(("-n", "--n")), Field(ge=4)] = None
    """Pictures to draw, for the first captions of the split's first photographs; one a photograph when left out."""
    judge: Annotated[str | None, FLAG] = None
    """What scores the pictures: a folder of recipes/judge.py, or any CLIP that no model reads its prompts with."""
    steps: Annotated[tuple[int, ...], FLAG] = ()
    """Denoising steps; given several times, each model draws with each, and a plot compares them. The model's own when
    left out."""
    guidance: Annotated[tuple[float, ...], FLAG] = ()
    """Guidance, likewise."""
    checkpoints: Annotated[bool, FLAG] = False
    """Take the one model for a `train unet` run and draw with each of its checkpoints: a plot shows the figures against
    the images seen."""
    seed: Annotated[int, FLAG, Field(ge=0, lt=2**62)] = 0
    """Seed of the first picture; picture i has the seed `seed + i`."""
    device: Annotated[str | None, FLAG] = None
    """`cpu` or `cuda`; the GPU when there is one."""
    engine: Annotated[Engine, FLAG] = "torch"
    """What draws: torch, or openvino, about twice as fast on a CPU."""
    x: tuple[float, ...] = ()
    """What the models differ in, one number a model, such as their share alpha or the images they have seen: a plot
    shows the figures against it."""
    x_name: str = "x"
    """What `x` counts."""
    allow_conditioning_judge: bool = False
    """Let a model be judged by the CLIP that it reads its prompts with; the report marks it, as it flatters."""
    extractors: tuple[str, ...] = ()
    """Further networks by whose features fidelity is measured: clip:REF, judge:FOLDER, transformers:REF, inception."""
    copies: bool = True
    """Look for the nearest training photographs, for which all of them must be seen once."""
    attribute_seeds: int = Field(default=4, ge=0)
    """Pictures of each prompt of the prompt-sensitivity test; 0 leaves it out."""
    cache: Path | None = None
    """Folder for what networks see in pictures, to be shared by evaluations; `features` within --out when left out."""
    batch_size: PositiveInt = 16
    """Pictures drawn or looked at at once; changes speed and memory, not the figures."""
    threads: PositiveInt | None = None
    """Threads of the arithmetic on CPU; torch's choice when left out."""

    @model_validator(mode="after")
    def _something_to_judge(self) -> Self:
        if not self.models and not self.images:
            raise ValueError("There is nothing to score; name a model behind limner evaluate, or a folder as --images")
        if self.checkpoints and (len(self.models) != 1 or self.x):
            raise ValueError("checkpoints are those of one training; name its run alone, without x")
        if self.x and len(self.x) != len(self.models):
            raise ValueError(f"x has {len(self.x)} numbers for {len(self.models)} models; give one a model")
        return self
