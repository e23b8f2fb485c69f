import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch
from platformdirs.macos import MacOS
from platformdirs.unix import Unix
from platformdirs.windows import Windows

from fedmerge.data._cache import Decoded, Part, Source, cache_folder, cached
from fedmerge.errors import DataError


def _source(folder: Path, content: bytes = b"pixels") -> Source:
    """A source of one file; every decode leaves a line in ``decodes``."""
    folder.mkdir(exist_ok=True)
    file = folder / "train.bin"
    if not file.exists() or file.read_bytes() != content:
        file.write_bytes(content)

    def decode() -> Decoded:
        with open(folder / "decodes", "a") as log:
            log.write("decoded\n")
        pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 4), np.uint8)
        return Decoded({"train": Part(pixels, np.arange(5) % 2)}, ("a", "b"))

    return Source(folder, [file], decode)


def _decodes(folder: Path) -> int:
    return len((folder / "decodes").read_text().splitlines())


def _entry(cache: Path) -> Path:
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    return entry


def _load_in_child(folder: str) -> int:
    return int(cached(_source(Path(folder))).parts["train"].images.sum())


def test_a_source_is_decoded_once_and_comes_back_as_it_was(tmp_path: Path) -> None:
    first = cached(_source(tmp_path / "a"))
    again = cached(_source(tmp_path / "a"))
    fresh = _source(tmp_path / "a").decode()
    for found in (first, again):
        np.testing.assert_array_equal(found.parts["train"].images, fresh.parts["train"].images)
        np.testing.assert_array_equal(found.parts["train"].labels, fresh.parts["train"].labels)
        assert found.classes == ("a", "b")
    assert _decodes(tmp_path / "a") == 2  # the cache's, and the one just above


def test_an_entry_is_for_whom_the_umask_says(tmp_path: Path, own_folders: Path) -> None:
    before = os.umask(0o022)
    try:
        cached(_source(tmp_path / "a"))
    finally:
        os.umask(before)
    entries = [path.parent for path in own_folders.rglob("*-images.npy")]
    assert [oct(path.stat().st_mode & 0o777) for path in entries] == ["0o755"]
    assert [path for path in entries[0].parent.iterdir() if path.is_dir()] == entries


def test_the_key_is_the_content_and_not_the_place(tmp_path: Path) -> None:
    assert _source(tmp_path / "a").key() == _source(tmp_path / "b").key()
    assert _source(tmp_path / "a").key() != _source(tmp_path / "c", b"others").key()


def test_a_changed_source_is_decoded_again(tmp_path: Path) -> None:
    cached(_source(tmp_path / "a"))
    cached(_source(tmp_path / "a", b"other pixels"))
    assert _decodes(tmp_path / "a") == 2


def test_arrays_are_mapped_and_a_write_does_not_reach_the_file(tmp_path: Path, own_folders: Path) -> None:
    images = cached(_source(tmp_path / "a")).parts["train"].images
    assert isinstance(images, np.memmap)
    before = (_entry(own_folders) / "train-images.npy").read_bytes()
    torch.from_numpy(images).zero_()
    assert (_entry(own_folders) / "train-images.npy").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train-images.npy", lambda found: found[:-7]),
        ("train-images.npy", lambda found: found[:-1] + bytes([found[-1] ^ 1])),
        ("train-labels.npy", lambda found: b""),
        ("entry.json", lambda found: found[:20]),
        ("entry.json", lambda found: b"[]"),
        ("entry.json", lambda found: json.dumps({"files": {}}).encode()),
    ],
    ids=["cut short", "a bit flipped", "emptied", "half an entry", "no entry", "keys missing"],
)
def test_a_damaged_entry_is_rebuilt(tmp_path: Path, own_folders: Path, file: str, damage: object) -> None:
    whole = np.array(cached(_source(tmp_path / "a")).parts["train"].images)
    path = _entry(own_folders) / file
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    np.testing.assert_array_equal(cached(_source(tmp_path / "a")).parts["train"].images, whole)
    assert _decodes(tmp_path / "a") == 2


def test_a_missing_file_is_rebuilt(tmp_path: Path, own_folders: Path) -> None:
    cached(_source(tmp_path / "a"))
    (_entry(own_folders) / "train-labels.npy").unlink()
    assert len(cached(_source(tmp_path / "a")).parts["train"].labels) == 5


def test_a_draft_that_failed_leaves_no_entry(tmp_path: Path, own_folders: Path) -> None:
    source = _source(tmp_path / "a")

    def fail() -> Decoded:
        raise DataError("broken images")

    with pytest.raises(DataError, match="broken images"):
        cached(Source(source.folder, source.files, fail))
    assert not [path for path in own_folders.iterdir() if path.is_dir()]
    assert cached(source).classes == ("a", "b")


@pytest.mark.slow
def test_processes_share_one_decode(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sums = pool.map(_load_in_child, [str(tmp_path / "a")] * 4, chunksize=1)
    assert len(set(sums)) == 1
    assert _decodes(tmp_path / "a") == 1


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write decoded images to .*; set FEDMERGE_CACHE to a folder"):
        cached(_source(tmp_path / "a"))


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        (Unix, "XDG_CACHE_HOME", "{set}/fedmerge"),
        (Unix, None, "{home}/.cache/fedmerge"),
        (MacOS, None, "{home}/Library/Caches/fedmerge"),
        (Windows, "LOCALAPPDATA", "{set}/fedmerge"),
    ],
)
def test_the_cache_lies_where_the_platform_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: type, variable: str | None, expected: str
) -> None:
    for name in ("FEDMERGE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        "platformdirs.windows.get_win_folder", lambda name: os.environ[{"CSIDL_LOCAL_APPDATA": "LOCALAPPDATA"}[name]]
    )
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "set"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(platformdirs, "PlatformDirs", platform)
    assert cache_folder() == Path(expected.format(set=tmp_path / "set", home=tmp_path / "home"))


def test_the_environment_chooses_the_cache(own_folders: Path) -> None:
    assert cache_folder() == own_folders == Path(os.environ["FEDMERGE_CACHE"])
