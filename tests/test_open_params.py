"""State dicts that stay on the disk."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import SelfTied, mlp, noise
from safetensors.torch import save, save_file, save_model
from torch import nn

import fedmerge as fm
from fedmerge.errors import RunDirectoryError


def test_models_on_the_disk_merge_as_those_in_memory(tmp_path) -> None:
    net = mlp(4, 8, 6, 3)
    spec = fm.perm_spec(net, torch.randn(2, 4))
    models = [noise(net.state_dict(), i) for i in range(4)]
    for i, model in enumerate(models):
        save_file(model, tmp_path / f"{i}.safetensors")
    held = [fm.open_params(tmp_path / f"{i}.safetensors") for i in range(4)]
    for method in ("merge-many", "average", "hierarchical", "ot-fusion", "cycle-consistent"):
        one, two = (fm.merge(m, spec=spec, method=method, weights=[1, 2, 3, 4]) for m in (models, held))
        torch.testing.assert_close(one.params, two.params, rtol=0, atol=0)
        assert one.objective == two.objective
    assert held[0].keys() == models[0].keys()
    assert len(held[0]) == 6
    assert "missing" not in held[0]


def test_a_file_that_cannot_be_read_is_named(tmp_path) -> None:
    with pytest.raises(RunDirectoryError, match=r"none.safetensors cannot be read as safetensors: .*No such file"):
        fm.open_params(tmp_path / "none.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a safetensors file")
    with pytest.raises(RunDirectoryError, match=r"bad.safetensors cannot be read as safetensors"):
        fm.open_params(bad)


# -- files of other kinds -------------------------------------------------------------------------------------


def _written(path: Path, content: bytes | dict[str, torch.Tensor]) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    return path


STATE = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}
WHOLE = save(STATE)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"module.module.{name}",
        lambda name: name.replace("fc.", "fc._orig_mod."),  # one compiled layer
        lambda name: f"_module.{name}",  # Opacus
        lambda name: f"module._fsdp_wrapped_module.{name.replace('fc.', 'fc._checkpoint_wrapped_module.')}",
    ],
)
def test_names_of_wrapped_networks_are_those_of_the_plain_one(wrapped: Callable[[str], str], tmp_path: Path) -> None:
    held = fm.open_params(_written(tmp_path / "x.safetensors", {wrapped(name): t for name, t in STATE.items()}))
    torch.testing.assert_close(dict(held), STATE, rtol=0, atol=0)
    assert set(fm.open_params(tmp_path / "x.safetensors", unwrap=False)) == {wrapped(name) for name in STATE}


def test_real_wrappers_of_torch_are_taken_off(tmp_path: Path) -> None:
    net = mlp(4, 8, 3)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    for wrapped in (nn.DataParallel(net), torch.compile(net), nn.DataParallel(torch.compile(net)), averaged):
        held = fm.open_params(_written(tmp_path / "x.safetensors", wrapped.state_dict()))
        torch.testing.assert_close(dict(held), dict(net.state_dict()), rtol=0, atol=0)
        (tmp_path / "x.safetensors").unlink()


def test_wrapped_models_merge_as_plain_ones(tmp_path: Path) -> None:
    net = mlp(4, 8, 6, 3)
    spec = fm.perm_spec(net, torch.randn(2, 4))
    models = [noise(net.state_dict(), i) for i in range(2)]
    for i, (model, prefix) in enumerate(zip(models, ("module.", "_orig_mod."), strict=True)):
        save_file({f"{prefix}{name}": t for name, t in model.items()}, tmp_path / f"{i}.safetensors")
    held = [fm.open_params(tmp_path / f"{i}.safetensors") for i in range(2)]
    one, two = (fm.merge(m, spec=spec) for m in (models, held))
    torch.testing.assert_close(one.params, two.params, rtol=0, atol=0)


def test_a_prefix_that_only_some_names_have_is_a_name(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "head.weight": torch.ones(2)}
    assert set(fm.open_params(_written(tmp_path / "x.safetensors", state))) == set(state)


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    path = _written(tmp_path / "x.safetensors", {"a.weight": torch.ones(2), "a._orig_mod.weight": torch.zeros(2)})
    with pytest.raises(RunDirectoryError, match=r"'a\.\S*weight' and 'a\.\S*weight' are both 'a.weight'; take one of"):
        fm.open_params(path)


def test_a_tied_tensor_that_was_left_out_has_its_name_back(tmp_path: Path) -> None:
    net = SelfTied(5)
    net.other = net.get_submodule(next(name for name, _ in net.named_children()))  # the same layer under two names
    save_model(net, str(tmp_path / "x.safetensors"))
    torch.testing.assert_close(dict(fm.open_params(tmp_path / "x.safetensors")), dict(net.state_dict()))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("name", "inside"), [("m.pt", None), ("m.bin", "state_dict"), ("m", "model")])
def test_what_torch_saved_is_read_under_its_plain_names(
    name: str, inside: str | None, zipped: bool, tmp_path: Path
) -> None:
    state = {f"module.{key}": nn.Parameter(tensor) for key, tensor in STATE.items()}
    held = state if inside is None else {inside: state, "epoch": 3, "optimizer": {"state": {}}}
    torch.save(held, tmp_path / name, _use_new_zipfile_serialization=zipped)
    params = fm.open_params(tmp_path / name)
    params["fc.weight"].zero_()  # a copy, neither the file's nor the next reader's
    torch.testing.assert_close(dict(params), STATE, rtol=0, atol=0)


class _Code:
    """Ends the test if it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('a checkpoint ran its code')",))


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"a": torch.ones(1), "b": _Code()}, r"is a pickle that would run code \(exec\), and only tensors"),
        (nn.Linear(2, 2), r"would run code \(torch.nn.modules.linear.Linear\), .* torch.save\(network.state_dict"),
        ({"epoch": 3, "encoder": STATE}, "holds a dict with 'epoch', 'encoder'; expected tensors by name"),
        (torch.ones(3), "holds no dict; expected tensors by name"),
        ({"state_dict": {"w": torch.zeros(2, dtype=torch.complex64)}}, "tensor 'w' is complex64, .* convert it to"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_other_things_is_refused_without_running_it(
    held: object, message: str, zipped: bool, tmp_path: Path
) -> None:
    torch.save(held, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(RunDirectoryError, match=message) as raised:
        fm.open_params(tmp_path / "m.pt")
    assert str(tmp_path / "m.pt") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_arrays_of_numpy_have_a_command_that_converts_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", **{name: t.numpy() for name, t in STATE.items()})
    with pytest.raises(RunDirectoryError, match=r"m.npz cannot be read as safetensors: it holds NumPy") as raised:
        fm.open_params(tmp_path / "m.npz")
    exec(str(raised.value).split('python -c "')[1].removesuffix('"'), {})
    torch.testing.assert_close(dict(fm.open_params(tmp_path / "m.safetensors")), STATE)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_index_of_a_sharded_checkpoint_is_all_of_its_parts(kind: str, tmp_path: Path) -> None:
    parts = {name: f"model-{i}-of-2.{kind}" for i, name in enumerate(STATE, 1)}
    for name, part in parts.items():
        (save_file if kind == "safetensors" else torch.save)({name: STATE[name]}, tmp_path / part)
    index = tmp_path / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": parts}))
    torch.testing.assert_close(dict(fm.open_params(index)), STATE, rtol=0, atol=0)
    index.write_text(json.dumps({"weight_map": {**parts, "lost": parts["fc.bias"]}}))
    with pytest.raises(RunDirectoryError, match=rf"says that 'lost' is in {parts['fc.bias']}, which lacks it"):
        fm.open_params(index)
    (tmp_path / parts["fc.bias"]).unlink()
    with pytest.raises(RunDirectoryError, match=rf"{parts['fc.bias']} cannot be read as safetensors: No such file"):
        fm.open_params(index)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.safetensors", b"", r"it is empty \(0 bytes\)"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "it is a git-lfs pointer, .*`git lfs pull`"),
        ("m.safetensors", b"<!doctype html><html></html>", "it is a web page"),
        ("m.safetensors", WHOLE[:-4], r"it is cut short or damaged, \d+ bytes are left .*copy or download it again"),
        ("m.safetensors", WHOLE[:40], "it is cut short or damaged, 40 bytes are left"),
        ("m.safetensors", WHOLE[:5], "cannot be read as safetensors: "),
        ("m.safetensors", b"\xff" * 64, "cannot be read as safetensors: .*save_file"),
        ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(64), "it is another format .*save_file"),
        ("m.onnx", bytes(64), r"it is another format \(.onnx\)"),
        ("m.json", b"{}", "it is JSON text; give the file with the tensors"),
        ("m.json", b"\xff", "it is JSON text; give the file with the tensors"),
        ("m.safetensors", {"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "tensor 'a' is F8_E4M3, .* convert it to"),
        ("m.safetensors", {"a": torch.zeros(2, dtype=torch.complex64)}, "tensor 'a' is C64, .* convert it to float32"),
    ],
)
def test_what_is_no_state_dict_is_named_with_what_it_is(
    name: str, content: bytes | dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    path = _written(tmp_path / name, content)
    with pytest.raises(RunDirectoryError, match=message) as raised:
        fm.open_params(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="it is a folder; name a file in it"):
        fm.open_params(tmp_path)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_averaged_as_they_are(kind: torch.dtype, tmp_path: Path) -> None:
    for i in range(2):
        save_file({name: (t + i).to(kind) for name, t in STATE.items()}, tmp_path / f"{i}.safetensors")
    found = fm.average([fm.open_params(tmp_path / f"{i}.safetensors") for i in range(2)])
    torch.testing.assert_close(found, {name: (t + 0.5).to(kind) for name, t in STATE.items()}, rtol=0, atol=0)
