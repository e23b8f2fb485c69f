"""Columns as pandas and ``datasets`` write them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet
import pytest

from fedmerge.data import load
from fedmerge.errors import DataError

PIXELS = [np.full((4, 6), 40 * k, np.uint8) for k in range(4)]


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


ENCODED = [png(pixels) for pixels in PIXELS]


def write(folder: Path, labels: Any, images: Any = None, name: str = "train.parquet", column: str = "label") -> Path:
    images = ENCODED[: len(labels)] if images is None else images
    pa.parquet.write_table(pa.table({"img": images, column: labels}), folder / name)
    return folder


@pytest.mark.parametrize(
    ("images", "lists"),
    [
        (pa.array(ENCODED, pa.binary()), False),
        (pa.array(ENCODED, pa.large_binary()), False),
        (pa.array(ENCODED).dictionary_encode(), False),
        (pa.array([{"bytes": e} for e in ENCODED]), False),
        (pa.array([{"path": "x.png", "bytes": e} for e in ENCODED]), False),
        (pa.array([{"path": None, "bytes": e} for e in ENCODED]), False),
        (pa.array([p.tolist() for p in PIXELS]), True),
        (pa.array([p.tolist() for p in PIXELS], pa.list_(pa.list_(pa.uint8(), 6), 4)), True),
        (pa.array([p.tolist() for p in PIXELS], pa.large_list(pa.large_list(pa.float64()))), True),
        (pa.array([p[..., None].tolist() for p in PIXELS]), True),
        (pa.array([p[None].tolist() for p in PIXELS]), True),
    ],
)
def test_images_are_read_from_every_type_that_holds_them(images: pa.Array, lists: bool, tmp_path: Path) -> None:
    found = load(str(write(tmp_path, [0, 1, 2, 1], images)))
    np.testing.assert_array_equal(found.train.images[:, 0], PIXELS)


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
        *(pa.float32(), pa.float64(), pa.decimal128(20, 1)),
    ],
)
def test_whole_numbers_of_every_type_are_labels(kind: pa.DataType, tmp_path: Path) -> None:
    found = load(str(write(tmp_path, pa.array([2, 0, 1, 2]).cast(kind))))
    assert found.train.labels.tolist() == [2, 0, 1, 2]
    assert found.classes == ("0", "1", "2")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_text_of_every_type_is_a_label(kind: pa.DataType, tmp_path: Path) -> None:
    found = load(str(write(tmp_path, pa.array(["ü", "cat", "ant", "cat"]).cast(kind))))
    assert found.classes == ("ant", "cat", "ü")
    assert found.train.labels.tolist() == [2, 1, 0, 1]


def test_numbers_written_as_text_keep_their_order_as_numbers(tmp_path: Path) -> None:
    found = load(str(write(tmp_path, ["10", "9", "2", "9"])))
    assert found.classes == ("2", "9", "10")
    assert found.train.labels.tolist() == [2, 1, 0, 1]


def test_truth_values_are_two_classes(tmp_path: Path) -> None:
    found = load(str(write(tmp_path, [True, True, False])))
    assert (found.classes, found.train.labels.tolist()) == (("False", "True"), [1, 1, 0])


@pytest.mark.parametrize("name", ["label", "labels", "fine_label", "target", "Label", "class"])
def test_the_label_column_has_one_of_its_usual_names(name: str, tmp_path: Path) -> None:
    assert load(str(write(tmp_path, [1, 0], column=name))).train.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "labels",
    [
        pd.Series([1, 0, 2, 1], dtype="Int64"),
        pd.Series([1, 0, 2, 1], dtype="float32"),
        pd.Series([1, 0, 2, 1], dtype="category"),
        pd.Series([1, 0, 2, 1], dtype="object"),
        pd.Series([1, 0, 2, 1], dtype="int64[pyarrow]"),
    ],
)
def test_frames_of_pandas_with_an_index_are_read(labels: pd.Series, tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": ENCODED, "label": labels}).set_index(pd.Index([7, 3, 5, 1]))
    frame.to_parquet(tmp_path / "train.parquet")
    assert "__index_level_0__" in pa.parquet.read_schema(tmp_path / "train.parquet").names
    assert load(str(tmp_path)).train.labels.tolist() == [1, 0, 2, 1]


def test_a_missing_nullable_label_is_named_by_its_row(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": ENCODED[:3], "label": pd.Series([1, pd.NA, 0], dtype="Int64")})
    frame.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"row 1 of .*train.parquet: column label has no label; give it one"):
        load(str(tmp_path))


def test_datasets_of_hugging_face_are_read(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])})
    images = [PIL.Image.fromarray(pixels) for pixels in PIXELS]
    datasets.Dataset.from_dict({"image": images, "label": [2, 0, 1, 0]}, features=features).to_parquet(
        str(tmp_path / "train.parquet")
    )
    found = load(str(tmp_path))
    assert (found.classes, found.train.labels.tolist()) == (("ant", "bee", "cat"), [2, 0, 1, 0])
    np.testing.assert_array_equal(found.train.images[:, 0], PIXELS)


def test_arrays_of_hugging_face_are_read(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Array3D((4, 6, 1), "uint8"), "label": datasets.Value("int32")})
    rows = {"image": [p[..., None] for p in PIXELS], "label": [1, 0, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    np.testing.assert_array_equal(load(str(tmp_path)).train.images[:, 0], PIXELS)


def test_shards_may_differ_in_their_types(tmp_path: Path) -> None:
    write(tmp_path, pa.array([2, 0], pa.int8()), pa.array(ENCODED[:2]), "train-0.parquet")
    table = pa.table({"label": pa.array([1.0, 3.0]), "more": ["x", "y"], "img": [{"bytes": e} for e in ENCODED[2:]]})
    pa.parquet.write_table(table, tmp_path / "train-1.parquet", row_group_size=1)
    found = load(str(tmp_path))
    assert found.train.labels.tolist() == [2, 0, 1, 3]
    np.testing.assert_array_equal(found.train.images[:, 0], PIXELS)


def test_text_is_numbered_once_for_all_shards_and_parts(tmp_path: Path) -> None:
    write(tmp_path, ["dog", "ant"], ENCODED[:2], "train-0.parquet")
    write(tmp_path, ["cat", "dog"], ENCODED[2:], "train-1.parquet")
    write(tmp_path, ["dog", "cat"], ENCODED[2:], "test.parquet")
    found = load(str(tmp_path))
    assert found.classes == ("ant", "cat", "dog")
    assert found.train.labels.tolist() == [2, 0, 1, 2]
    assert found.test is not None
    assert found.test.labels.tolist() == [2, 1]


def test_class_names_may_be_a_table_as_in_a_card_and_other_metadata_is_passed_over(tmp_path: Path) -> None:
    names = {str(k): f"c{k}" for k in reversed(range(11))}
    for about, expected in (
        ({"info": {"features": {"label": {"names": names}}}}, tuple(f"c{k}" for k in range(11))),
        ({"info": None}, ("0", "1")),
        ([1], ("0", "1")),
    ):
        table = pa.table({"img": ENCODED[:2], "label": [1, 0]}).replace_schema_metadata(
            {"huggingface": json.dumps(about)}
        )
        pa.parquet.write_table(table, tmp_path / "train.parquet")
        assert load(str(tmp_path)).classes == expected
    pa.parquet.write_table(table.replace_schema_metadata({"huggingface": "{"}), tmp_path / "train.parquet")
    assert load(str(tmp_path)).classes == ("0", "1")


def _texts(folder: Path) -> None:
    write(folder, ["a", "b"], name="train.parquet")
    write(folder, ["c"], name="test.parquet")


def _kinds(folder: Path) -> None:
    write(folder, ["a", "b"], name="train-0.parquet")
    write(folder, [1, 2], name="train-1.parquet")


def _twice(folder: Path) -> None:
    table = pa.Table.from_arrays([pa.array(ENCODED[:1]), pa.array([0]), pa.array([1])], ["img", "label", "label"])
    pa.parquet.write_table(table, folder / "train.parquet")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: write(f, [0, -1]), "the label of row 1 of .*train.parquet is -1; expected 0 to 0"),
        (lambda f: write(f, [0, 10**12]), "labels run to 1000000000000, .*number them from 0 upwards"),
        (lambda f: write(f, pa.array([2**64 - 1], pa.uint64())), "labels run to 18446744073709551615"),
        (lambda f: write(f, [0, 0.5]), "row 1 of .*train.parquet: column label holds 0.5; expected a whole number or"),
        (
            lambda f: write(f, pd.to_datetime(["2020-01-01"])),
            "column label holds 2020-01-01 00:00:00; expected a whole",
        ),
        (_texts, "the label of row 0 of .*test.parquet is 'c', which the train part does not have"),
        (
            _kinds,
            "labels are of two kinds, that of row 1 of .*-0.parquet is str and that of row 1 of .*-1.parquet is int",
        ),
        (_twice, "train.parquet has 2 columns label; remove all but one"),
        (lambda f: (f / "train.parquet").touch(), r"train.parquet: cannot read parquet: it is empty \(0 bytes\)"),
        (lambda f: (f / "train.parquet").write_bytes(b"PAR1 nothing PAR1"), "train.parquet: cannot read parquet: "),
        (
            lambda f: (f / "train.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
            "train.parquet: cannot read parquet: it is a git-lfs pointer, .*run `git lfs pull`",
        ),
    ],
)
def test_what_cannot_be_read_is_named_with_file_row_and_value(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        load(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"pixels": [1], "label": [0]},
            "train.parquet has columns pixels, label; expected img or image or .* and label or fine_label",
        ),
        (
            {"img": [{"bytes": None, "path": "x.png"}], "label": [0]},
            "row 0 of .*: column img holds 'x.png' in place of",
        ),
        ({"img": ["x.png"], "label": [0]}, "row 0 of .*: column img holds 'x.png' in place of an image; store the"),
        ({"img": [3], "label": [0]}, "row 0 of .*: column img holds 3; expected an image: encoded bytes, a struct"),
        ({"img": [None], "label": [0]}, "row 0 of .*: column img holds nothing; expected an image"),
        ({"img": [[[1], [1, 2]]], "label": [0]}, "row 0 of .*: column img holds lists of different lengths"),
        ({"img": [[1, 2]], "label": [0]}, r"row 0 of .*: it holds uint8 of shape \(2,\); expected \(H, W\)"),
        ({"img": [[[0.5]]], "label": [0]}, "row 0 of .*: its values run from 0.5 to 0.5; expected whole numbers"),
        ({"img": [[[300]]], "label": [0]}, "row 0 of .*: its values run from 300 to 300; expected whole numbers"),
        (
            {"img": [[[[1, 2]], [[1, 2]]]], "label": [0]},
            r"row 0 of .*: its shape is \(2, 1, 2\); expected 1, 3 or 4 channels",
        ),
        ({"img": [b""], "label": [0]}, "cannot decode row 0 of .*: it is empty"),
        (
            {"img": [{"bytes": b"x"}], "label": pa.array([None], pa.int64())},
            "row 0 of .*: column label has no label; give it one, or leave the row out",
        ),
        ({"img": [b"x"], "label": [0.5]}, "row 0 of .*: column label holds 0.5; expected a whole number or text"),
        ({"img": [b"x"], "label": [float("nan")]}, "row 0 of .*: column label has no label; give it one"),
        ({"img": [b"x"], "label": [float("inf")]}, "row 0 of .*: column label holds inf; expected a whole number"),
        ({"img": [b"x"], "label": [""]}, "row 0 of .*: column label has no label; give it one"),
        ({"img": [b"x"], "label": [[1, 2]]}, r"row 0 of .*: column label holds \[1, 2\]; expected a whole number"),
        ({"img": [b"x"], "label": [b"1"]}, "row 0 of .*: column label holds b'1'; expected a whole number or text"),
        (
            {"img": pa.array([], pa.struct([("bytes", pa.binary())])), "label": pa.array([], pa.int64())},
            "holds no images",
        ),
    ],
)
def test_a_table_of_another_kind_says_what_was_expected(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pa.parquet.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=message):
        load(str(tmp_path))
