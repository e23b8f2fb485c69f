"""The records of a run against what the documentation says of them, and against values of the wrong kind."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from server.records import Climb, Curve, Env, Failure, HandedOut, Interpolation, Row, Sizes, Stage, Summary

TEXT = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
SECTION = TEXT.split("## A run directory")[1].split("## A round")[0]


def names(record: type) -> list[str]:
    return [f.name for f in fields(record)]


@pytest.mark.parametrize(
    ("file", "record"), [("metrics.jsonl", Row), ("env.json", Env), ("summary.json", Summary)], ids=str
)
def test_the_table_of_files_names_the_fields_of_each_record_in_their_order(file: str, record: type) -> None:
    (line,) = re.findall(rf"^\| `{re.escape(file)}` \| (.*) \|$", SECTION, flags=re.MULTILINE)
    outside_brackets = re.sub(r"\([^)]*\)", "", line)
    assert re.findall(r"`(\w+)`", outside_brackets) == names(record)


@pytest.mark.parametrize(
    ("key", "record"),
    [
        ("stages", Stage),
        ("failures", Failure),
        ("merges", Climb),
        ("interpolation", Interpolation),
        ("sizes", Sizes),
        ("handed_out", HandedOut),
    ],
)
def test_the_parts_of_a_summary_are_described_with_their_fields_in_their_order(key: str, record: type) -> None:
    (braces,) = re.findall(rf"`{key}`: [^{{\n]*`\{{(.*)\}}`", SECTION)
    without_types = re.sub(r": (\[.*?\]|\{.*?\})", "", braces)
    assert without_types.split(", ") == names(record)


def test_both_curves_of_a_line_are_described_with_their_fields() -> None:
    assert re.findall(r"(?:naive|aligned): \{(.*?)\}", SECTION) == [", ".join(names(Curve))] * 2


@pytest.mark.parametrize(
    "change",
    [{"round": 1.5}, {"round": True}, {"stage": 7}, {"loss": "0.5"}, {"client": "2"}, {"examples": 0.5}],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_not_written(change: dict) -> None:
    good = {"round": 1, "stage": "merged", "split": "test", "loss": 0.5, "accuracy": 0.5}
    TypeAdapter(Row).validate_python(good)
    with pytest.raises(ValidationError, match=next(iter(change))):
        Row(**{**good, **change})
