"""What is brought by name and cannot be used: one line, before anything trains."""

from pathlib import Path

import pytest
from brought import call, options

pytestmark = pytest.mark.usefixtures("folder")

WRONG = """
import sys
from torch import nn
from dataclasses import replace
from mine import *
number = 3
def needs(depth): "A net."
def fails(): raise RuntimeError("no weights\\nhere")
def nothing(): return None
def one_class(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
def greedy(labels, clients, rng): return [np.arange(len(labels))] * clients
def late(labels, clients): return []
def bare(): return np.zeros((9, 5)), None
def nameless(): return [np.zeros((9, 5))], None
def prices(): return (np.zeros((9, 5)), np.zeros((9, 1))), None
def table(): return (np.zeros((99, 5)), np.arange(99) % 3), None
def labels(): return (np.zeros((9, 1, 4, 4), np.uint8), np.zeros(9)), None
def beyond(): return fm.data.Dataset("d", replace(fm.data.as_data((torch.zeros(9, 16), torch.arange(9)), Net(), loss=lambda a, b: a.sum()), classes=("a", "b")), None)
def pictures(): return np.zeros((9, 1, 4, 4), np.uint8)
def align(params, to): "An aligner that takes too little."
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "absent:net"}, "model 'absent:net': importing absent failed with ModuleNotFoundError: No module named"),
        ({"model": "broken:net"}, "importing broken failed with SyntaxError"),
        ({"model": "leaves:net"}, "importing leaves failed with SystemExit: 3"),
        ({"model": "wrong:nett"}, "there is no 'nett' in wrong ("),
        ({"model": "wrong:number"}, "its make is 3; give the function or class"),
        ({"model": "wrong:needs"}, "it is called with (classes, in_shape), which it does not take: too many positional"),
        ({"model": "wrong:fails"}, "failed with RuntimeError: no weights here; expected a function that returns"),
        ({"model": "wrong:nothing"}, "model 'wrong:nothing' returned a NoneType; expected a torch.nn.Module"),
        ({"model": "wrong:one_class"}, "gives shape (1, 1) for images of shape (1, 1, 4, 4); expected logits (1, 3)"),
        ({"model": "wrong:reverse"}, "model 'wrong:reverse' is a Aligner; expected a Model, or the function"),
        ({"partition": "wrong:greedy"}, "must return 5 lists that together hold each position from 0 to 95 once"),
        ({"partition": "wrong:late"}, "it is called with (labels, clients, rng), which it does not take: too many"),
        ({"dataset": "wrong:needs"}, "data set 'wrong:needs' is called without arguments, which it does not take"),
        ({"dataset": "wrong:fails"}, "data set 'wrong:fails' failed with RuntimeError: no weights here"),
        ({"dataset": "wrong:pictures"}, "returned a ndarray; expected a fedmerge.data.Dataset, or (train, test)"),
        ({"dataset": "wrong:bare"}, "wrong:bare (train) is a ndarray; expected Images, (x, y), or a data set or loader"),
        ({"dataset": "wrong:nameless"}, "wrong:nameless (train) has no labels; expected (x, y), or a data set or loader"),
        ({"dataset": "wrong:prices"}, "labels are torch.float64 (9, 1); expected int64 (9,): a run deals rows to clients by"),
        ({"dataset": "wrong:table"}, "model 'mine:net' failed with RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ({"dataset": "wrong:table", "model": "mlp"}, "model 'mlp' for 3 classes and images of shape (5,); expected at least"),
        ({"dataset": "wrong:labels"}, "wrong:labels (train): labels are torch.float64 (9,); expected int64 (9,)"),
        ({"dataset": "wrong:beyond"}, "(train): label 8 is beyond the 2 classes that are named; name every class, by label,"),
        ({"aligner": "wrong:align"}, "it is called with (params, to=, spec=, rng=, restarts=), which it does not take"),
        ({"aligner": "mine:backwards"}, "missing a required argument: 'model' (fedmerge.align.Aligner says what one"),
        ({"strategy": "wrong:needs"}, "it is called with (bench=, pipeline=, on_stage="),
        ({"repair": "wrong:needs"}, "called with (model, params, data=, sources=, weights=, device=), which it does not"),
        ({"retrain": "wrong:needs"}, "called with (model, params, public, teachers=, recipe=, epochs=, generator=, device="),
        ({"controls": "ensemble, wrong:needs"}, "called with (world, results, stage), which it does not take"),
        ({"controls": "wrong:second"}, "it is called with (world, results, stage), which it does not take"),
        ({"controls": "publik-only"}, "unknown control 'publik-only'"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_in_one_line_before_anything_trains(
    given: dict[str, str],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "wrong.py").write_text(WRONG)
    (folder / "broken.py").write_text("def (")
    (folder / "leaves.py").write_text("raise SystemExit(3)")
    arguments = options({"model": "mine:net", "dataset": "mine:spots", **given})
    assert call(monkeypatch, "run", *arguments, "--out", "out") == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (folder / "out").exists()
