"""`fedmerge merge recipe.toml`: what it says is done, judged on images that the merge did not see, and checked first."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from experiments import cli
from experiments.tools.layers import weighed
from fedmerge import average, data, evaluate, merge, models, perm_spec, train
from fedmerge.errors import ParamsError
from fedmerge.streams import numpy_stream

WIDTH = 12


def net(seed: int = 0) -> nn.Module:
    return models.build("mlp", classes=10, in_shape=(1, 8, 8), width=WIDTH, seed=seed)


@pytest.fixture(scope="module")
def trained() -> list[dict[str, torch.Tensor]]:
    """Two MLPs trained on disjoint digits from initialisations of their own."""
    digits, found = data.load("digits").train, []
    for i in range(2):
        model = net(i)
        given = digits.select(range(i, 1600, 2))
        generator = torch.Generator().manual_seed(i)
        recipe = models.recipe("mlp")
        found.append(train(model, model.state_dict(), given, recipe=recipe, epochs=8, generator=generator).params)
    return found


@pytest.fixture
def folder(trained: list[dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One checkpoint as ``DataParallel`` leaves it, one as ``torch.compile`` in a ``.pt``; recipes are read from elsewhere."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    nets = [net(), net()]
    for model, params in zip(nets, trained, strict=True):
        model.load_state_dict(params)
    save_file(nn.DataParallel(nets[0]).state_dict(), tmp_path / "a.safetensors")
    torch.save({"epoch": 8, "state_dict": torch.compile(nets[1]).state_dict()}, tmp_path / "b.pt")
    save_file(net(9).state_dict(), tmp_path / "base.safetensors")
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedmerge", "merge", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


HEAD = f'model = "mlp"\nwidth = {WIDTH}\nout = "m.safetensors"\n'
SMALL = "classes = 10\ninput-shape = [1, 8, 8]\n"
BOTH = 'models = ["a.safetensors", "b.pt"]\n'


def test_a_recipe_merges_wrapped_checkpoints_and_judges_before_and_after(
    folder: Path,
    trained: list[dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "r.toml").write_text(HEAD + BOTH + 'dataset = "digits"\naligner = "activation-matching"\n')
    monkeypatch.setenv("COLUMNS", "120")
    assert call(monkeypatch, "../r.toml") == 0
    shown = capsys.readouterr().out
    assert f"2 networks merged into {Path('..') / 'm.safetensors'}" in shown
    order = numpy_stream(0, "judged").permutation(1797)
    judged = data.load("digits").train.select(np.sort(order[:359]))
    given = {"a.safetensors": trained[0], "b.pt": trained[1], "plain average": average(trained)}
    given["m.safetensors"] = load_file(folder / "m.safetensors")
    accuracy = {}
    for name, params in given.items():
        found = evaluate(net(), params, judged)
        (row,) = re.findall(rf"^{name}.* ([\d.]+) +([\d.]+)$", shown.replace(" \n", "\n"), re.M) or [None]
        assert row == (f"{100 * found.accuracy:.2f}", f"{found.loss:.4f}"), (name, shown)
        accuracy[name] = found.accuracy
    assert accuracy["m.safetensors"] > accuracy["plain average"] + 0.1
    assert "359 images of digits" in shown


def test_weights_of_single_layers_and_of_options_and_kinds_are_what_is_written(
    folder: Path, trained: list[dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "r.toml").write_text(
        HEAD + SMALL + 'merger = "task-arithmetic"\nbase = "base.safetensors"\noptions = { scale = 0.5 }\n'
        'dtype = "float16"\n[[models]]\npath = "a.safetensors"\nweight = 3.0\n'
        'layers = { "fc1.weight" = 0.0, "fc1.*" = 1.0 }\n[[models]]\npath = "b.pt"\n'
    )
    assert call(monkeypatch, folder / "r.toml", "-o", "here.safetensors") == 0
    found, base = load_file("here.safetensors"), net(9).state_dict()
    shares = {"fc1.weight": 0.0, "fc1.bias": 0.5}
    for name, tensor in found.items():
        share = shares.get(name, 0.75)
        a, b = (m[name].double() - base[name].double() for m in trained)
        expected = base[name].double() + 0.5 * (share * a + (1 - share) * b)
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.double(), expected, rtol=2e-3, atol=1e-4)


def test_weights_of_single_layers_keep_the_order_of_units(trained: list[dict[str, torch.Tensor]]) -> None:
    model = net()
    spec = perm_spec(model, torch.zeros(1, 1, 8, 8))
    for method in ("merge-many", "slerp"):
        found = merge(trained, spec=spec, method=method)
        moved = weighed(
            trained, found, [{"fc2.*": 1.0, "out.*": 1.0}, {"*": 0.0}], model, spec=spec, method=method, weights=None
        ).params
        # The second network counts nothing anywhere, the first everything: what is left is the first, reordered.
        x = torch.randn(5, 1, 8, 8)
        model.load_state_dict(trained[0])
        expected = model(x)
        model.load_state_dict(moved)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_tensor_of_two_names_takes_the_weight_of_its_first() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    spec = perm_spec(model, torch.zeros(1, 3))
    a, b = ({k: torch.full_like(v, float(i)) for k, v in model.state_dict().items()} for i in (1, 3))
    found = merge([a, b], spec=spec, method="average")
    given = [{"0.weight": 1.0, "2.*": 0.0}, {"0.weight": 0.0}]
    merged = weighed([a, b], found, given, model, spec=spec, method="average", weights=None).params
    assert torch.equal(merged["0.weight"], a["0.weight"])
    assert torch.equal(merged["2.weight"], a["0.weight"])
    assert torch.equal(merged["2.bias"], b["2.bias"])
    with pytest.raises(ParamsError, match=r"weights \[0.0, 0.0\] do not fit 2 models"):
        weighed([a, b], found, [{"0.*": 0.0}] * 2, model, spec=spec, method="average", weights=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOTH + 'aligne = "x"', "r.toml: unknown key 'aligne'"),
        ('models = ["a.safetensors"]', "r.toml: models = ['a.safetensors']: List should have at least 2 items"),
        ("", "r.toml: models: Field required"),
        ('[[models]]\npath = "a.safetensors"\nweigth = 1\n[[models]]\npath = "b.pt"', "unknown key 'weigth'"),
        (
            '[[models]]\npath = "a"\nweight = -1\n[[models]]\npath = "b"',
            "models.0.weight = -1: Input should be greater",
        ),
        (BOTH + 'dtype = "int8"', "dtype = 'int8': Input should be 'float16'"),
        (BOTH + 'merger = "slerpp"', "unknown merger 'slerpp'"),
        (BOTH + 'merger = "slerp"\noptions = { t = 0.5 }', "unknown option of merger slerp 't'"),
        (
            BOTH + "options = { rng = 1 }",
            "options has 'rng', which other keys decide; --merger merge-many has the options",
        ),
        (BOTH + 'merger = "regmean"\noptions = { model = "x" }', "options has 'model', which other keys decide"),
        (BOTH + 'merger = "dare"', "needs the network that all checkpoints were trained from"),
        (BOTH + 'merger = "fisher"', "needs images; name a data set with --dataset, or dataset in a recipe"),
        ('models = ["a.safetensors", "c.safetensors"]', "c.safetensors cannot be read as safetensors: No such file"),
        (
            BOTH.replace("b.pt", "other.safetensors"),
            "other.safetensors: tensor 'fc1.bias' has shape (5,), the model has (12,)",
        ),
        (
            '[[models]]\npath = "a.safetensors"\nlayers = { "fc9.*" = 1 }\n[[models]]\npath = "b.pt"',
            "unknown layer (a tensor, or a pattern as 'features.*') 'fc9.*'",
        ),
        (
            'merger = "hierarchical"\n[[models]]\npath = "a.safetensors"\nlayers = { "fc1.*" = 1 }\n[[models]]\n'
            'path = "b.pt"',
            "merger hierarchical has no weights of single layers; average, merge-many, ",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_in_a_line(
    text: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(
        models.build("mlp", classes=10, in_shape=(1, 8, 8), width=5, seed=0).state_dict(), folder / "other.safetensors"
    )
    (folder / "r.toml").write_text(HEAD + SMALL + text)
    assert call(monkeypatch, folder / "r.toml") == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (folder / "m.safetensors").exists()


def test_options_beside_a_recipe_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "r.toml").write_text(HEAD + SMALL + BOTH)
    assert call(monkeypatch, folder / "r.toml", "--merger", "slerp") == 2
    assert "--merger beside" in capsys.readouterr().err
    assert call(monkeypatch, folder / "a.safetensors", folder / "b.pt") == 2
    assert "merge needs --model and --out, or a recipe" in capsys.readouterr().err


def test_the_recipe_of_the_guide_is_carried_out(
    tmp_path: Path,
    trained: list[dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "how-to" / "merge.md").read_text()
    (recipe,) = re.findall(r"```toml\n(.*?)```", guide, re.S)
    (tmp_path / "recipe.toml").write_text(f"width = {WIDTH}\n{recipe}")
    for name, params in zip("ab", trained, strict=True):
        save_file(params, tmp_path / f"{name}.safetensors")
    assert call(monkeypatch, tmp_path / "recipe.toml") == 0
    assert "which the merge did not see" in " ".join(capsys.readouterr().out.split())
    merged = load_file(tmp_path / "merged.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}
    assert set(merged) == set(trained[0])
