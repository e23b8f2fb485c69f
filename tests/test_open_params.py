"""State dicts that stay on the disk."""

import pytest
import torch
from nets import mlp, noise
from safetensors.torch import save_file

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
