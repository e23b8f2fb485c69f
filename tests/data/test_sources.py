"""Data sets from real files: parquet as the hub stores it, folders of images, torchvision's raw files."""

import gc
import gzip
import http.server
import io
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from fedmerge.data import Images, load, names, summaries
from fedmerge.data._catalogue import _Published
from fedmerge.errors import DataError, UnknownNameError

REAL_DATA = os.environ.get("FEDMERGE_DATA")  # before a fixture hides it
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _encoded(pixels: torch.Tensor, kind: str = "PNG") -> bytes:
    array = pixels.numpy()
    image = PIL.Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
    stream = io.BytesIO()
    image.save(stream, kind, lossless=True)
    return stream.getvalue()


def _write_parquet(
    path: Path,
    images: torch.Tensor,
    labels: Sequence[Any],
    *,
    columns: tuple[str, str] = ("img", "label"),
    words: Sequence[str] | None = WORDS,
    kind: str = "PNG",
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": _encoded(image, kind), "path": None} for image in images]
    table = pa.table({columns[0]: cells, columns[1]: list(labels)})
    if words is not None:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": list(words), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pa.parquet.write_table(table, path)


def _write_mnist(root: Path, digits: Images) -> None:
    """Digits 0 to 99 as training and 100 to 119 as test part, in two training shards."""
    pixels, labels = digits.images, digits.labels.tolist()
    for shard, rows in enumerate((slice(0, 60), slice(60, 100))):
        _write_parquet(root / "mnist" / f"train-0000{shard}-of-00002.parquet", pixels[rows], labels[rows])
    _write_parquet(root / "mnist" / "test-00000-of-00001.parquet", pixels[100:120], labels[100:120])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection goes to a port where nobody listens."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


def test_digits_are_the_images_of_scikit_learn() -> None:
    import sklearn.datasets

    theirs = sklearn.datasets.load_digits()
    found = load("digits")
    assert found.test is None
    assert found.shape == (1, 8, 8)
    assert found.train.images.amax() == 255
    ours = found.train.images[:, 0].double().numpy() * 16 / 255
    np.testing.assert_allclose(ours, theirs.images, atol=0.032)  # half a step of 1/255 is 0.031 of 1/16
    np.testing.assert_array_equal(found.train.labels, theirs.target)


def test_the_constants_of_digits_normalise_them(digits: Images) -> None:
    normal = digits.normalise(digits.images)
    assert float(normal.mean()) == pytest.approx(0, abs=1e-3)
    assert float(normal.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_a_named_set_comes_from_a_local_folder_of_parquet(
    tmp_path: Path, digits: Images, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    _write_mnist(tmp_path, digits)
    if given == "environment":
        monkeypatch.setenv("FEDMERGE_DATA", str(tmp_path))
    found = load("mnist", tmp_path if given == "argument" else None)
    assert found.test is not None
    torch.testing.assert_close(found.train.images, digits.images[:100])
    torch.testing.assert_close(found.test.images, digits.images[100:120])
    torch.testing.assert_close(found.test.labels, digits.labels[100:120])
    assert found.classes == WORDS
    assert (found.train.mean, found.train.std) == ((0.1307,), (0.3081,))


def test_colour_images_keep_every_pixel_through_webp(tmp_path: Path) -> None:
    pixels = torch.randint(256, (4, 3, 6, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    _write_parquet(tmp_path / "train-0.parquet", pixels, [0, 1, 2, 3], words=None, kind="WEBP")
    found = load(str(tmp_path))
    torch.testing.assert_close(found.train.images, pixels)
    assert found.test is None
    assert found.classes == ("0", "1", "2", "3")
    assert (found.train.mean, found.train.std) == ((0.5,) * 3, (0.25,) * 3)


def test_a_folder_of_parquet_may_keep_its_files_under_data_with_any_name_and_words_as_labels(
    tmp_path: Path, digits: Images
) -> None:
    animals = ["cat", "ant", "cat"]
    _write_parquet(
        tmp_path / "data" / "all.parquet", digits.images[:3], animals, columns=("image", "label"), words=None
    )
    found = load(str(tmp_path))
    assert found.classes == ("ant", "cat")
    assert found.train.labels.tolist() == [1, 0, 1]


def test_labels_may_be_fine_labels(tmp_path: Path, digits: Images) -> None:
    _write_parquet(tmp_path / "train.parquet", digits.images[:3], [2, 0, 1], columns=("img", "fine_label"), words=None)
    assert load(str(tmp_path)).train.labels.tolist() == [2, 0, 1]


def test_a_folder_of_images_by_class_is_a_data_set(tmp_path: Path, digits: Images) -> None:
    rows = {"0": [0, 10], "1": [1, 11], "2": [2]}
    for word, members in rows.items():
        for row in members:
            (tmp_path / "mine" / word).mkdir(parents=True, exist_ok=True)
            (tmp_path / "mine" / word / f"{row:04}.png").write_bytes(_encoded(digits.images[row]))
    (tmp_path / "mine" / "README.md").write_text("not an image")
    (tmp_path / "mine" / "empty").mkdir()
    found = load(str(tmp_path / "mine"))
    assert (found.name, found.test, found.classes) == ("mine", None, ("0", "1", "2"))
    torch.testing.assert_close(found.train.images, digits.images[[0, 10, 1, 11, 2]])
    assert found.train.labels.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_a_folder_with_train_and_test_parts_keeps_them_apart(tmp_path: Path, digits: Images, test: str) -> None:
    for part, row in (("train", 0), ("train", 1), (test, 11)):
        folder = tmp_path / part / str(int(digits.labels[row]))
        folder.mkdir(parents=True)
        (folder / "x.PNG").write_bytes(_encoded(digits.images[row]))
    found = load(str(tmp_path))
    assert found.test is not None
    assert found.train.labels.tolist() == [0, 1]
    assert found.test.labels.tolist() == [1]  # by the training part's numbering, though it has no 0
    torch.testing.assert_close(found.test.images, digits.images[11:12])


def test_grey_images_among_coloured_ones_become_coloured(tmp_path: Path, digits: Images) -> None:
    grey, coloured = digits.images[0], torch.full((3, 8, 8), 9, dtype=torch.uint8)
    for word, pixels in (("a", grey), ("b", coloured)):
        (tmp_path / word).mkdir()
        (tmp_path / word / "x.png").write_bytes(_encoded(pixels))
    found = load(str(tmp_path))
    torch.testing.assert_close(found.train.images, torch.stack([grey.expand(3, -1, -1), coloured]))


@pytest.mark.parametrize("grey_part", ["train", "test"])
def test_a_grey_part_beside_a_coloured_one_becomes_coloured(tmp_path: Path, digits: Images, grey_part: str) -> None:
    grey, coloured = digits.images[0], torch.full((3, 8, 8), 9, dtype=torch.uint8)
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "x.png").write_bytes(_encoded(grey if part == grey_part else coloured))
    found = load(str(tmp_path))
    assert found.test is not None
    parts = {"train": found.train.images[0], "test": found.test.images[0]}
    torch.testing.assert_close(parts.pop(grey_part), grey.expand(3, -1, -1))
    (other,) = parts.values()
    torch.testing.assert_close(other, coloured)


@pytest.mark.parametrize(
    ("names", "test"),
    [
        (["train", "train", "validation"], [2]),
        (["train", "train", "validation", "test"], [3]),
        (["my-train", "my-train", "my-TEST"], [2]),
        (["digits_latest", "values", "testset"], [2]),
    ],
)
def test_parquet_files_are_the_part_that_a_word_of_their_name_says(
    tmp_path: Path, digits: Images, names: list[str], test: list[int]
) -> None:
    for row, name in enumerate(names):
        _write_parquet(tmp_path / f"{name}-{row}.parquet", digits.images[[row, row]], [row, 1], words=WORDS)
    found = load(str(tmp_path))
    assert found.test is not None
    assert found.train.labels.tolist() == [0, 1, 1, 1]
    assert found.test.labels.tolist() == [*test, 1]


def test_the_second_load_does_not_decode(tmp_path: Path, digits: Images, own_folders: Path) -> None:
    _write_mnist(tmp_path, digits)
    load("mnist", tmp_path)
    entries = {path: path.stat().st_mtime_ns for path in own_folders.rglob("*.npy")}
    assert len(entries) == 4
    assert load("mnist", tmp_path).train.counts()
    assert {path: path.stat().st_mtime_ns for path in own_folders.rglob("*.npy")} == entries


def test_the_hub_client_reads_the_same_images(tmp_path: Path, digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub's own client also takes a folder in the hub's layout, so all but the download is real.
    import huggingface_hub.constants

    _write_mnist(tmp_path / "hub", digits)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    published = _Published("mnist", str(tmp_path / "hub" / "mnist"), "MNIST", (0.1307,), (0.3081,))
    found = published.load(None)
    assert found.test is not None
    torch.testing.assert_close(found.train.images, digits.images[:100])
    torch.testing.assert_close(found.test.labels, digits.labels[100:120])
    assert found.classes == WORDS


def test_torchvisions_files_are_the_last_resort(
    own_folders: Path, digits: Images, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = own_folders / "torchvision" / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, rows in (("train", slice(0, 50)), ("t10k", slice(50, 60))):
        pixels, labels = digits.images[rows, 0].numpy(), digits.labels[rows].numpy().astype(np.uint8)
        for stem, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
            (raw / f"{part}-{stem}-ubyte").write_bytes(head + array.tobytes())
            (raw / f"{part}-{stem}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    found = load("mnist")
    assert found.test is not None
    torch.testing.assert_close(found.train.images, digits.images[:50])
    torch.testing.assert_close(found.test.labels, digits.labels[50:60])
    assert len(found.classes) == 10


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_without_network_or_files_one_line_names_all_three_places_at_once(
    name: str, tmp_path: Path, no_network: None
) -> None:
    started = time.perf_counter()
    with pytest.raises(DataError) as raised:
        load(name, tmp_path)
    assert time.perf_counter() - started < 10
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"data set {name!r} cannot be had; local folder: no train-*.parquet in {tmp_path / name}")
    assert "Hugging Face hub: no connection to huggingface.co" in message
    assert "torchvision: no connection to" in message


def test_an_unset_folder_is_named_as_the_reason(no_network: None) -> None:
    with pytest.raises(DataError, match="local folder: FEDMERGE_DATA is not set"):
        load("mnist")


def test_a_broken_local_file_is_not_passed_over_for_a_download(tmp_path: Path, digits: Images) -> None:
    _write_mnist(tmp_path, digits)
    shard = tmp_path / "mnist" / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: cannot read parquet"):
        load("mnist", tmp_path)


def test_a_local_set_without_its_test_part_is_refused(tmp_path: Path, digits: Images) -> None:
    _write_parquet(tmp_path / "mnist" / "train-0.parquet", digits.images[:2], [0, 1])
    with pytest.raises(DataError, match=r"mnist holds train-.* without test-.*; add the test part"):
        load("mnist", tmp_path)


def test_an_image_that_cannot_be_decoded_is_an_error(tmp_path: Path) -> None:
    table = pa.table({"img": [{"bytes": b"no image", "path": None}], "label": [0]})
    pa.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"cannot decode row 0 of .*train.parquet: it is no image of a known format"):
        load(str(tmp_path))


def test_a_truncated_image_is_an_error(tmp_path: Path, digits: Images) -> None:
    whole = _encoded(digits.images[0])
    pa.parquet.write_table(
        pa.table({"img": [{"bytes": whole[: len(whole) - 30], "path": None}], "label": [0]}), tmp_path / "train.parquet"
    )
    with pytest.raises(DataError, match=r"cannot decode row 0 of .*train.parquet: "):
        load(str(tmp_path))


def test_parts_that_name_their_classes_differently_are_refused(tmp_path: Path, digits: Images) -> None:
    _write_parquet(tmp_path / "train.parquet", digits.images[:2], [0, 1], words=("a", "b"))
    _write_parquet(tmp_path / "test.parquet", digits.images[:2], [0, 1], words=("b", "a"))
    with pytest.raises(DataError, match=r"names its classes \('b', 'a'\)"):
        load(str(tmp_path))


def test_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    for word, side in (("a", 8), ("b", 9)):
        (tmp_path / word).mkdir()
        (tmp_path / word / "x.png").write_bytes(_encoded(torch.zeros(1, side, side, dtype=torch.uint8)))
    with pytest.raises(DataError, match="b/x.png is 9x9 pixels, a/x.png is 8x8; resize all images to one size"):
        load(str(tmp_path))


def test_parts_of_two_shapes_are_refused(tmp_path: Path) -> None:
    for part, side in (("train", 8), ("test", 9)):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "x.png").write_bytes(_encoded(torch.zeros(1, side, side, dtype=torch.uint8)))
    with pytest.raises(DataError, match=r"test images are \(1, 9, 9\), training images \(1, 8, 8\)"):
        load(str(tmp_path))


def test_a_class_that_only_the_test_part_has_is_refused(tmp_path: Path, digits: Images) -> None:
    for part, word in (("train", "a"), ("test", "b")):
        (tmp_path / part / word).mkdir(parents=True)
        (tmp_path / part / word / "x.png").write_bytes(_encoded(digits.images[0]))
    with pytest.raises(DataError, match="class folder b is in the test part only; train has a"):
        load(str(tmp_path))


def test_a_folder_without_images_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither train-.* files nor class folders of images"):
        load(str(tmp_path))


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder '.*nowhere'; give an existing folder, or one of digits, cifar10"):
        load(str(tmp_path / "nowhere"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown data set 'cifar11'.*did you mean 'cifar10'"):
        load("cifar11")


def test_every_name_has_a_summary() -> None:
    assert names() == ("digits", "cifar10", "cifar100", "mnist", "fashion-mnist")
    assert set(names()) < set(summaries())


@pytest.mark.slow
@pytest.mark.skipif(REAL_DATA is None, reason="needs FEDMERGE_DATA with the real MNIST")
def test_the_real_mnist_has_its_published_sizes_and_statistics() -> None:
    found = load("mnist", REAL_DATA)
    assert found.test is not None
    assert (len(found.train), len(found.test), found.shape) == (60_000, 10_000, (1, 28, 28))
    pixels = found.train.images[::10].double() / 255
    assert float(pixels.mean()) == pytest.approx(found.train.mean[0], abs=2e-3)
    assert float(pixels.std()) == pytest.approx(found.train.std[0], abs=2e-3)


class _NotThere(http.server.BaseHTTPRequestHandler):
    """Answers every request with 404."""

    def do_GET(self) -> None:
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def empty_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NotThere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # torchvision drops the answer without closing it
def test_places_that_answer_but_lack_the_set_say_so(
    tmp_path: Path, empty_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [empty_server])
    with pytest.raises(DataError, match=r"Hugging Face hub: nobody/mnist: .*; torchvision: .*404"):
        _Published("mnist", "nobody/mnist", "MNIST", (0.1307,), (0.3081,)).load(tmp_path)
    gc.collect()
