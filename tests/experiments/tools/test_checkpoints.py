import json
import sys
from pathlib import Path

import pytest
import torch
from attention import InAWeight
from pictures import pictures
from safetensors.torch import load_file, save_file, save_model

from experiments import cli
from experiments.tools.checkpoints import Architecture, architecture, load, merge_checkpoints
from fedmerge import data, evaluate, models, perm_spec, permute, train
from fedmerge.errors import ConfigError, ParamsError, RunDirectoryError, UnknownNameError


def net(seed: int, width: int = 16):
    return models.build("mlp", classes=10, in_shape=(1, 8, 8), width=width, seed=seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints of MLPs trained on disjoint real digits from independent initialisations."""
    folder, digits, paths = tmp_path_factory.mktemp("checkpoints"), data.load("digits").train, []
    for i in range(3):
        model = net(i, 64)
        found = train(
            model, model.state_dict(), digits.select(range(i, 1200, 3)), recipe=models.recipe("mlp"), epochs=12,
            generator=torch.Generator().manual_seed(i),
        )  # fmt: skip
        paths.append(folder / f"{i}.safetensors")
        save_file(found.params, paths[-1])
    return paths


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fedmerge", "merge", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_trained_checkpoints_merge_into_one_that_works(
    trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test = data.load("digits").train.select(range(1200, 1797))
    accuracy = {}
    for merger in ("average", "merge-many"):
        out = tmp_path / f"{merger}.safetensors"
        options = ("--model", "mlp", "--width", 64, "--dataset", "digits", "--merger", merger, "--weights", "2,1,1")
        assert call(monkeypatch, *trained, *options, "-o", out) == 0
        accuracy[merger] = evaluate(net(0, 64), load_file(out), test).accuracy
    assert "3 networks merged into" in capsys.readouterr().out
    singles = [evaluate(net(0, 64), load_file(p), test).accuracy for p in trained]
    assert accuracy["merge-many"] > sum(singles) / 3 - 0.1 > accuracy["average"]


def test_a_path_with_brackets_is_no_markup_and_no_aligner_is_ignored_unread(
    trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (
        *trained[:2],
        "--model",
        "mlp",
        "--width",
        64,
        "--classes",
        10,
        "--input-shape",
        "1,8,8",
        "--merger",
        "average",
    )
    (tmp_path / "[").mkdir()
    for out in (tmp_path / "[" / "x].safetensors", tmp_path / "ab [x] ü.safetensors"):
        assert call(monkeypatch, *given, "-o", out) == 0
        assert f"2 networks merged into {out}" in capsys.readouterr().out
    assert call(monkeypatch, *given, "--aligner", "nonsense", "-o", tmp_path / "new.safetensors") == 2
    assert "unknown aligner 'nonsense'" in capsys.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()


def test_a_file_of_torch_and_a_sharded_one_in_half_precision_merge_as_plain_files(tmp_path: Path) -> None:
    model = net(0)
    spec = perm_spec(model, torch.zeros(1, 1, 8, 8))
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    moved = permute(state, spec.random(torch.Generator().manual_seed(1)), spec=spec)
    torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}, "epoch": 3}, tmp_path / "a.pt")
    parts = {f"_orig_mod.{name}": f"b-{i % 2}.safetensors" for i, name in enumerate(moved)}
    for part in set(parts.values()):
        save_file({n: moved[n.removeprefix("_orig_mod.")] for n, its in parts.items() if its == part}, tmp_path / part)
    index = tmp_path / "b.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    network = Architecture(model, torch.zeros(1, 1, 8, 8), None)
    merge_checkpoints([tmp_path / "a.pt", index], tmp_path / "out.safetensors", network)
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors"), state, rtol=0, atol=0)


def test_an_index_that_names_an_index_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"fc1.weight": index.name}}))
    with pytest.raises(RunDirectoryError, match="names a.safetensors.index.json, an index, as a part"):
        merge_checkpoints(
            [index, index], tmp_path / "out.safetensors", Architecture(net(0), torch.zeros(1, 1, 8, 8), None)
        )


def test_permuted_copies_merge_into_the_network_they_are_copies_of(tmp_path: Path) -> None:
    model = net(0)
    spec = perm_spec(model, torch.zeros(1, 1, 8, 8))
    state = model.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    save_file(permute(state, spec.random(torch.Generator().manual_seed(1)), spec=spec), tmp_path / "b.safetensors")
    network = architecture("mlp", input_shape=(1, 8, 8), width=16)
    out = tmp_path / "deep" / "out.safetensors"
    merge_checkpoints([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], out, network)
    torch.testing.assert_close(load_file(out), dict(state), rtol=1e-6, atol=1e-6)


def test_a_factory_of_the_users_own_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mynets.py").write_text("import torch\nmake = lambda: torch.nn.Linear(4, 2)\nnumber = lambda: 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(architecture("mynets:make", input_shape=(1, 1, 4)).model, torch.nn.Linear)
    with pytest.raises(ConfigError, match=r"model 'mynets:number' returned a int; expected a torch.nn.Module"):
        architecture("mynets:number")
    with pytest.raises(ConfigError, match="model 'mynets:nothing': there is no 'nothing' in mynets"):
        architecture("mynets:nothing")


def test_what_does_not_fit_is_named_with_file_tensor_and_both_shapes(trained: list[Path], tmp_path: Path) -> None:
    good = load_file(trained[0])
    broken = tmp_path / "broken.safetensors"
    for change, message in (
        (
            {"fc1.weight": torch.zeros(3, 64)},
            r"broken.safetensors: tensor 'fc1.weight' has shape \(3, 64\), the model has \(64, 64\)",
        ),
        ({"more": torch.zeros(1)}, r"broken.safetensors has a tensor 'more' that the model lacks"),
        ({"fc1.bias": torch.full((64,), float("nan"))}, r"broken.safetensors: tensor 'fc1.bias' holds NaN"),
    ):
        save_file({**good, **change}, broken)
        with pytest.raises(ParamsError, match=message):
            load([trained[1], broken], net(0, 64))
    save_file({k: v for k, v in good.items() if k != "fc1.bias"}, broken)
    with pytest.raises(ParamsError, match=r"broken.safetensors lacks tensor 'fc1.bias' \(64,\)"):
        load([broken], net(0, 64))
    broken.write_text("nothing")
    with pytest.raises(RunDirectoryError, match="broken.safetensors cannot be read as safetensors"):
        load([broken], net(0, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "1,2"), "--weights '1,2': expected 3 numbers"),
        (("--input-shape", "3,x"), "--input-shape '3,x': expected 3 numbers"),
        (("--merger", "mean"), "unknown merger 'mean'"),
        (("--repair", "recompute", "--dataset", ""), "needs images; name a data set with --dataset"),
        (("--repair", "recompte"), "unknown repair 'recompte'"),
        (("--aligner", "activation-matching"), "--aligner activation-matching needs images"),
        (("--merger", "ties"), "--merger ties needs the network that all checkpoints were trained from; name its file"),
        (("--base", "x.safetensors"), "--merger merge-many takes no --base; leave it out"),
        (("--merger", "ties", "--base", "x.safetensors"), "x.safetensors cannot be read as safetensors"),
        (("--model", "mlpp"), "unknown model 'mlpp'"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(
    options: tuple[str, ...],
    message: str,
    trained: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.safetensors"
    standard = ("--model", "mlp", "--width", 64, "--input-shape", "1,8,8", "-o", out)
    assert call(monkeypatch, *trained, *standard, *options) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_an_output_that_exists_and_a_single_checkpoint_are_refused(trained: list[Path], tmp_path: Path) -> None:
    network = architecture("mlp", dataset="digits", width=64)
    with pytest.raises(ConfigError, match="0.safetensors exists; choose another -o"):
        merge_checkpoints(trained, trained[0], network)
    with pytest.raises(ParamsError, match="1 checkpoint was given; merging needs at least 2"):
        merge_checkpoints(trained[:1], tmp_path / "out", network)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_networks_are_read_and_plain_ones_written(
    prefix: str, trained: list[Path], tmp_path: Path
) -> None:
    network = architecture("mlp", dataset="digits", width=64)
    wrapped = []
    for path in trained:
        wrapped.append(tmp_path / path.name)
        save_file({f"{prefix}{name}": tensor for name, tensor in load_file(path).items()}, wrapped[-1])
    for name, paths in (("plain", trained), ("wrapped", [wrapped[0], trained[1], wrapped[2]])):
        merge_checkpoints(paths, tmp_path / f"{name}.out", network)
    torch.testing.assert_close(load_file(tmp_path / "wrapped.out"), load_file(tmp_path / "plain.out"), rtol=0, atol=0)


def test_a_network_that_has_a_module_of_that_name_keeps_its_names(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"module": torch.nn.Linear(3, 2)})
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    (held,) = load([tmp_path / "a.safetensors"], model)
    assert set(held) == {"module.weight", "module.bias"}


def test_other_prefixes_and_parts_of_a_checkpoint_are_recognised(trained: list[Path], tmp_path: Path) -> None:
    good = load_file(trained[0])
    save_file({f"model.{name}": t for name, t in good.items()}, tmp_path / "lightning.safetensors")
    with pytest.raises(ParamsError, match=r"lacks tensor .*, \.\.\., it has .* instead; its names begin with 'model.'"):
        load([tmp_path / "lightning.safetensors"], net(0, 64))
    part = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"fc1.weight": good["fc1.weight"]}, part)
    with pytest.raises(ParamsError, match="it is one part of a sharded checkpoint: name its index"):
        load([part], net(0, 64))


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.flatten(1)).relu())


@pytest.mark.parametrize("left_out", ["named in the file", "first.weight", "second.weight"])
def test_tied_tensors_are_read_under_any_of_their_names_and_written_under_all(left_out: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        if left_out == "named in the file":
            save_model(Tied(), str(path))
        else:  # as transformers writes them
            save_file({name: t for name, t in Tied().state_dict().items() if name != left_out}, path)
    merge_checkpoints(paths, tmp_path / "out", Architecture(Tied(), torch.zeros(1, 1, 2, 2), None), merger="average")
    found = load_file(tmp_path / "out")
    torch.testing.assert_close(found["first.weight"], found["second.weight"], rtol=0, atol=0)
    kept = "first.weight" if "first.weight" in load_file(paths[0]) else "second.weight"
    expected = (load_file(paths[0])[kept] + load_file(paths[1])[kept]) / 2
    torch.testing.assert_close(found["first.weight"], expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_merged_and_stays(kind: torch.dtype, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for seed, path in enumerate(paths):
        save_file({name: t.to(kind) for name, t in net(seed).state_dict().items()}, path)
    merge_checkpoints(paths, tmp_path / "out", architecture("mlp", input_shape=(1, 8, 8), width=16), merger="average")
    first, second = map(load_file, paths)
    expected = {name: ((first[name].double() + second[name].double()) / 2).to(kind) for name in first}
    torch.testing.assert_close(load_file(tmp_path / "out"), expected, rtol=0, atol=0)


def test_a_merged_network_beyond_the_range_of_its_dtype_is_not_written(trained: list[Path], tmp_path: Path) -> None:
    large = tmp_path / "large.safetensors"
    save_file({name: 1e6 * tensor for name, tensor in load_file(trained[0]).items()}, large)
    network = architecture("mlp", input_shape=(1, 8, 8), width=64)
    with pytest.raises(ParamsError, match=r"tensor 'fc1.bias' .* holds NaN or infinite values as torch.float16"):
        merge_checkpoints([large, trained[1]], tmp_path / "out", network, dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_a_repair_from_the_weights_alone_needs_no_images(trained: list[Path], tmp_path: Path) -> None:
    for name, dataset in (("blind", ""), ("seen", "digits")):
        network = architecture("mlp", dataset=dataset, input_shape=(1, 8, 8), width=64)
        merge_checkpoints(trained, tmp_path / name, network, repairing="repair-closed-form")
    merge_checkpoints(trained, tmp_path / "as-is", network)
    blind, seen, as_is = (load_file(tmp_path / name) for name in ("blind", "seen", "as-is"))
    torch.testing.assert_close(blind, seen, rtol=0, atol=0)
    assert not torch.equal(blind["fc1.weight"], as_is["fc1.weight"])


def test_an_aligner_that_a_merger_takes_nothing_of_is_said_and_needs_no_images(
    trained: list[Path], tmp_path: Path
) -> None:
    said: list[str] = []
    network = architecture("mlp", classes=10, input_shape=(1, 8, 8), width=64)
    for aligner in ("activation-matching", "weight-matching"):
        merge_checkpoints(trained, tmp_path / aligner, network, merger="average", aligner=aligner, say=said.append)
    assert said == ["note: --merger average takes nothing of --aligner activation-matching"]
    one, other = (load_file(tmp_path / name) for name in ("activation-matching", "weight-matching"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    with pytest.raises(ConfigError, match="--aligner activation-matching needs images"):
        merge_checkpoints(trained, tmp_path / "out", network, aligner="activation-matching")


def test_a_checkpoint_that_is_given_twice_is_said(trained: list[Path], tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "again.safetensors").symlink_to(trained[0])
    network = architecture("mlp", dataset="digits", width=64)
    merge_checkpoints([trained[0], tmp_path / "again.safetensors"], tmp_path / "out", network, say=said.append)
    assert said == [f"note: {trained[0].resolve()} is given 2 times and counts so often"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("taken/out.safetensors", r"out.safetensors cannot be written \(.*taken is no folder"),
        ("out.pt", r"out.pt: what is written is safetensors; name it .*out.safetensors"),
        ("x" * 300, "cannot be written"),
        ("", "exists; choose another -o"),
    ],
)
def test_an_output_that_cannot_be_written_is_named_before_anything_is_read(
    out: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").touch()
    network = architecture("mlp", input_shape=(1, 8, 8))
    with pytest.raises(ConfigError, match=message):
        merge_checkpoints([tmp_path / "none", tmp_path / "nothing"], tmp_path / out, network)


def test_statistics_are_corrected_where_asked(trained: list[Path], tmp_path: Path) -> None:
    network = architecture("mlp", dataset="digits", width=64)
    for name in ("none", "repair"):
        merge_checkpoints(trained, tmp_path / name, network, repairing=name)
    assert not torch.equal(load_file(tmp_path / "none")["fc1.weight"], load_file(tmp_path / "repair")["fc1.weight"])
    with pytest.raises(UnknownNameError, match="unknown repair 'x'"):
        merge_checkpoints(trained, tmp_path / "x", network, repairing="x")
    assert not (tmp_path / "x").exists()


def test_a_merger_that_looks_at_images_takes_them_from_the_data_set_or_says_so(
    trained: list[Path], tmp_path: Path
) -> None:
    network = architecture("mlp", dataset="digits", width=64)
    merge_checkpoints(trained, tmp_path / "out.safetensors", network, merger="regmean")
    test = data.load("digits").train.select(range(1200, 1797))
    assert evaluate(net(0, 64), load_file(tmp_path / "out.safetensors"), test).accuracy > 0.7
    blind = architecture("mlp", input_shape=(1, 8, 8), width=64)
    with pytest.raises(ConfigError, match="--merger regmean needs images; name a data set with --dataset"):
        merge_checkpoints(trained, tmp_path / "none.safetensors", blind, merger="regmean")


def test_steps_from_a_base_are_added_to_it(
    trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, base = tmp_path / "out.safetensors", load_file(trained[0])
    options = ("--model", "mlp", "--width", 64, "--input-shape", "1,8,8", "--merger", "task-arithmetic")
    assert call(monkeypatch, *trained[1:], *options, "--weights", "1,3", "--base", trained[0], "-o", out) == 0
    a, b = (load_file(p) for p in trained[1:])
    expected = {k: base[k] + 0.25 * (a[k] - base[k]) + 0.75 * (b[k] - base[k]) for k in base}
    torch.testing.assert_close(load_file(out), expected, rtol=1e-5, atol=1e-6)


def test_norms_are_folded_and_what_is_left_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"classes": 10, "in_shape": (1, 8, 8), "width": 0.25}
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, path in enumerate(paths):
        save_file(models.build("resnet20", seed=i, **small).state_dict(), path)
    options = ("--model", "resnet20", "--width", 0.25, "--dataset", "digits", "--repair", "recompute")
    outs = [tmp_path / "plain.safetensors", tmp_path / "folded.safetensors"]
    assert call(monkeypatch, *paths, *options, "-o", outs[0]) == 0
    assert call(monkeypatch, *paths, *options, "--fold", "-o", outs[1]) == 0
    said = capsys.readouterr().out
    assert "BatchNorm layers folded: 0 whole, 21 in part" in said
    assert "left in blocks.0.norm1: the shift: the layer before it has no bias" in said
    model, digits = models.build("resnet20", seed=0, **small), data.load("digits").train
    plain, folded = (evaluate(model, load_file(out), digits) for out in outs)
    assert folded.loss == pytest.approx(plain.loss, rel=1e-5)
    assert bool((load_file(outs[1])["norm.weight"] == 1).all())


def test_nothing_to_fold_is_said(
    trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", "mlp", "--width", 64, "--input-shape", "1,8,8", "--repair", "none", "--fold")
    assert call(monkeypatch, *trained, *options, "-o", tmp_path / "out.safetensors") == 0
    assert "nothing folded: the network has no BatchNorm" in capsys.readouterr().out


def test_integer_weights_are_named_with_their_file(trained: list[Path], tmp_path: Path) -> None:
    whole = {name: t.to(torch.int8) if name == "out.bias" else t for name, t in load_file(trained[0]).items()}
    save_file(whole, tmp_path / "whole.safetensors")
    with pytest.raises(
        ParamsError, match=r"whole.safetensors: tensor 'out.bias' is torch.int8, the model has torch.flo"
    ):
        load([trained[0], tmp_path / "whole.safetensors"], net(0, 64))


def test_units_that_a_method_could_not_compare_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        save_file(InAWeight().state_dict(), path)
    said: list[str] = []
    network = Architecture(InAWeight(), torch.zeros(1, 3, 4, 4), pictures(20))
    given = {"merger": "hierarchical", "say": said.append}
    found = merge_checkpoints(paths, tmp_path / "a.safetensors", network, aligner="activation-matching", **given)
    assert said == ["units that the method could not compare, left in their order: down"]
    assert found.left == ("down",)
    merge_checkpoints(paths, tmp_path / "b.safetensors", network, aligner="weight-matching", **given)
    assert len(said) == 1
