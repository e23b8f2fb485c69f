"""``fedmerge compare``: two checkpoints side by side, before and after alignment."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fedmerge as fm
from experiments import cli
from experiments.tools.checkpoints import Architecture, architecture
from experiments.tools.compare import compare


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained network, and the same with its units in another order."""
    folder = tmp_path_factory.mktemp("pair")
    digits = fm.data.load("digits").train.select(range(400))
    model = fm.models.build("mlp", classes=10, in_shape=digits.shape, width=16, seed=0)
    recipe, generator = fm.models.recipe("mlp"), torch.Generator().manual_seed(0)
    params = fm.train(model, model.state_dict(), digits, recipe=recipe, epochs=6, generator=generator).params
    spec = fm.perm_spec(model, torch.zeros(1, *digits.shape))
    permuted = fm.permute(params, spec.random(torch.Generator().manual_seed(1)), spec=spec)
    paths = folder / "a.safetensors", folder / "b.safetensors"
    for path, tensors in zip(paths, (params, permuted), strict=True):
        save_file(tensors, path)
    return paths


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedmerge", "compare", *map(str, args)])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_permuted_copy_is_far_away_answers_alike_and_is_at_hand_once_aligned(pair: tuple[Path, Path]) -> None:
    network, digits = architecture("mlp", dataset="digits", width=16), fm.data.load("digits").train.select(range(300))
    found = compare(*pair, network, seen=digits, points=5)
    assert found.distances["as they came"].relative > 0.5
    assert found.distances["aligned"].l2 == pytest.approx(0, abs=1e-6)
    assert found.agreement is not None
    assert (found.agreement.same, found.units) == (1.0, 32)
    assert found.moved > 20
    before, after = (fm.barrier(found.lines[name]) for name in ("as they came", "aligned"))
    assert before.loss > 0.2
    assert after.loss == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("method", ["repair", "repair-closed-form"])
def test_statistics_on_the_line_are_corrected_to_those_that_both_ends_have_there(
    method: str, tmp_path: Path, digits: fm.data.Images
) -> None:
    some = digits.select(range(300))
    recipe, ends = fm.models.recipe("mlp"), []
    for seed in (0, 1):
        model = fm.models.build("mlp", classes=10, in_shape=some.shape, width=16, seed=seed)
        done = fm.train(
            model, model.state_dict(), some, recipe=recipe, epochs=3, generator=torch.Generator().manual_seed(seed)
        )
        ends.append(done.params)
        save_file(done.params, tmp_path / f"{seed}.safetensors")
    example = some.normalise(some.images[:1])
    network = Architecture(model, example, some)
    found = compare(
        tmp_path / "0.safetensors", tmp_path / "1.safetensors", network, seen=some, repairing=method, points=5
    )
    for i, alpha in enumerate((0.25, 0.5, 0.75), 1):
        weights = (1 - alpha, alpha)
        right = fm.repair(model, fm.average(ends, weights), data=some, method=method, sources=ends, weights=weights)
        even = fm.repair(model, fm.average(ends, weights), data=some, method=method, sources=ends)
        at = found.lines["as they came"].losses[i]
        assert at == pytest.approx(fm.evaluate(model, right, some).loss, rel=1e-6)
        assert alpha == 0.5 or at != pytest.approx(fm.evaluate(model, even, some).loss, rel=1e-4)


def test_compare_prints_a_table_and_draws_the_line(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "line.svg"
    given = ("--model", "mlp", "--width", 16, "--dataset", "digits", "--images", 200, "--points", 3)
    assert call(monkeypatch, *pair, *given, "--repair", "recompute", "--draw", drawn) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("barrier of the loss, over the chord", "On 200 images of digits", "same answer to 100.00 %"):
        assert text in shown
    assert "From a to b in a straight line" in drawn.read_text()
    shape = ("--model", "mlp", "--width", 16, "--input-shape", "1,8,8")
    assert call(monkeypatch, *pair, *shape) == 0  # weights alone need no images
    shown = capsys.readouterr().out
    assert "L2 distance" in shown
    assert "barrier" not in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--aligner", "ste"), "--aligner ste needs images; name a data set"),
        (("--repair", "repair"), "--repair repair corrects points of the line, which needs images; name a data set"),
        (("--draw", "line.png"), "--draw needs images"),
        (("--draw", "line.gif"), "line.gif: a picture is a .png, .svg, .pdf file"),
        (("--points", "1"), "--points 1: expected at least 0 and at least 2"),
        (("--width", "8"), "is --model, --width, --classes or --dataset right?"),
        (("--aligner", "weights-matching"), "did you mean 'weight-matching'?"),
    ],
)
def test_compare_refuses_bad_input_in_one_line(
    args: tuple[str, ...], message: str, pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shape = ("--model", "mlp", "--input-shape", "1,8,8", *(() if "--width" in args else ("--width", "16")))
    assert call(monkeypatch, *pair, *shape, *args) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""
