"""Folders of images as systems leave them."""

import io
import os
import unicodedata
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from fedmerge.data import load
from fedmerge.errors import DataError, UnknownNameError


def image(path: Path, value: int = 9, kind: str = "PNG") -> Path:
    stream = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 6), value, np.uint8)).save(stream, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stream.getvalue())
    return path


def test_what_systems_leave_behind_is_passed_over(tmp_path: Path) -> None:
    image(tmp_path / "cat" / "IMG_1.PNG")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._IMG_1.PNG", "notes.txt", ".hidden/a.png"):
        (tmp_path / "cat" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_bytes(b"\0nothing")
    for name in ("__MACOSX/cat/._a.png", ".ipynb_checkpoints/a.png", ".git/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"\0nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "folder.png").mkdir()
    found = load(str(tmp_path))
    assert found.classes == ("cat",)
    assert len(found.train) == 1


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "Testing"), ("TRAIN", "Valid")])
def test_parts_are_told_from_classes_whatever_their_case(train: str, test: str, tmp_path: Path) -> None:
    for part in (train, test):
        for kind in ("cat", "dog"):
            image(tmp_path / part / kind / "a.png")
    found = load(str(tmp_path))
    assert found.classes == ("cat", "dog")
    assert (len(found.train), len(found.test)) == (2, 2)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for kind in ("car", "plane", "train"):
        image(tmp_path / kind / "a.png")
    assert load(str(tmp_path)).classes == ("car", "plane", "train")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="it has no pipes")
def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path) -> None:
    image(tmp_path / "cat" / "a.png")
    os.mkfifo(tmp_path / "cat" / "b.png")
    with pytest.raises(DataError, match=r"b\.png is no ordinary file"):
        load(str(tmp_path))


@pytest.mark.parametrize("suffix", ["gif", "GIF", "jfif", "jpe", "tga", "jp2", "pbm", "pnm", "JPeG"])
def test_no_image_that_can_be_read_is_passed_over(suffix: str, tmp_path: Path) -> None:
    image(tmp_path / "a" / "x.png")
    kind = {"gif": "GIF", "tga": "TGA", "jp2": "JPEG2000", "pbm": "PPM", "pnm": "PPM"}.get(suffix.lower(), "JPEG")
    image(tmp_path / "a" / f"y.{suffix}", kind=kind)
    assert len(load(str(tmp_path)).train) == 2


@pytest.mark.parametrize("suffix", ["heic", "HEIC", "cr2", "svg"])
def test_images_that_cannot_be_read_are_not_left_out_silently(suffix: str, tmp_path: Path) -> None:
    image(tmp_path / "a" / "x.png")
    (tmp_path / "a" / f"y.{suffix}").write_bytes(b"photo")
    with pytest.raises(DataError, match=rf"y.{suffix}: images of the kind .{suffix} are not read; save it as PNG or"):
        load(str(tmp_path))


def test_links_to_images_and_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    image(tmp_path / "store" / "one.png", 1)
    image(tmp_path / "store" / "deep" / "two.png", 2)
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "link.png").symlink_to(tmp_path / "store" / "one.png")
    (tmp_path / "set" / "a" / "below").symlink_to(tmp_path / "store" / "deep")
    (tmp_path / "set" / "a" / "circle").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "store")
    found = load(str(tmp_path / "set"))
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert sorted(found.train.images[:, 0, 0, 0].tolist()) == [1, 1, 2, 2]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    image(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "y.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"a/y.png cannot be read: No such file or directory"):
        load(str(tmp_path))


def test_names_in_any_script_and_in_either_form_of_an_accent_are_classes(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    image(tmp_path / "train" / composed / "übung 1.png", 1)
    image(tmp_path / "train" / "猫" / "x.png", 2)
    image(tmp_path / "test" / decomposed / "x.png", 3)
    found = load(str(tmp_path))
    assert found.classes == (composed, "猫")
    assert found.test is not None
    assert found.test.labels.tolist() == [0]


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/a\xff"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes text only")
    image(Path(os.fsdecode(folder)) / "x.png")
    assert len(load(str(tmp_path)).train) == 1


def test_an_image_that_changes_is_decoded_again(tmp_path: Path) -> None:
    image(tmp_path / "a" / "x.png", 1)
    assert load(str(tmp_path)).train.images.unique().tolist() == [1]
    image(tmp_path / "a" / "x.png", 222)
    assert load(str(tmp_path)).train.images.unique().tolist() == [222]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "unknown data set ''"),
        ("a\0b", "cannot be read: .*null|unknown data set"),
        ("x" * 5000, "cannot be read: .*too long|unknown data set"),
        ("~nobody-of-this-name/x", "cannot be read: |no folder"),
        (None, "None cannot be read: "),
        (3, "3 cannot be read: "),
    ],
)
def test_what_is_no_name_is_refused(name: object, message: str) -> None:
    with pytest.raises((DataError, UnknownNameError), match=message):
        load(name)  # type: ignore[arg-type]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").touch()
    with pytest.raises(DataError, match="x.parquet' is a file; give the folder that holds it"):
        load(str(tmp_path / "x.parquet"))
