"""A folder of somebody else's project, whose packages are called as fedmerge's are."""

from pathlib import Path


def strangers(folder: Path) -> Path:
    """``folder`` with four packages that fail when they are imported."""
    for name in ("clients", "strategies", "server", "experiments"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('the {name} of somebody else')\n")
        (folder / name / "app.py").touch()
    return folder
