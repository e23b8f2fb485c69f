from pathlib import Path

import pytest

import fedmerge.data


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads the machine's own data or leaves anything in its cache."""
    monkeypatch.delenv("FEDMERGE_DATA", raising=False)
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def digits() -> fedmerge.data.Dataset:
    return fedmerge.data.load("digits")
