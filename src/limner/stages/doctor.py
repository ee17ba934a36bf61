"""limner doctor: what this machine has, what Limner uses of it, and what is missing."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from limner import system
from limner.config import DoctorConfig

SIMD = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "bf16", "sve")
"""What of a processor's instructions matters here, by torch's names."""
BUDGET = 0.5  # seconds for each of the probe's figures
SIDE, CHANNELS = 768, 128  # of the matrices, and of the convolution on 64x64


def run(config: DoctorConfig) -> None:
    """Print what was found; the probe of the precisions takes about three seconds."""
    found = examine()
    print(json.dumps(found, indent=2) if config.as_json else "\n".join(_lines(found)))


def examine() -> dict[str, Any]:
    """All that is known of the machine."""
    import torch
    from huggingface_hub import constants

    from limner.generation import setup
    from limner.generation.setup import choose_device

    device = choose_device(None)
    able = torch.cpu.get_capabilities()
    memory = system.memory()
    cache = Path(constants.HF_HUB_CACHE)
    standing = next(place for place in (cache, *cache.parents) if place.exists())
    return {
        "processor": {
            "name": able.get("cpu_name") or platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "may use": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "instructions": [name for name in SIMD if able.get(name)],
        },
        "memory": {"bytes": memory.total, "free": memory.free},
        "gpus": [
            {"name": properties.name, "bytes": properties.total_memory}
            for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "cache": {"folder": str(cache), "free": shutil.disk_usage(standing).free},
        "uses": {
            "device": str(device),
            "precision": setup.choose(device).precision,
            "threads": torch.get_num_threads(),
            "waiting threads": os.environ.get("OMP_WAIT_POLICY", "the library's own way"),
            "allocator": allocator(),
        },
        "faster": probe(device),
        "missing": missing(),
        "versions": {name: version(name) for name in ("limner", "torch", "diffusers", "transformers")},
    }


def allocator() -> str:
    """Which of the known allocators of memory this process runs with."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else ""
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if re.search(rf"lib{name}\S*\.so", loaded):
            return name
    return platform.libc_ver()[0] or "the system's"


def probe(device: Any) -> dict[str, dict[str, float]]:
    """GFLOP/s of a matrix product and a convolution in fp32 and bf16; the best of calls that take turns."""
    import torch

    a = torch.randn(SIDE, SIDE, device=device)
    x = torch.randn(1, CHANNELS, 64, 64, device=device)
    kernel = torch.randn(CHANNELS, CHANNELS, 3, 3, device=device)
    calls: dict[str, Callable[[], Any]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        own, field, weights = a.to(dtype), x.to(dtype), kernel.to(dtype)
        calls[f"matrix product {name}"] = functools.partial(torch.matmul, own, own)
        calls[f"convolution {name}"] = functools.partial(torch.conv2d, field, weights, padding=1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    ends = time.perf_counter() + BUDGET * len(calls)
    while time.perf_counter() < ends or min(map(len, times.values())) < 3:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    work = {"matrix product": 2 * SIDE**3, "convolution": 2 * 9 * CHANNELS**2 * 64**2}
    return {
        what: {name: round(flop / min(times[f"{what} {name}"]) / 1e9, 1) for name in ("fp32", "bf16")}
        for what, flop in work.items()
    }


def missing() -> dict[str, list[str]]:
    """Packages of each extra that are not installed, by extra."""
    found: dict[str, list[str]] = {}
    for line in requires("limner") or []:
        extra = re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name and name[0] != "limner" and extra[1] != "dev":
            lacking = found.setdefault(extra[1], [])
            try:
                version(name[0])
            except PackageNotFoundError:
                lacking.append(name[0])
    return found


def _lines(found: dict[str, Any]) -> list[str]:
    """What was found, as a person reads it."""
    processor, memory, uses = found["processor"], found["memory"], found["uses"]
    gpus = [f"{gpu['name']}, {gpu['bytes'] / 1e9:.1f} GB" for gpu in found["gpus"]]
    lines = [
        f"processor  {processor['name']}, {processor['may use']} of {processor['cores']} cores",
        f"           {', '.join(processor['instructions']) or 'no instructions known that matter here'}",
        f"memory     {memory['free'] / 1e9:.1f} of {memory['bytes'] / 1e9:.1f} GB free",
        f"GPU        {'; '.join(gpus) or 'none that torch can use'}",
        f"cache      {found['cache']['folder']}, {found['cache']['free'] / 1e9:.1f} GB of disk free",
        "",
        f"Limner draws on {uses['device']} in {uses['precision']} with {uses['threads']} threads, "
        f"{uses['allocator']} allocating (waiting threads: {uses['waiting threads']}).",
        "",
    ]
    for what, rates in found["faster"].items():
        ratio = rates["bf16"] / rates["fp32"]
        verdict = f"bf16 is {ratio:.1f} times as fast" if ratio > 1 else f"fp32 is {1 / ratio:.1f} times as fast"
        lines.append(f"{what:<14}  fp32 {rates['fp32']:,.0f}, bf16 {rates['bf16']:,.0f} GFLOP/s: {verdict}")
    lines.append("")
    for extra, names in found["missing"].items():
        what = f"lacks {', '.join(names)}; pip install 'limner[{extra}]'" if names else "is here"
        lines.append(f"{extra:<10} {what}")
    return lines
