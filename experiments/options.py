"""The keys of a configuration as options of a command, made when they are asked for: torch is imported for them."""

import ast
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Union, get_args

import click
import typer
from click.core import ParameterSource
from typer.core import TyperCommand
from typer.models import CommandInfo

from fedmerge.beside import HOME
from fedmerge.errors import ConfigError

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results; new, or empty.")]
Width = Annotated[float, typer.Option(help="The network's width, in the unit of `fedmerge list models`; 0 is its own.")]
KernelSize = Annotated[int, typer.Option(help="The network's kernel size; 0 is its own.")]
Classes = Annotated[int, typer.Option(help="Number of classes, without --dataset.")]
InputShape = Annotated[str, typer.Option(help="Channels, height, width, without --dataset.")]


def said_by_images(ctx: typer.Context) -> None:
    """Refuse an option that says again, or otherwise, what the images of ``--dataset`` say.

    Raises:
        ConfigError: There is one.
    """
    dataset = ctx.params["dataset"]
    for name in ("classes", "input_shape") if dataset else ():
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            said = f"--{name.replace('_', '-')} beside --dataset {dataset}"
            raise ConfigError(f"{said}, which says it; leave one of them out")


def with_config_options(function: Any, waiting: Callable[[], AbstractContextManager[object]]) -> type[TyperCommand]:
    """The class of a command that calls ``function``, with an option for every key of :class:`server.RunConfig`.

    ``waiting`` is around the import of torch.

    Keys of the configuration are keyword arguments of ``function``, and stand before its ``out``.
    """

    class Command(TyperCommand):
        def get_params(self, ctx: click.Context) -> list[click.Parameter]:
            if ctx.resilient_parsing:  # a shell completes a line, and waits for no torch
                return _made(self, function, _names()).params
            if not self.params:
                full = _made(self, function, _keys(waiting))
                self.params, self.callback = full.params, full.callback
            return super().get_params(ctx)

    return Command


def _made(command: click.Command, function: Any, keys: Sequence[inspect.Parameter]) -> click.Command:
    """A command that calls ``function``, which takes ``keys`` too."""
    signature = inspect.signature(function)
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    position = next(i for i, p in enumerate(parameters) if p.name == "out")

    def call(**given: Any) -> Any:
        return function(**given)

    parameters[position:position] = keys
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    info = CommandInfo(command.name, callback=call)
    return typer.main.get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode="rich")


def _option(name: str, kind: Any, shown: str) -> inspect.Parameter:
    option = typer.Option(help=shown, show_default=False, rich_help_panel="Configuration")
    annotation = Annotated[Union[kind, None], option]  # noqa: UP007
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@functools.cache
def _keys(waiting: Callable[[], AbstractContextManager[object]]) -> list[inspect.Parameter]:
    """An option for every key, with its type, its choices and its default."""
    with waiting():
        from server import RunConfig, choices

    keys = []
    for name, field in RunConfig.model_fields.items():
        kind = bool if True in get_args(field.annotation) else field.annotation
        kind = kind if kind in (int, float, bool, str) else str
        listed = ", ".join(choices(name))
        default = field.default if field.default != "" else "the model's own" if listed or kind is bool else "none"
        shown = f"{field.description}{listed and ': '}{listed} [dim](default: {default})[/]"
        keys.append(_option(name, kind, shown))
    return keys


def _names() -> list[inspect.Parameter]:
    """The same without types and help, out of the text of the class."""
    text = (HOME / "server" / "_keys.py").read_text(encoding="utf-8")
    (config,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Keys")
    fields = [node for node in config.body if isinstance(node, ast.AnnAssign)]
    kinds = {ast.unparse(field.target): ast.unparse(field.annotation) for field in fields}
    return [_option(name, bool if kind == "bool" or "True" in kind else str, "") for name, kind in kinds.items()]


def fresh(folder: Path, name: str) -> Path:
    """``folder/name``, or with the next free number behind it."""
    return next(p for i in range(1, 10**6) if not (p := folder / (name if i == 1 else f"{name}-{i}")).exists())


def numbers(option: str, text: str, kind: Any, count: int) -> Any:
    """``count`` numbers separated by commas."""
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        several = "s separated by commas" * (count > 1)
        whole = (", whole ones" if several else ", a whole one") * (kind is int)
        raise ConfigError(f"{option} {text!r}: expected {count} number{several}{whole}")
    return numbers
