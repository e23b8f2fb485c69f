"""``fedmerge spec``: a network's symmetries from the command line."""

import sys
from pathlib import Path

import pytest

from experiments import cli


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedmerge", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_spec_prints_the_table_and_draws_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "new" / "mlp.png"
    assert call(monkeypatch, "spec", "mlp", "--dataset", "digits", "--width", 6, "--draw", drawn) == 0
    shown = capsys.readouterr().out
    assert "fc1        6        2.9  fc1.*[0] | fc2.weight[1]" in shown
    assert f"picture: {drawn}" in shown
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("spec", "resnet21"), "did you mean 'resnet20'?"),
        (("spec", "cnn", "--dataset", "digits"), "8x8"),
        (("spec", "mlp", "--input-shape", "3,32"), "expected 3 numbers"),
        (("spec", "mlp", "--dataset", "digits", "--classes", "3"), "--classes beside --dataset digits, which says it"),
        (("spec", "mlp", "--dataset", "digits", "--input-shape", "1,8,8"), "--input-shape beside --dataset digits"),
        (
            ("compare", "a", "b", "--model", "mlp", "--dataset", "digits", "--classes", "3"),
            "--classes beside --dataset",
        ),
        (
            ("merge", "a", "b", "--model", "mlp", "-o", "c", "--dataset", "digits", "--classes", "3"),
            "leave one of them out",
        ),
        (("spec", "mlp", "--draw", "mlp.gif"), "mlp.gif: a picture is a .png, .svg, .pdf file"),
        (("spec", "mlp", "--draw", "taken/mlp.png"), "cannot be written"),
    ],
)
def test_spec_refuses_bad_input_in_one_line(
    args: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *args) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""
