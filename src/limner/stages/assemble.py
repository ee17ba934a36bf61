"""`limner assemble`: a text encoder, a VAE and a U-Net become a model that any Diffusers program loads."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limner import __version__
from limner.artifacts import atomic_folder, identity, read_json, write_json, write_text
from limner.config import AssembleConfig
from limner.errors import ConfigError, ModelError, UserError
from limner.evaluation.alignment import REPORT, TUNED
from limner.evaluation.plots import grid
from limner.generation.engine import paint
from limner.models import adapter as adapters
from limner.models import gate, loading, pipeline
from limner.models import vae as vaes
from limner.models.card import model_card
from limner.models.clip import Clip
from limner.progress import progress
from limner.settings import MISSION

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CAPTIONS = (*MISSION, "A man riding a bicycle down a street.", "A plate of food on a wooden table.")
"""What grid.png shows, with the CLIP before and after tuning."""


@dataclass(frozen=True)
class Parts:
    """What a model is joined from, and the sha256 of each part's weights as it was before."""

    text_encoder: Any
    tokenizer: Any
    vae: Any
    unet: Any
    scheduler: Any
    clip: Clip | None
    parents: dict[str, str]


def run(config: AssembleConfig) -> Path:
    """Write the model folder. -> it.

    Raises ModelError where the parts don't fit each other, ConfigError where the folder holds something else.
    """
    parts = _load(config)
    _check_fit(parts)
    text = _card_text(config)
    facts = _facts(config, parts, text)
    if _is_there(config.out, facts):
        print(f"Nothing to do: {config.out} holds this model.")
        return config.out
    columns = _columns(config, parts) if config.grid else {}
    with loading.quiet(), atomic_folder(config.out) as folder:
        if columns:
            grid(columns, CAPTIONS, folder / "grid.png")
        networks = {name: part for name, part in vars(parts).items() if name != "parents"}
        pipeline.save(folder, **networks, dtype=DTYPES[config.precision])
        write_json(folder / "manifest.json", facts)
        write_text(folder / "MODEL_CARD.md", model_card(folder, facts, text))
    print(config.out)
    return config.out


def plan(config: AssembleConfig) -> dict[str, Any]:
    """What `run` would do; nothing is fetched or written. Raises as `run` does."""
    refs = dict.fromkeys((config.clip, config.vae, config.unet))
    if away := [ref for ref in refs if loading.resolve_here(ref) is None]:
        return {"parts": f"{', '.join(away)}, to be fetched; what they hold is not known yet", "out": config.out}
    parts = _load(config)
    _check_fit(parts)
    _is_there(config.out, _facts(config, parts, _card_text(config)))
    networks = {"text encoder": parts.text_encoder, "VAE": parts.vae, "U-Net": parts.unet}
    if parts.clip is not None:
        networks["CLIP"] = parts.clip.network
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in networks.items()}
    size = sum(counts.values()) * DTYPES[config.precision].itemsize
    side, factor = parts.unet.config["sample_size"], vaes.factor(parts.vae.config)
    height, width = (side, side) if isinstance(side, int) else side
    return {
        **{name: f"{count / 1e6:.1f} M parameters" for name, count in counts.items()},
        "draws": f"{width * factor}x{height * factor} pixels",
        "disk": f"{size / 1e6:,.0f} MB in {config.precision}",
        "out": config.out,
    }


def _load(config: AssembleConfig) -> Parts:
    text_encoder, tokenizer = loading.load_text_encoder(config.clip)
    _check_text(config, config.clip, text_encoder, tokenizer)
    parents = {
        "clip": loading.text_identity(config.clip),
        "vae": loading.identity(config.vae, "vae"),
        "unet": loading.identity(config.unet, "unet"),
    }
    has_clip = "clip" in loading.parts_in(loading.resolve(config.clip))  # a Stable Diffusion folder has none
    if _manifest(config.unet).get("vae") not in (None, vaes.encoder_identity(config.vae)):
        log.warning(
            "The U-Net of %s was trained on latents of another VAE than %s, or of that one in another precision; of "
            "another, pictures will be wrong.",
            config.unet,
            config.vae,
        )
    adapter = adapters.find(config.clip)
    if folded := _adapter_in(config.unet):
        parents["adapter"] = folded
    if adapter is not None:
        if folded:
            raise ModelError(
                f"The U-Net of {config.unet} has an adapter in it already, and {config.clip} brings another; "
                "name the U-Net as it was before."
            )
        parents["adapter"] = identity(adapter)
    return Parts(
        text_encoder,
        tokenizer,
        loading.load_vae(config.vae),
        _load_unet(config.unet, adapter, text_encoder.config.hidden_size),
        loading.load_scheduler(config.unet),
        loading.load_clip(config.clip) if has_clip else None,
        parents,
    )


def _load_unet(ref: str, adapter: Path | None, width: int) -> Any:
    """The U-Net, reading token states of that `width` through the adapter where there is one."""
    unet = loading.load_unet(ref)
    if adapter is not None:
        adapters.fold(unet, adapters.load(adapter, width))
    return unet


def _manifest(ref: str) -> dict[str, Any]:
    """What the folder of a run or a model says of itself; nothing where another program made it."""
    file = loading.resolve(ref) / "manifest.json"
    return loading.read_config(file) if file.is_file() else {}


def _adapter_in(unet: str) -> str | None:
    """The sha256 of the adapter that an earlier assembly folded into this U-Net, where one did."""
    adapter: str | None = _manifest(unet).get("parents", {}).get("adapter")
    return adapter


def _check_text(config: AssembleConfig, clip: str, text_encoder: Any, tokenizer: Any) -> None:
    given = gate.TextFacts.of(text_encoder.config.to_dict(), tokenizer)
    gate.check(given, gate.wanted(config.unet), clip=clip, unet=config.unet)


def _check_fit(parts: Parts) -> None:
    """Raise ModelError naming every number in which the other parts differ."""
    text, vae, unet = parts.text_encoder.config, parts.vae.config, parts.unet.config
    pairs = (
        ("the VAE's latent channels", vae["latent_channels"], "the U-Net's in_channels", unet["in_channels"]),
        ("the tokenizer's entries", len(parts.tokenizer), "the text encoder's vocab_size", text.vocab_size),
    )
    if wrong := [f"{one} {a} against {other} {b}" for one, a, other, b in pairs if a != b]:
        raise ModelError(f"The parts don't fit together: {', '.join(wrong)}; take parts that were trained together.")
    if unet["sample_size"] is None:
        raise ModelError("The U-Net doesn't say its sample_size, in latents; write it into its config.json.")


def _columns(config: AssembleConfig, parts: Parts) -> dict[str, Tensor]:
    """Pictures of CAPTIONS, the same seeds in each column: pixels (N, 3, H, W) by what the CLIP is.

    Empty where the CLIP was not tuned, or where nothing can be drawn with it as it was before, which is then said.
    """
    try:
        refs = _before_and_after(config.clip)
        if not refs:
            return {}
        columns = {}
        with loading.quiet(), progress("grid", len(refs) * len(CAPTIONS)) as advance:
            for label, ref in refs.items():
                columns[label] = _draw(config, parts if ref == config.clip else _with_clip(config, parts, ref))
                advance(len(CAPTIONS))
        return columns
    except (UserError, torch.OutOfMemoryError) as error:
        print(f"There is no grid.png: {str(error).splitlines()[0]}")
        return {}


def _before_and_after(clip: str) -> dict[str, str]:
    """The CLIP that a run of `train clip` began with, what it became, and of a swept run the mix; by label.

    Empty where `clip` is not a run that began with another. Raises ModelError where that is not there any more.
    """
    run = loading.resolve(clip)
    if not (run / "manifest.json").is_file() or not (run / "config.json").is_file():
        return {}
    manifest, base = read_json(run / "manifest.json"), read_json(run / "config.json").get("model")
    if base is None:
        return {}
    if loading.identity(base, "clip") != manifest["parents"]["model"]:
        raise ModelError(f"{base} is not the CLIP any more that {clip} began with.")
    report = _report(clip)
    if report is not None and report["alpha"] is not None:
        return {"base": base, "tuned": str(run / "model" / TUNED), _mix(report): clip}
    return {"base": base, "tuned": clip}


def _with_clip(config: AssembleConfig, parts: Parts, ref: str) -> Parts:
    """The parts with the CLIP of `ref` in front of the U-Net. Raises ModelError where it doesn't fit."""
    clip, adapter = loading.load_clip(ref), adapters.find(ref)
    text_encoder, unet = clip.network.text_model, parts.unet
    _check_text(config, ref, text_encoder, clip.tokenizer)
    if adapter != adapters.find(config.clip):  # that of `parts` has the adapter of `config.clip` in it
        unet = _load_unet(config.unet, adapter, text_encoder.config.hidden_size)
    return replace(parts, text_encoder=text_encoder, tokenizer=clip.tokenizer, unet=unet)


def _draw(config: AssembleConfig, parts: Parts) -> Tensor:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return paint(
        parts.unet.to(device),
        parts.scheduler,
        parts.vae.to(device),
        parts.text_encoder.to(device),
        parts.tokenizer,
        CAPTIONS,
        seeds=range(len(CAPTIONS)),
        steps=config.steps,
        guidance=config.guidance,
    )  # (N, 3, H, W)


def _facts(config: AssembleConfig, parts: Parts, text: str) -> dict[str, Any]:
    """The model's manifest: all that makes it what it is."""
    return {
        "limner": __version__,
        "parents": parts.parents,
        "defaults": {"steps": config.steps, "guidance": config.guidance},
        "precision": config.precision,
        "scheduler": json.loads(parts.scheduler.to_json_string(), parse_constant=str),
        "card": hashlib.sha256(text.encode()).hexdigest(),
        "trainings": _trainings(config),
        **_retrieval(config.clip),
    }


def _is_there(out: Path, facts: dict[str, Any]) -> bool:
    """Whether `out` holds this very model. Raises ConfigError where it holds something else."""
    if out.is_file():
        raise ConfigError(f"{out} is a file; choose another --out.")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    manifest = out / "manifest.json"
    if not manifest.is_file() or read_json(manifest) != facts:
        raise ConfigError(f"{out} holds something else; delete it or choose another --out.")
    return True


def _card_text(config: AssembleConfig) -> str:
    if config.card is None:
        return ""
    try:
        return config.card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"The card {config.card} can't be read ({reason}); name a Markdown file.") from None


def _trainings(config: AssembleConfig) -> dict[str, Any]:
    """What the runs and models that the parts come from say of their trainings; parts of other programs have none."""
    trainings = {}
    for role, ref in (("clip", config.clip), ("vae", config.vae), ("unet", config.unet)):
        manifest = _manifest(ref)
        if "images" in manifest:
            trainings[role] = {name: manifest[name] for name in ("images", "seed", "validation", "hardware")}
        elif role in manifest.get("trainings", {}):
            trainings[role] = manifest["trainings"][role]
    return trainings


def _report(clip: str) -> dict[str, Any] | None:
    """What a run of `train clip` reports of its CLIP as it is now; None of another, or where there is none."""
    file = loading.resolve(clip) / REPORT
    report: dict[str, Any] | None = read_json(file) if file.is_file() else None
    return report if report is not None and report.get("clip") == loading.text_identity(clip) else None


def _mix(report: dict[str, Any]) -> str:
    return f"alpha {report['alpha']['chosen']:g}"  # PIL's own font has no α


def _retrieval(clip: str) -> dict[str, Any]:
    """Figures of a CLIP before and after tuning for the manifest, on test pictures where there are any, else on dev.

    Those of a model are what its own manifest has.
    """
    report = _report(clip)
    if report is None:
        return {name: found for name, found in _manifest(clip).items() if name == "retrieval"}
    split = "test" if "test" in report["splits"] else "val"
    zero_shot = report.get("zero_shot", {})
    figures = {
        _mix(report) if name == "alpha" else name: {**row, **zero_shot.get(name, {})}
        for name, row in report["splits"][split].items()
    }
    return {"retrieval": {"split": split, "figures": figures}}
