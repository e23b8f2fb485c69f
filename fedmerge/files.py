"""Files as people have them: text in any encoding, and what a file is that is not what it is called."""

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
    if encoding == "utf-8" and b"\0" in content:
        raise ValueError(
            "it holds NUL bytes, as binary files and UTF-16 without a byte-order mark do; save it as UTF-8"
        )
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not {encoding.upper()} text ({error.reason}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def mistaken(path: Path) -> str:
    """Why ``path`` is nothing that could be read, and what to do; ``""`` where nothing is wrong at first sight."""
    if path.is_dir():
        return "it is a folder; name a file in it"
    if not path.exists():
        return "No such file; check its name"
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        return f"{error.strerror}; check its permissions"
    if not head:
        return "it is empty (0 bytes); copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not the file itself; run `git lfs pull` where it was cloned"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page, perhaps of a download that failed; download it again"
    return ""
