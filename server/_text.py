"""Values in text: TOML files, lists, options by name."""

import tomllib
from pathlib import Path
from typing import Any

from fedmerge.errors import ConfigError
from fedmerge.files import read_text


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a TOML file.

    Raises:
        ConfigError: The file cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give an existing TOML file") from error
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: dates and long numbers that are none
        hint = "; write a Windows path in single quotes, 'C:\\photos'" if "'\\' in a string" in str(error) else ""
        raise ConfigError(f"{path}: not a TOML file: {error}{hint}") from error


def split_list(text: str) -> list[str]:
    """The parts between the commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_options(text: str, key: str = "strategy-options") -> dict[str, float | int]:
    """The numbers of ``"name=1, other=0.5"``, by name.

    Raises:
        ConfigError: A part is no such thing; ``key`` says where.
    """
    options: dict[str, float | int] = {}
    for part in split_list(text):
        name, _, value = (x.strip() for x in part.partition("="))
        if name in options:
            raise ConfigError(f"{key}: {name!r} is given twice; leave one out")
        try:
            options[name] = int(value) if value.lstrip("+-").isdigit() else float(value)
        except ValueError as error:
            raise ConfigError(f"{key} {part!r}: expected 'name=number', for example 'server_momentum=0.9'") from error
    return options
