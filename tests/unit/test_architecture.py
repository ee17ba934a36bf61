"""Imports point one way (docs/pipeline.md), modules stay short, and nothing heavy loads before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import limner

ROOT = Path(limner.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
MOST_LINES = 400

LAYERS = (
    {"cli", "limner"},  # limner: the package itself, whose names lead to everything
    {"stages"},
    {"training", "generation", "evaluation", "data", "serving"},
    {"models", "diffusion"},
    {"artifacts", "config", "settings", "errors", "progress", "system", "threads"},
)
"""A part may import its own layer and those below."""
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

STAGES_THAT_GENERATE = {"serve", "evaluate"}


def name_of(file: Path) -> str:
    """The dotted name of a module of the package."""
    return ".".join(("limner", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


NAMES = {name_of(file): file for file in MODULES}


def part_of(module: str) -> str:
    """`limner.data.dataset` -> `data`; `limner` -> `limner`."""
    return [*module.split("."), module][1]


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, wherever in it, with the line; names taken from modules resolve to them."""
    package = name_of(file).split(".") if file.name == "__init__.py" else name_of(file).split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in NAMES else base), node.lineno


def inner_imports(file: Path) -> Iterator[tuple[str, int]]:
    """Those of `imports` that lie in the package, without the version, which anybody may ask for."""
    for module, line in imports(file):
        if module.split(".")[0] == "limner" and not (module == "limner" and name_of(file) != "limner.cli"):
            yield module, line


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_imports_point_one_way(file: Path) -> None:
    part = part_of(name_of(file))
    assert part in RANK, f"{part} has no layer yet; give it one in LAYERS and in docs/pipeline.md"
    for module, line in inner_imports(file):
        other = part_of(module)
        assert RANK[other] >= RANK[part], f"{file}:{line}: {part} must not import {other}"


@pytest.mark.parametrize("file", sorted((ROOT / "stages").glob("*.py")), ids=name_of)
def test_stages_do_not_import_each_other(file: Path) -> None:
    for module, line in inner_imports(file):
        if part_of(module) == "stages" and module not in {"limner.stages", name_of(file)}:
            allowed = file.stem in STAGES_THAT_GENERATE and module == "limner.stages.generate"
            assert allowed, f"{file}:{line}: a stage must not import another; hand over a folder"


def test_modules_have_no_import_cycle() -> None:
    graph = {name: {module for module, _ in inner_imports(file)} - {name} for name, file in NAMES.items()}
    graph.pop("limner")
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_only_the_package_and_what_it_depends_on_is_imported(file: Path) -> None:
    for module, line in imports(file):
        assert module.split(".")[0] not in {"tests", "recipes", "benchmarks"}, f"{file}:{line} imports {module}"


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_modules_are_short(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{file} has {lines} lines; it is about more than one thing"


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_modules_say_what_they_are_about(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


HEAVY = ("torch", "diffusers", "transformers", "accelerate", "datasets", "numpy", "PIL", "huggingface_hub")


@pytest.mark.parametrize(
    "arguments",
    [None, ["--help"], ["generate", "--help"], ["train", "unet", "--help"], ["generate", "--steps", "-1", "A dog."]],
    ids=lambda arguments: "import" if arguments is None else " ".join(arguments),
)
def test_nothing_heavy_is_loaded_before_it_is_needed(arguments: list[str] | None) -> None:
    call = "" if arguments is None else f"sys.argv[1:] = {arguments!r}; from limner.cli import main\n"
    script = f"""
import atexit, sys
atexit.register(lambda: print("LOADED", [name for name in {HEAVY!r} if name in sys.modules]))
import limner
{call}{"main()" if call else ""}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stdout + done.stderr
