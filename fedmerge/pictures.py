"""Pictures as files: PNG, SVG or PDF."""

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from fedmerge.errors import ConfigError

FORMATS = (".png", ".svg", ".pdf")
_DPI = 150


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` without dates, so that equal data give equal bytes.

    Raises:
        ConfigError: The file cannot be written.
    """
    suffix = path.suffix.lower()
    metadata: dict[str, Any] = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.hashsalt": "fedmerge", "svg.fonttype": "none"})
        figure.savefig(buffer, format=suffix[1:], dpi=_DPI, metadata=metadata[suffix])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another file") from error


def check_format(path: Path) -> None:
    """Refuse a file name that ends in no known format.

    Raises:
        ConfigError: It ends in another.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: a picture is a {', '.join(FORMATS)} file; end its name in one of them")
