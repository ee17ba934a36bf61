"""Write docs/cli.md from the help pages of every command: `make docs`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
fault of Limner's own, with a traceback, or of `replay` that the pictures differ.
"""
PLAIN = {"TERMINAL_WIDTH": "80", "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
PROGRAM = """
import contextlib, io, json, sys
from limner.cli import app
pages = []
for words in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as page:
        app([*words, "--help"], prog_name="limner", standalone_mode=False)
    pages.append(page.getvalue())
json.dump(pages, sys.stdout)
"""  # of its own process, since typer reads the width as it is imported
COLOURFUL = {"FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"}


def commands() -> Iterator[tuple[str, ...]]:
    """Every command and group of commands, as words; the whole first."""

    def below(command: object, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, sub in getattr(command, "commands", {}).items():
            yield from below(sub, (*words, name))

    yield from below(typer.main.get_command(app), ())


def help_pages(commands: Sequence[tuple[str, ...]]) -> list[str]:
    """The help pages of commands, 80 columns wide and without colour."""
    environment = {name: value for name, value in os.environ.items() if name not in COLOURFUL} | PLAIN
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    return ["\n".join(line.rstrip() for line in page.splitlines()).strip() for page in json.loads(printed)]


def render() -> str:
    """The whole of docs/cli.md."""
    named = list(commands())
    sections = [
        f"\n## {' '.join(('limner', *words))}\n\n```text\n{page}\n```\n"
        for words, page in zip(named, help_pages(named), strict=True)
    ]
    return HEAD + "".join(sections)


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
    print(f"wrote {FILE}")
