"""Many pictures take no more memory than a few do, but for some numbers of each."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from limner.training.memory import proc

MEASURE = """
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from limner.evaluation import scores
from limner.evaluation.agreement import r_precision
from limner.evaluation.copies import copies, nearest
from limner.evaluation.intervals import set_intervals
from limner.evaluation.retrieval import caption_ranks
from limner.training.memory import proc

torch.set_num_threads(1)
scores.set_intervals = partial(set_intervals, resamples=2)  # as many as it likes, each as large as the last


def peak(count):
    Path("/proc/self/clear_refs").write_text("5")
    real, fake = torch.randn(2, count, 32, generator=torch.Generator().manual_seed(0))
    real, fake = (torch.nn.functional.normalize(x, dim=1) for x in (real, fake))
    scores.fidelity(real, fake)
    scores.cmmd(real, fake)
    near = nearest(fake.split(100), real[:500])
    copies(near, near)
    caption_ranks(real, fake, torch.arange(count), block=scores.BLOCK)
    r_precision(fake[:500], real, torch.arange(500))
    return proc("/proc/self/status", "VmHWM")


peak(500)
few, many = peak(2_000), peak(5_000)
print(few, many)
"""


@pytest.mark.skipif(proc("/proc/self/status", "VmHWM") is None, reason="the system tells no peak of memory")
def test_memory_does_not_grow_with_the_number_of_pictures() -> None:
    """A float64 for each pair of 5,000 pictures would be 200 MB, and for each pair with a block of them 41 MB."""
    # What is freed goes back to the system at once: what the heap keeps would differ by 100 MB from run to run
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert many - few < 20e6, f"{few / 1e6:.0f} MB became {many / 1e6:.0f} MB"
