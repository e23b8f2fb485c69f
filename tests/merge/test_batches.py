"""How many images are looked at together is a matter of memory: it changes nothing but round-off."""

from collections.abc import Callable

import pytest
import torch
from pictures import SHAPE, network, pictures
from torch import Tensor

from fedmerge import align, aligners, merge, normalisation, perm_spec, repair
from fedmerge.align import needs_images
from fedmerge.merge import _fisher, _grams, takes

MODEL, DATA = network("self-tied"), pictures(50)
SPEC = perm_spec(MODEL, torch.zeros(2, *SHAPE))
A, B = (network("self-tied", seed).state_dict() for seed in (1, 2))
SIZES = (7, 1000)


def alike(monkeypatch: pytest.MonkeyPatch, result: Callable[[int], dict[str, Tensor]]) -> None:
    """``result``, given the size of a batch, is the same for 7 and for all 50 images at once."""
    found = []
    for size in SIZES:
        for module, constant in ((_grams, "_BATCH"), (_fisher, "_CHUNK"), (normalisation, "_BATCH")):
            assert hasattr(module, constant)
            monkeypatch.setattr(module, constant, size)
        found.append(result(size))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["fisher", "regmean", "greedy-soup", "ot-fusion-activations"])
def test_a_merge_does_not_depend_on_the_size_of_a_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def merged(size: int) -> dict[str, Tensor]:
        options = {"batch_size": size} if "batch_size" in takes(method) else {}
        options |= {"model": MODEL, "data": DATA}
        return merge([A, B], spec=SPEC, method=method, weights=[1, 3], **options).params

    alike(monkeypatch, merged)


@pytest.mark.parametrize("method", ["recompute", "repair"])
@pytest.mark.parametrize("name", ["self-tied", "mlp"])
def test_a_repair_does_not_depend_on_the_size_of_a_batch(
    method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sources = network(name), [network(name, seed).state_dict() for seed in (1, 2)]
    mean = merge(sources, spec=perm_spec(model, torch.zeros(2, *SHAPE)), method="average").params

    def repaired(size: int) -> dict[str, Tensor]:
        return repair(model, mean, data=DATA, method=method, sources=sources)

    alike(monkeypatch, repaired)
    assert (method, name) == ("recompute", "mlp") or any(not torch.equal(t, mean[k]) for k, t in repaired(7).items())


@pytest.mark.parametrize("method", ["activation-matching", "optimal-transport-activations"])
def test_an_alignment_by_activations_does_not_depend_on_the_size_of_a_batch(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert method in aligners()
    assert needs_images(method)

    def aligned(size: int) -> dict[str, Tensor]:
        found = align(B, to=A, spec=SPEC, method=method, model=MODEL, data=DATA, batch_size=size, polish=False)
        return {**found.perms, "objective": torch.tensor(found.objective, dtype=torch.float64)}

    alike(monkeypatch, aligned)
