import pytest
import torch

from experiments.benchmarks import zoo
from fedmerge.spec import Factor, PermSpec, perm_spec


def test_a_network_that_keeps_its_function_is_a_row_and_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.main(["--models", "squeezenet1_1"]) == 0
    printed = capsys.readouterr().out
    assert "| squeezenet1_1 | 1,235,496 | 25 |" in printed
    assert "1 networks: error below 1e-09 in 1; share above 0.9 in 1 (100 %)" in printed


def test_a_wrong_spec_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(model: torch.nn.Module, x: torch.Tensor) -> PermSpec:
        spec = perm_spec(model, x)
        axes = dict(spec.axes)
        first = next(name for name, entry in axes.items() if entry[0])
        axes[first] = (((Factor("alone", spec.shapes[first][0]),),), *axes[first][1:])
        return PermSpec(axes, spec.shapes, spec.parameters)

    monkeypatch.setattr(zoo, "perm_spec", wrong)
    assert zoo.main(["--models", "squeezenet1_1"]) == 1
    assert "error below 1e-09 in 0" in capsys.readouterr().out


def test_every_classification_network_of_torchvision_is_listed() -> None:
    assert len(zoo.names()) >= 80
    assert {"resnet18", "vit_b_16", "swin_t", "maxvit_t", "regnet_y_400mf", "shufflenet_v2_x1_0"} <= set(zoo.names())
