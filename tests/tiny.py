"""Tiny real models for tests: the classes that Limner trains and draws with, a few thousand random weights each.

Sizes fit together: the text encoder is `WIDTH` wide, the VAE's latents have 4 channels and half the side of its
pixels, and the U-Net draws 8x8 latents, so that a `tiny_model` draws 16x16 pixels. The same seed gives the same
weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPModel, CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.siglip.configuration_siglip import SiglipConfig
from transformers.models.siglip.modeling_siglip import SiglipModel

from limner.models.clip import new_tokenizer

torch.set_num_threads(1)  # as fast at this size, and not slowed a hundredfold by whatever else the machine does

WIDTH = 32
VOCABULARY = 600
PIECES = 64  # entries of the tokenizer of a SigLIP
CAPTIONS = [
    "A golden retriever playing in a field.",
    "A toddler playing in a sandbox.",
    "Two dogs run through the snow.",
    "A man in a red jacket climbs a rock.",
    "Children jump into a swimming pool.",
    "A woman walks on the beach at sunset.",
    "A brown dog catches a frisbee.",
    "People ride bicycles down a street.",
]

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"beta_schedule": "scaled_linear", "skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm-flow": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "unipc": ("UniPCMultistepScheduler", {"prediction_type": "v_prediction"}),
    "unipc-flow": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "lcm": ("LCMScheduler", {}),
    "flow-match": ("FlowMatchEulerDiscreteScheduler", {}),
}
"""Schedulers by the name that `tiny_scheduler` takes: Diffusers' class and its settings."""


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer of `VOCABULARY` byte pairs learned from `CAPTIONS`, saved in `folder`."""
    tokenizer: CLIPTokenizer = new_tokenizer(CAPTIONS, VOCABULARY)
    assert len(tokenizer) == VOCABULARY
    tokenizer.save_pretrained(folder)
    return tokenizer


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=16,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )


def tiny_text_encoder(seed: int = 0) -> CLIPTextModel:
    """A CLIPTextModel of two layers."""
    torch.manual_seed(seed)
    return CLIPTextModel(_text_config()).eval()


def tiny_clip(seed: int = 0) -> CLIPModel:
    """A CLIPModel with both towers: text as `tiny_text_encoder`, pictures of 16x16 pixels in 8x8 patches."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = CLIPConfig(text_config=_text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    return CLIPModel(config).eval()


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """An AutoencoderKL of factor 2 with 4 latent channels."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def tiny_taesd(seed: int = 0) -> AutoencoderTiny:
    """An AutoencoderTiny of factor 2 with 4 latent channels."""
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


def tiny_unet(cross_attention_dim: int = WIDTH, seed: int = 0, **settings: Any) -> UNet2DConditionModel:
    """A UNet2DConditionModel of two resolutions on 8x8 latents; `settings` are its other arguments."""
    torch.manual_seed(seed)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(cross_attention_dim=cross_attention_dim, **(arguments | settings)).eval()


def tiny_scheduler(name: str = "ddim") -> Any:
    """One of `SCHEDULERS`."""
    import diffusers

    cls, settings = SCHEDULERS[name]
    return getattr(diffusers, cls)(num_train_timesteps=1000, **settings)


def tiny_model(folder: Path, scheduler: str = "ddim", *, vae: Any = None, unet: Any = None) -> Path:
    """A whole model folder, laid out as Diffusers' StableDiffusionPipeline saves it."""
    parts = {
        "text_encoder": tiny_text_encoder(),
        "vae": vae or tiny_vae(),
        "unet": unet or tiny_unet(),
        "scheduler": tiny_scheduler(scheduler),
    }
    tiny_tokenizer(folder / "tokenizer")
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.36.0"}
    index |= {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None]}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def tiny_siglip_tokenizer(folder: Path) -> Any:
    """A SiglipTokenizer of `PIECES` pieces of `CAPTIONS`, saved in `folder` with the settings of the published ones."""
    from sentencepiece import SentencePieceTrainer
    from transformers.models.siglip.tokenization_siglip import SiglipTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    SentencePieceTrainer.train(
        sentence_iterator=(caption.lower() for caption in CAPTIONS),
        model_prefix=str(folder / "spiece"),
        vocab_size=PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"])
    assert len(tokenizer) == PIECES
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_siglip(seed: int = 0) -> SiglipModel:
    """A SiglipModel for `tiny_siglip_tokenizer` and pictures of 16x16 pixels, in 8x8 patches."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": PIECES, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 1}
    vision = {"image_size": 16, "patch_size": 8}
    return SiglipModel(SiglipConfig(text_config=tower | text, vision_config=tower | vision)).eval()
