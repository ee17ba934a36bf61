"""The command line: parse, resolve the configuration, call the stage.

Each command takes its arguments, flags and help texts from the stage's configuration in `config/`. Nothing
heavy is imported before a stage runs; `limner --help` does not load torch.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer import BadParameter

from limner import config as configs
from limner import settings
from limner.config import Argument, CommandConfig, Flag, StageConfig
from limner.errors import UserError

UsageError = BadParameter.__base__  # click's, wherever typer keeps it

app = typer.Typer(
    name="limner",
    help="Limner turns captions into pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train = typer.Typer(help="Train CLIP, the VAE, the U-Net or a LoRA for it.", no_args_is_help=True)
app.add_typer(train, name="train")
models = typer.Typer(help="What models there are, what is in them, fetching and converting them.", no_args_is_help=True)
app.add_typer(models, name="models")

OURS: dict[str, tuple[Any, Any, str]] = {
    "preset": (str | None, None, "Named settings to start from."),
    "config": (Path | None, None, "TOML or JSON file of settings; a run's config.json is one."),
    "set": (list[str], [], "Any other setting, as key=value; may be repeated."),
    "dry_run": (bool, False, "Check everything, print the plan, and write nothing."),
}
"""Options that the command of every stage has beside its own: type, default, help."""

INTERRUPTED = 130

EXPECTED_OS_ERRORS = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EFBIG: "A file would become larger than is allowed",
    errno.EIO: "The disk failed to read or write",
    errno.EACCES: "There is no right to read or write",
    errno.EPERM: "There is no right to read or write",
    errno.EROFS: "The disk is read-only",
    errno.ENOTDIR: "A file stands where a folder is needed",
    errno.EEXIST: "A file stands where a folder is needed",
    errno.ENAMETOOLONG: "The name is too long",
}


def _option_type(annotation: Any) -> Any:
    """The type that the command line parses for a field: any value may be left out, tuples repeat."""
    members = [a for a in get_args(annotation) if a is not NoneType] if _is_union(annotation) else [annotation]
    kind = _bare(members[0])
    if get_origin(kind) is tuple:
        repeated = _bare(get_args(kind)[0])
        return list[repeated if repeated in (int, float, Path) else str]  # type: ignore[misc]
    return kind if get_origin(kind) is Literal or kind in (int, float, bool, Path) else str


def _bare(annotation: Any) -> Any:
    """A type without its bounds."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) is UnionType or NoneType in get_args(annotation)


def _command(cls: type[CommandConfig], stage: str) -> Callable[..., int]:
    """A typer command for a stage: its signature is read off the configuration."""
    parameters = []
    extra = OURS if issubclass(cls, StageConfig) else {}
    for name, field in cls.model_fields.items():
        mark = next((m for m in field.metadata if isinstance(m, Argument | Flag)), None)
        if mark is None:
            continue
        kind = _option_type(field.annotation)
        help_text = " ".join((field.description or "").split()).replace("[", r"\[")  # which begins markup in rich
        if isinstance(mark, Argument):
            option: Any = typer.Argument(help=help_text, show_default=False)
        else:
            if not field.is_required() and field.default not in (None, "", ()):
                help_text += f" Default: {_shown(field.default)}."
            flag = "--" + name.replace("_", "-")
            names = mark.names or (f"{flag}/--no-{flag[2:]}" if kind is bool else flag,)
            option = typer.Option(*names, help=help_text, show_default=False)
        parameters.append(_parameter(name, Annotated[kind | None, option], None))
    for name, (kind, default, help_text) in extra.items():
        flag = f"--{name.replace('_', '-')}"
        parameters.append(
            _parameter(name, Annotated[kind, typer.Option(flag, help=help_text, show_default=False)], default)
        )

    def command(**given: Any) -> int:
        ours = {name: given.pop(name, default) for name, (_, default, _) in OURS.items()}
        flags = {name: value for name, value in given.items() if value is not None and value != []}
        config = settings.resolve(cls, flags, preset=ours["preset"], file=ours["config"], sets=ours["set"])
        module: ModuleType = importlib.import_module(f"limner.stages.{stage}")
        if ours["dry_run"]:
            _print_plan(module.plan(config))
        else:
            outcome = module.run(config)
            if isinstance(outcome, int):  # an exit code of its own, as of replay
                return outcome
        return 0

    command.__doc__ = cls.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return ", ".join(map(_shown, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _print_plan(plan: dict[str, Any]) -> None:
    width = max(map(len, plan))
    for name, value in plan.items():
        print(f"{name:<{width}}  {value}")


for _group, _name, _config, _stage in (
    (app, "generate", configs.GenerateConfig, "generate"),
    (app, "replay", configs.ReplayConfig, "replay"),
    (app, "prepare", configs.PrepareConfig, "prepare"),
    (train, "clip", configs.TrainClipConfig, "train_clip"),
    (train, "vae", configs.TrainVaeConfig, "train_vae"),
    (app, "encode", configs.EncodeConfig, "encode"),
    (train, "unet", configs.TrainUnetConfig, "train_unet"),
    (train, "lora", configs.TrainLoraConfig, "train_unet"),
    (train, "distill", configs.TrainDistillConfig, "train_distill"),
    (app, "assemble", configs.AssembleConfig, "assemble"),
    (app, "evaluate", configs.EvaluateConfig, "evaluate"),
    (models, "list", configs.ListModelsConfig, "list_models"),
    (models, "show", configs.ShowModelConfig, "show_model"),
    (models, "pull", configs.PullModelConfig, "pull_model"),
    (models, "export", configs.ExportConfig, "export"),
    (app, "doctor", configs.DoctorConfig, "doctor"),
    (app, "bench", configs.BenchConfig, "bench"),
    (app, "serve", configs.ServeConfig, "serve"),
    (app, "token", configs.TokenConfig, "token"),
):
    _group.command(_name)(_command(_config, _stage))


def _fail(sentence: str, code: int) -> None:
    print(f"limner: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Run the command line.

    Exit code 0 done, 2 the user's mistake in one sentence, 130 interrupted, 1 ours, or of replay that pictures differ.
    """
    logging.captureWarnings(True)
    if not settings.WAITING.keys() & os.environ.keys():
        os.environ.update(settings.WAITING)
    if sys.argv[1:3] == ["serve", "token"]:  # where people look for it; a model folder of that name is ./token
        del sys.argv[1]
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except UsageError as error:  # type: ignore[misc]
        if not error.format_message():  # a command without arguments: its help was printed
            raise SystemExit(2) from None
        _fail(f"{error.format_message().rstrip('.')}; see --help.", 2)
    except OSError as error:
        if error.errno not in EXPECTED_OS_ERRORS:
            raise
        where = f" at {error.filename}" if error.filename else ""
        _fail(f"{EXPECTED_OS_ERRORS[error.errno]}{where}; mend that and run the command again.", 2)
    else:
        if code == INTERRUPTED:  # which is how typer hands a KeyboardInterrupt on
            _fail("Interrupted; run the same command again to go on.", INTERRUPTED)
        raise SystemExit(code or 0)
