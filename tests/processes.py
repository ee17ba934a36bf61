"""A test file as a program of two processes, as `accelerate launch` starts them."""

from __future__ import annotations

import os
import subprocess
import sys

LAUNCH = ("-m", "accelerate.commands.accelerate_cli", "launch", "--mixed_precision", "no", "--dynamo_backend", "no")
# Its way to several processes of a machine without a GPU too, unless there is MPI; 0 takes a free port
TWO = ("--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--main_process_port", "0")


def in_two_processes(program: str, *arguments: str) -> str:
    """Run the file `program` in two processes on the CPU, and assert that it ends well. -> what it printed."""
    done = subprocess.run(
        [sys.executable, *LAUNCH, *TWO, program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
