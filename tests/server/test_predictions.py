"""What a run says of classes and of confidence, against scikit-learn and against the networks that it wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
import short_run
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix

from fedmerge.data import Images
from fedmerge.training import Answers, predict
from server import RunConfig, read_model
from server._predictions import BINS, MOST_CLASSES, Predictions, calibration, confusion


def test_the_bins_and_their_error_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    edges = np.linspace(0, 1, BINS + 1)
    sure = np.concatenate([rng.uniform(0.3, 1, 500), edges[5:]])  # edges too: to which side they fall is part of it
    right = rng.random(len(sure)) < sure**2
    ece, bins = calibration(right, sure)
    accuracy, confidence = calibration_curve(right, sure, n_bins=BINS)
    np.testing.assert_allclose([b.accuracy for b in bins], accuracy, rtol=1e-12)
    np.testing.assert_allclose([b.confidence for b in bins], confidence, rtol=1e-12)
    shares = np.array([b.examples for b in bins]) / len(sure)
    assert shares.sum() == pytest.approx(1)
    assert ece == pytest.approx(float(shares @ np.abs(accuracy - confidence)), rel=1e-12)
    assert ece > 0.1  # sure by far more than right


def test_the_confusion_matrix_is_that_of_scikit_learn_also_of_a_class_without_images() -> None:
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 4, 60), rng.integers(0, 5, 60)
    np.testing.assert_array_equal(confusion(labels, predicted, 5), confusion_matrix(labels, predicted, labels=range(5)))


def _images(labels: list[int], classes: int) -> Images:
    names = tuple(map(str, range(classes)))
    return Images(
        torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), torch.tensor(labels), names, (0.0,), (1.0,), "t"
    )


def test_a_client_has_no_accuracy_in_a_class_that_no_test_image_has() -> None:
    found = Predictions(_images([0, 0, 2], 3))
    for whose in (7, "client-best"):
        found.add(whose, Answers(torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.8, 0.7])))
    said = found.summed(["client-mean", "client-best"])
    assert [(c.client, c.accuracy) for c in said["client_classes"]] == [(7, (0.5, None, 1.0))]
    assert [c.stage for c in said["calibration"]] == ["client-best"]
    assert said["per_class"][0].confusion == ((1, 1, 0), (0, 0, 0), (0, 0, 1))


def test_no_matrix_of_a_million_counts_is_kept() -> None:
    found = Predictions(_images([0, MOST_CLASSES], MOST_CLASSES + 1))
    found.add("merged", Answers(torch.tensor([0, 0]), torch.tensor([1.0, 0.5])))
    said = found.summed(["merged"])
    assert (said["per_class"], len(said["calibration"])) == ((), 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "a"
    short_run.run(path, clients=2, rounds=2, init="pretrained", local_epochs=1, controls="ensemble, plain-average")
    return path


def test_each_network_of_the_last_rounds_table_is_looked_at_once(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    last = {row["stage"] for row in short_run.rows(run) if row["round"] == 2 and row["split"] == "test"}
    networks = [s["stage"] for s in summary["stages"] if s["stage"] in last - {"client-mean"}]
    assert {"client-best", "ensemble", "plain-average", "merged", "retrained"} <= set(networks)
    for part in ("per_class", "calibration"):
        assert [found["stage"] for found in summary[part]] == networks


def test_the_counts_add_up_to_the_accuracies_of_the_table(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    accuracies = {s["stage"]: s["accuracy"] for s in summary["stages"]}
    for found, bins in zip(summary["per_class"], summary["calibration"], strict=True):
        matrix = np.array(found["confusion"])
        assert matrix.sum(1).tolist() == summary["labels"]["test"]
        assert np.trace(matrix) / matrix.sum() == pytest.approx(accuracies[found["stage"]], rel=1e-12)
        right = sum(b["accuracy"] * b["examples"] for b in bins["bins"]) / matrix.sum()
        assert right == pytest.approx(accuracies[found["stage"]], rel=1e-12)


@pytest.mark.parametrize("whose", ["head", "client 1"])
def test_what_is_said_is_what_the_written_network_answers(run: Path, whose: str) -> None:
    summary, config = json.loads((run / "summary.json").read_text()), RunConfig.read(run / "config.toml")
    test, client = config.setup().split().test_images, whose.startswith("client")
    file = run / ("clients/round-2-client-1.safetensors" if client else "model.safetensors")
    logits = predict(config.setup().network(), read_model(file), test)
    matrix = confusion_matrix(test.labels, logits.argmax(1), labels=range(10))
    if client:
        found = next(c["accuracy"] for c in summary["client_classes"] if c["client"] == 1)
        assert found == pytest.approx((matrix.diagonal() / matrix.sum(1)).tolist(), rel=1e-12)
        return
    found = {part: next(f for f in summary[part] if f["stage"] == whose) for part in ("per_class", "calibration")}
    np.testing.assert_array_equal(found["per_class"]["confusion"], matrix)
    sure = logits.double().softmax(1).amax(1)
    accuracy, confidence = calibration_curve(logits.argmax(1) == test.labels, sure, n_bins=BINS)
    np.testing.assert_allclose([b["confidence"] for b in found["calibration"]["bins"]], confidence, rtol=1e-9)
    np.testing.assert_allclose([b["accuracy"] for b in found["calibration"]["bins"]], accuracy, rtol=1e-9)


def test_a_row_of_a_matrix_is_a_line_of_the_file(run: Path) -> None:
    text = (run / "summary.json").read_text()
    matrix = json.loads(text)["per_class"][0]["confusion"]
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    assert all(str(row) in lines for row in matrix)
