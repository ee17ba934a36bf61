"""Settings of the trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from limner.config.base import FLAG, StageConfig

Tracker = Literal[
    "tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"
]  # of Accelerate, by their packages' names


class TrainConfig(StageConfig):
    """What every training shares; lengths are counted in images seen, so that the batch size does not change them."""

    changeable: ClassVar[frozenset[str]] = frozenset(
        # Where data and model lie is no part of the result; their sha256 are compared instead
        {"workers", "threads", "checkpoint_every", "keep_checkpoints", "log_every", "images", "data", "model"}
        # These change it by rounding alone, so that a run that ran out of memory can go on
        | {"micro_batch_size", "checkpointing", "trackers"}
    )

    data: Annotated[Path, FLAG]
    """The dataset folder."""
    model: Annotated[str | None, FLAG] = None
    """Start from this model (`builtin`, a folder or a hub id) instead of a new one of the size set here."""
    images: Annotated[PositiveInt, FLAG] = 100_000
    """Images to train on in all; a finished run goes on when this is raised."""
    batch_size: Annotated[PositiveInt, FLAG] = 32
    """Images a step, over all processes."""
    micro_batch_size: PositiveInt | None = None
    """Images that a process holds activations of at once, all when left out; the gradient is the whole batch's."""
    checkpointing: bool = False
    """Keep few activations and compute the others again for the gradient: less memory, about a third more time."""
    auto: Annotated[bool, FLAG] = False
    """First find batch size and learning rate, or the one not given, for this machine; config.json keeps them."""
    optimizer: Literal["adamw", "muon", "schedule-free", "adamw-8bit"] = "adamw"
    """AdamW; Muon for layers' matrices and AdamW for the rest, at the same `lr`; schedule-free AdamW, in place of
    `schedule` and `ema_halflife`; or AdamW with a state of 8 bits (CUDA and bitsandbytes)."""
    lr: Annotated[PositiveFloat, FLAG] = 1e-4
    """Peak learning rate of AdamW: it rises over `warmup` and then follows `schedule`."""
    schedule: Literal["cooldown", "cosine", "constant"] = "cooldown"
    """After `warmup` the rate stays, and falls in a line over the last 30 %; falls along half a cosine; or stays."""
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the peak learning rate that is left at the end, where `schedule` lets it fall."""
    warmup: int = Field(default=2_000, ge=0)
    """Images over which the learning rate rises."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay, on matrices and kernels only."""
    clip_norm: PositiveFloat = 1.0
    """Gradients longer than this are scaled down to it."""
    ema_halflife: float = Field(default=2_000, ge=0)
    """Half-life, in images, of the weight average that is saved as the result; 0 saves the last weights."""
    seed: Annotated[int, FLAG, Field(ge=0, lt=2**63)] = 0
    """Seed of weights, order, augmentation, noise and noise levels."""
    precision: Annotated[Literal["fp32", "bf16"], FLAG] = "fp32"
    """Arithmetic of the networks; master weights are always fp32."""
    compile: bool = False
    """Compile the networks with torch.compile; pays after some minutes."""
    workers: PositiveInt = 1
    """Processes that load the data."""
    threads: PositiveInt | None = None
    """Threads of the arithmetic on CPU; torch's choice when left out."""
    log_every: PositiveInt = 1_000
    """Images between two lines of the log."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where figures go beside `events.jsonl`; each needs its package, set up as that says (variables, a login)."""
    validate_every: PositiveInt = 20_000
    """Images between validations, each with samples."""
    checkpoint_every: PositiveInt = 20_000
    """Images between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep; the best one is kept besides."""
    result: Literal["last", "best"] = "last"
    """Which weights become the result: the last, or those of the best validation."""
    patience: PositiveInt | None = None
    """Validations in a row without a new best after which the training ends; without it, it goes to its end."""

    @model_validator(mode="before")
    @classmethod
    def _schedule_free(cls, values: Any) -> Any:
        """What schedule-free AdamW takes the place of is off unless somebody sets it."""
        if isinstance(values, dict) and values.get("optimizer") == "schedule-free":
            return {"schedule": "constant", "ema_halflife": 0, **values}
        return values

    @model_validator(mode="after")
    def _one_average(self) -> Self:
        if self.optimizer == "schedule-free" and (self.schedule != "constant" or self.ema_halflife):
            raise ValueError(
                "optimizer=schedule-free takes the place of schedule and ema_halflife; set schedule=constant and "
                "ema_halflife=0"
            )
        return self

    @property
    def held(self) -> int:
        """Images that a process holds activations of at once, where all of the batch is its share."""
        return min(self.micro_batch_size or self.batch_size, self.batch_size)

    @property
    def counted(self) -> str:
        """The figure of a validation that tells the best: the least of it."""
        return "loss"


class TrainVaeConfig(TrainConfig):
    """Train the autoencoder that turns pixels into latents and back."""

    size: Annotated[PositiveInt, FLAG] = 128
    """Side of the training pictures in pixels."""
    tune: Annotated[Literal["full", "decoder"], FLAG] = "full"
    """What is trained: all, or what makes pixels of latents alone, so that a U-Net still fits."""
    channels: tuple[PositiveInt, ...] = Field(default=(16, 32, 64, 96), min_length=1)
    """Channels at each resolution of a new VAE; each but the last halves the side."""
    layers: PositiveInt = 1
    """Residual blocks at each resolution of a new VAE."""
    latent_channels: PositiveInt = 4
    """Channels of the latents of a new VAE."""
    lr: Annotated[PositiveFloat, FLAG] = 1e-3
    """Peak learning rate of AdamW: it rises over `warmup` and then follows `schedule`."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """Weight of the divergence of the moments from a unit Gaussian, in nats an element."""
    l2_weight: float = Field(default=1.0, ge=0)
    """Weight of the mean squared error beside the mean absolute error."""
    perceptual_weight: float = Field(default=0.1, ge=0)
    """Weight of the distance of EfficientNet-Lite0 features (needs its two packages); 0 turns it off."""
    weave_weight: float = Field(default=0.0, ge=0)
    """Weight of a pattern that reconstructions repeat from latent to latent, as a perceptual distance makes them."""
    adversarial_weight: float = Field(default=0.0, ge=0)
    """Weight of what a patch discriminator, trained beside, says: to sharpen a VAE that is trained already."""
    equivariance: float = Field(default=0.0, ge=0, le=1)
    """Share of the pictures that are to come back turned or smaller from latents turned or shrunk (EQ-VAE)."""

    @model_validator(mode="after")
    def _sharpens(self) -> Self:
        if self.model is None and (self.adversarial_weight or self.tune == "decoder"):
            raise ValueError("tune=decoder and adversarial_weight need a VAE that is trained: name it as model")
        return self


class TrainClipConfig(TrainConfig):
    """Fine-tune CLIP, or train a new one, so that captions and photographs of the same thing lie close together."""

    changeable: ClassVar[frozenset[str]] = TrainConfig.changeable | {
        *("labelled", "sweep_alpha", "min_cosine", "unet"),  # of the report, which is then written anew
        *("teacher", "extra", "extra_captions", "chunk_size"),  # where they lie, and rounding; see above
    }

    lr: Annotated[PositiveFloat, FLAG] = 1e-5
    """Peak learning rate of AdamW: it rises over `warmup` and then follows `schedule`."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's weight decay, on matrices and kernels only."""
    batch_size: Annotated[PositiveInt, FLAG] = 128
    """Images a step, over all processes; the other images of the batch are the negatives."""
    chunk_size: PositiveInt | None = None
    """Images that a process holds activations of at once: gradient caching, for batches far beyond memory."""
    loss: Literal["infonce", "sigmoid"] = "infonce"
    """Contrast each pair with the batch, or judge each alone (SigLIP's); an image's captions are no negatives."""
    tune: Annotated[Literal["full", "lora", "adapter"], FLAG] = "full"
    """What is trained: all weights, low-rank additions to them, or a linear map on the frozen token states alone."""
    lock: Annotated[Literal["image", "text"] | None, FLAG] = None
    """A tower whose weights stay as they are."""
    lora_rank: PositiveInt = 16
    """Rank of the additions of `tune=lora`."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer learns at this share of the rate of the layer above it; 1 is off."""
    vocabulary: PositiveInt = 4096
    """Entries of a new tokenizer, trained on the captions of the train split."""
    size: PositiveInt = 128
    """Side of the pictures that a new image tower reads, in pixels."""
    patch: PositiveInt = 16
    """Side of a patch of a new image tower, in pixels."""
    width: PositiveInt = 256
    """Width of a new text tower and a new image tower."""
    layers: PositiveInt = 4
    """Layers of each new tower."""
    heads: PositiveInt = 4
    """Attention heads of each new tower."""
    features: PositiveInt = 256
    """Length of the text and image features of a new CLIP."""
    min_scale: float = Field(default=0.5, gt=0, le=1)
    """Smallest share of the picture that a random crop takes."""
    flips: bool = True
    """Mirror half of the pictures, but none whose text speaks of left or right."""
    colour: float = Field(default=0.0, ge=0, lt=1)
    """Most by which brightness, contrast and saturation of a picture are changed, as a share."""
    join: float = Field(default=0.0, ge=0, le=1)
    """Share of the examples whose text is several of the image's captions, as many as are read whole."""
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each image's patches that CLIP's image tower is not shown in training: about as much time is saved."""
    drift_weight: float = Field(default=0.0, ge=0)
    """Weight of the penalty that holds token states near those of the text tower that the training began with."""
    teacher: Annotated[str | None, FLAG] = None
    """Learn beside the pairs where this CLIP, or a folder of recipes/judge.py, puts pictures and captions."""
    teacher_weight: PositiveFloat = 1.0
    """Weight of what is missed of the teacher's features."""
    extra: Path | None = None
    """Dataset folder of further train pictures, which half of the examples show, without captions, for the teacher."""
    extra_captions: Path | None = None
    """Text file of further captions, one a line, of which those examples show the teacher one."""
    result: Literal["last", "best"] = "best"
    """Which weights become the result: the last, or those of the best validation."""
    labelled: Path | None = None
    """Folder with one folder of pictures a class, whose zero-shot accuracy shows what is forgotten."""
    sweep_alpha: Annotated[bool, FLAG] = False
    """At the end, mix the weights of `model` and the tuned ones in eleven shares, measure each, and keep the best."""
    min_cosine: float = Field(default=0.9, ge=-1, le=1)
    """Least mean cosine to the token states of `model` that a mix must keep to be chosen by `sweep_alpha`."""
    unet: str | None = None
    """Model whose VAE and U-Net draw pictures for each mix of `sweep_alpha`."""

    @property
    def held(self) -> int:
        """Images that a process holds activations of at once, where all of the batch is its share."""
        return min(self.chunk_size or self.batch_size, self.batch_size)

    @model_validator(mode="after")
    def _taught(self) -> Self:
        for name in ("extra", "extra_captions"):
            if getattr(self, name) and self.teacher is None:
                raise ValueError(f"{name} shows what has no pair, of which a teacher must speak; name one with teacher")
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.micro_batch_size is not None:
            raise ValueError("a contrastive loss is no mean over images; set chunk_size in place of micro_batch_size")
        if self.model is None:
            for name in ("sweep_alpha", "drift_weight"):
                if getattr(self, name):
                    raise ValueError(f"{name} compares with the CLIP that the training begins with; name it with model")
            if self.tune != "full" or self.lock:
                raise ValueError("a new CLIP has nothing to keep yet; use tune=full without lock, or name a model")
        if self.tune == "adapter" and (self.lock or self.sweep_alpha or self.drift_weight):
            raise ValueError(
                "tune=adapter leaves both towers as they are; leave out lock, sweep_alpha and drift_weight"
            )
        if self.lock == "text" and self.drift_weight:
            raise ValueError("a locked text tower can't drift; leave out lock=text or drift_weight")
        if self.unet is not None and not self.sweep_alpha:
            raise ValueError("unet is only for the pictures of sweep_alpha; set that too")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is not divisible by patch {self.patch}; choose a multiple")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}; choose a multiple")
        return self


class TrainUnetConfig(TrainConfig):
    """Train the U-Net that turns noise into latents under the token states of a caption."""

    data: Annotated[Path, FLAG]
    """The run folder of `limner encode`."""
    lr: Annotated[PositiveFloat, FLAG] = 5e-4
    """Peak learning rate of AdamW: it rises over `warmup` and then follows `schedule`."""
    batch_size: Annotated[PositiveInt, FLAG] = 64
    """Images a step, over all processes."""
    objective: Annotated[Literal["flow", "eps", "v"], FLAG] = "flow"
    """What a new U-Net predicts; one that is given keeps its own."""
    levels: Literal["logit-normal", "uniform", "cosine"] | None = None
    """Distribution of the noise levels in training; when left out logit-normal for flow, and uniform for eps and v."""
    tune: Annotated[Literal["full", "attention", "cross_attention_kv"], FLAG] = "full"
    """What of a given U-Net is trained: all; attention; or keys and values of cross-attention alone, which read the
    token states and so get it used to a tuned CLIP."""
    min_snr: PositiveFloat | None = None
    """Gamma of min-SNR weighting, 5 in its paper, so that low noise levels count less; all count the same without."""
    zero_terminal_snr: bool = False
    """Train and sample from pure noise, so that pictures may be dark or bright all over; for U-Nets that predict v."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Deviation of a constant added to each channel's noise, for dark and bright pictures with eps; often 0.1."""
    align_weight: float = Field(default=0.0, ge=0)
    """Weight of asking the middle block what an image encoder sees, which speeds up the beginning of a training; the
    cache must hold `features`. Go on without it (`model`) where it no longer helps."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of the images that are trained without their caption, which guidance needs."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the activations that is left out at random in each residual and attention block, against overfitting."""
    ema_halflife: float = Field(default=10_000, ge=0)
    """Half-life, in images, of the weight average that is saved as the result; 0 saves the last weights."""
    channels: tuple[PositiveInt, ...] = Field(default=(96, 192, 256), min_length=1)
    """Channels at each resolution of a new U-Net."""
    layers: PositiveInt = 1
    """Residual blocks at each resolution of a new U-Net."""
    attention: tuple[bool, ...] = (False, True, True)
    """At which resolutions a new U-Net attends to itself and to the caption."""
    head_width: PositiveInt = 32
    """Width of an attention head of a new U-Net."""
    sample_prompts: tuple[str, ...] = ()
    """Captions drawn at each validation, beside those of the first val pictures."""
    judge: Annotated[str | None, FLAG] = None
    """Score what the weight average draws for val captions at each validation, by CMMD, CLIPScore and R-precision:
    a folder of recipes/judge.py, or any CLIP but the one that is trained on."""
    judged_pictures: PositiveInt = 64
    """Val captions that are drawn for `judge`."""
    best_by: Literal["loss", "cmmd"] = "loss"
    """What `result=best` and `patience` go by, the least of it: the loss of a validation, or the judge's CMMD."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.attention) != len(self.channels):
            raise ValueError("attention and channels differ in length; give one entry a resolution")
        if bad := [c for c in self.channels if c % self.head_width]:
            raise ValueError(f"channels {bad[0]} is not divisible by head_width {self.head_width}")
        return self

    @model_validator(mode="after")
    def _ends_in_noise(self) -> Self:
        if not self.zero_terminal_snr:
            return self
        if self.model is None and self.objective != "v":
            raise ValueError(
                "zero_terminal_snr is for objective=v, since of pure noise eps learns nothing and flow begins with it "
                "anyway; set objective=v or leave it out"
            )
        if self.levels == "logit-normal":
            raise ValueError(
                "zero_terminal_snr is learned at the last step, which levels=logit-normal all but never draws; "
                "set levels=uniform or levels=cosine"
            )
        if self.min_snr is not None:
            raise ValueError("min_snr gives no weight to the last step, which zero_terminal_snr is for; leave out one")
        return self

    @property
    def counted(self) -> str:
        """The figure of a validation that tells the best: the least of it."""
        return self.best_by

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.align_weight and (self.tune != "full" or isinstance(self, TrainLoraConfig)):
            raise ValueError("align_weight is for training all of a U-Net; leave it out")
        if self.best_by == "cmmd" and self.judge is None:
            raise ValueError("best_by=cmmd is what a judge says; name one with judge, or go by the loss")
        if self.model is None and self.tune != "full":
            raise ValueError("a new U-Net has nothing worth keeping yet; use tune=full, or name a model")
        return self


class TrainLoraConfig(TrainUnetConfig):
    """Train low-rank additions to a U-Net (LoRA): a small file that changes what the model draws."""

    model: Annotated[str, FLAG]
    """The model that the additions are for: `builtin`, a `train unet` run, a model folder or a hub id."""
    lr: Annotated[PositiveFloat, FLAG] = 1e-4
    """Peak learning rate of AdamW: it rises over `warmup` and then follows `schedule`."""
    tune: Annotated[Literal["full", "attention", "cross_attention_kv"], FLAG] = "attention"
    """Which layers get additions: all; those of attention; or keys and values of cross-attention alone."""
    rank: Annotated[PositiveInt, FLAG] = 16
    """Rank of the additions: higher learns more, and makes a larger file."""
    alpha: Annotated[PositiveFloat | None, FLAG] = None
    """The additions are multiplied by alpha / rank; the rank when left out."""
    dora: Annotated[bool, FLAG] = False
    """Learn the length of each row of weights apart from its direction (DoRA); only Diffusers and Limner load that."""

    @model_validator(mode="after")
    def _keeps_the_scheduler(self) -> Self:
        if self.zero_terminal_snr:
            raise ValueError(
                "a LoRA is drawn with the scheduler of its model, which zero_terminal_snr changes; leave it out, or "
                "tune the model like that with train unet first"
            )
        return self


class TrainDistillConfig(TrainConfig):
    """Train a student of a U-Net that draws in few steps, each of one pass, with guidance folded in."""

    data: Annotated[Path, FLAG]
    """The run folder of `limner encode`."""
    model: Annotated[str, FLAG]
    """The teacher: a `train unet` run, a model folder, a hub id or `builtin`. The student begins as its copy."""
    batch_size: Annotated[PositiveInt, FLAG] = 32
    """Images a step, over all processes."""
    ema_halflife: float = Field(default=10_000, ge=0)
    """Half-life, in images, of the weight average that is saved as the result; 0 saves the last weights."""
    steps: Annotated[int, FLAG, Field(ge=1, le=8)] = 4
    """Steps that the student draws in."""
    substeps: PositiveInt = 8
    """Times that the teacher is asked for each step of the student; it goes by the midpoint method, two for a step."""
    guidance: tuple[float, float] = (1.0, 8.0)
    """Least and greatest guidance scale that the student learns; users choose in between."""
    sample_prompts: tuple[str, ...] = ()
    """Captions drawn at each validation, beside those of the first val pictures."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 1 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError("guidance goes from least, 1 or above, to greatest; give two numbers in that order")
        return self
