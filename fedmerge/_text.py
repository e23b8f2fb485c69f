"""Text files as people's editors leave them."""

import codecs
from pathlib import Path

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    r"""The text of ``path``: UTF-8, or UTF-16 or UTF-32 with their byte-order mark; every line ends with ``\n``.

    The mark itself is no part of the text.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is text in none of these encodings; says where, and what to do.
    """
    content = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not {encoding.upper()} text ({error.reason}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("it holds NUL bytes, as binary files and UTF-16 without a byte-order mark do; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")
