"""A disk that fills up ends a stage with one sentence, and what was there before stays whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from limner.artifacts import PARTIAL
from limner.config import EncodeConfig, TrainClipConfig, TrainUnetConfig, TrainVaeConfig
from trainings import SMALLEST

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits")

MOST = 60_000  # bytes that a file may have, as if the disk had no more; the batches that workers hand over have less
LIMITED = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({MOST}, {MOST}))
from limner.cli import main
main()
"""


def settings(values: dict[str, Any]) -> list[str]:
    """Settings as the command line takes them."""
    return [
        word
        for name, value in values.items()
        for word in ("--set", f"{name}={str(list(value) if isinstance(value, tuple) else value).lower()}")
    ]


@pytest.mark.parametrize("stage", ["train vae", "train clip", "encode", "train unet", "assemble"])
def test_a_full_disk_is_said_in_one_sentence(
    stage: str, data: Path, clip: Path, vae: Path, unet: Path, latents: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = {
        "train vae": ["--data", data, *settings(SMALLEST[TrainVaeConfig])],
        "train clip": ["--data", data, *settings(SMALLEST[TrainClipConfig])],
        "encode": ["--data", data, "--vae", vae, "--clip", clip, *settings(SMALLEST[EncodeConfig])],
        "train unet": ["--data", latents, *settings(SMALLEST[TrainUnetConfig])],
        "assemble": ["--clip", clip, "--vae", vae, "--unet", unet],
    }[stage]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *stage.split(), *map(str, arguments), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("limner: ")]
    assert len(said) == 1
    assert said[0].startswith("limner: A file would become larger than is allowed at ")
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if PARTIAL in path.name]
    assert not (out / "model").exists()
