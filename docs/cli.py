"""Write docs/cli.md from the help pages of every command: `make docs`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import typer.main

from limner.cli import app

FILE = Path(__file__).with_suffix(".md")
HEAD = """# The command line

Written by `make docs` from the help pages; a test compares the two. What each command reads and leaves behind is
in [pipeline.md](pipeline.md).

Settings come from five places, of which a later one wins: the defaults, `--preset`, `--config`, `--set key=value` and
the flags. `--set` and `--config` reach every setting of a command, also those without a flag; they are listed, with
their explanations, in [config/](../src/limner/config). Running the same command again resumes it.

Exit codes: 0 done; 2 a mistake in the command or its input, with one sentence on what to do; 130 interrupted; 1 a
fault of Limner's own, with a traceback.
"""
PLAIN = {"TERMINAL_WIDTH": "80", "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
COLOURFUL = {"FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"}


def commands() -> Iterator[tuple[str, ...]]:
    """Every command and group of commands, as words; the whole first."""

    def below(command: object, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, sub in getattr(command, "commands", {}).items():
            yield from below(sub, (*words, name))

    yield from below(typer.main.get_command(app), ())


def help_page(words: tuple[str, ...]) -> str:
    """The help page of a command, 80 columns wide and without colour."""
    environment = {name: value for name, value in os.environ.items() if name not in COLOURFUL} | PLAIN
    call = [sys.executable, "-c", "import sys; sys.argv[0] = 'limner'; from limner.cli import main; main()"]
    page = subprocess.run(
        [*call, *words, "--help"], env=environment, capture_output=True, encoding="utf-8", check=True
    ).stdout
    return "\n".join(line.rstrip() for line in page.strip("\n").splitlines()).strip()


def render() -> str:
    """The whole of docs/cli.md."""
    sections = [f"\n## {' '.join(('limner', *words))}\n\n```text\n{help_page(words)}\n```\n" for words in commands()]
    return HEAD + "".join(sections)


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
    print(f"wrote {FILE}")
