"""A test file as a program of two processes, as `accelerate launch` and torchrun start them."""

from __future__ import annotations

import os
import subprocess
import sys


def in_two_processes(program: str, *arguments: str) -> str:
    """Run the file `program` in two processes on the CPU, and assert that it ends well. -> what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
