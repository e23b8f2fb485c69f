"""The page of the command line, written by typer from the commands themselves."""

from typing import Any

import click
import typer.main
from typer.cli import get_docs_for_click

from experiments.cli import app


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The text of ``page``; that of the command line with its commands."""
    if page.file.src_uri != "reference/cli.md":
        return markdown
    command = typer.main.get_command(app)
    return get_docs_for_click(
        obj=command, ctx=click.Context(command, info_name="fedmerge"), name="fedmerge", title="Command line"
    )
