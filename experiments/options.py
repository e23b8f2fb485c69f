"""The keys of a configuration as options of a command, made when they are asked for: torch is imported for them."""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Union, get_args

import click
import typer
from typer.core import TyperCommand
from typer.models import CommandInfo

from fedmerge.errors import ConfigError

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results; new, or empty.")]
Width = Annotated[float, typer.Option(help="The network's width, in the unit of `fedmerge list models`; 0 is its own.")]


def with_config_options(function: Any, waiting: Callable[[], AbstractContextManager[object]]) -> type[TyperCommand]:
    """The class of a command that calls ``function``, with an option for every key of :class:`server.RunConfig`.

    ``waiting`` is around the import of torch.

    Keys of the configuration are keyword arguments of ``function``, and stand before its ``out``.
    """

    class Command(TyperCommand):
        def get_params(self, ctx: click.Context) -> list[click.Parameter]:
            if not self.params:
                info = CommandInfo(self.name, callback=_complete(function, waiting))
                full = typer.main.get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode="rich")
                self.params, self.callback = full.params, full.callback
            return super().get_params(ctx)

    return Command


@functools.cache
def _complete(function: Any, waiting: Callable[[], AbstractContextManager[object]]) -> Any:
    """Give ``function`` an option for every key of :class:`server.RunConfig`."""
    with waiting():
        from server import RunConfig, choices

    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    position = next(i for i, p in enumerate(parameters) if p.name == "out")
    keys = []
    for name, field in RunConfig.model_fields.items():
        kind = bool if True in get_args(field.annotation) else field.annotation
        kind = kind if kind in (int, float, bool, str) else str
        listed = ", ".join(choices(name))
        default = field.default if field.default != "" else "the model's own" if listed or kind is bool else "none"
        shown = f"{field.description}{listed and ': '}{listed} [dim](default: {default})[/]"
        option = typer.Option(help=shown, show_default=False, rich_help_panel="Configuration")
        annotation = Annotated[Union[kind, None], option]  # type: ignore[valid-type]  # noqa: UP007
        keys.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    before = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    function.__signature__ = signature.replace(parameters=[*before[:position], *keys, *before[position:]])
    function.__annotations__ = {p.name: p.annotation for p in function.__signature__.parameters.values()}
    return function


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
        raise ConfigError(f"{option} {text!r}: expected {count} numbers separated by commas")
    return numbers
