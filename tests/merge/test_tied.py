"""A tensor of several names is one tensor: every merger gives it one result."""

import functools

import pytest
import torch
from pictures import SHAPE, pictures
from torch import nn

from fedmerge import PermSpec, align, aligners, average, merge, mergers, perm_spec, permute, repair, repairs
from fedmerge.align import needs_images
from fedmerge.errors import DataError, ParamsError
from fedmerge.merge import takes
from fedmerge.merge._fisher import fisher_information
from fedmerge.merge._grams import gram_blocks


class Tied(nn.Module):
    """One layer under two names, called at both places."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(48, 6), nn.Linear(6, 4)
        self.b = self.c = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.c(self.b(self.i(x.flatten(1)).relu()).relu()).relu())


class Tokens(nn.Module):
    """An embedding whose weight is also that of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(4, 5), nn.Linear(5, 4)
        self.h.weight = self.e.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.h(self.e(((x + 2) * 10).long().flatten(1)[:, :3] % 4).mean(1).tanh())


def states(kind: type[nn.Module]):
    torch.manual_seed(0)
    return kind(), kind().state_dict(), kind().state_dict()


@functools.cache
def spec_of(kind: type[nn.Module]) -> PermSpec:
    return perm_spec(kind(), torch.zeros(2, *SHAPE))


every_kind = pytest.mark.parametrize("kind", [Tied, Tokens])
NAMES = {Tied: (("b.weight", "c.weight"), ("b.bias", "c.bias")), Tokens: (("e.weight", "h.weight"),)}


def same_by_every_name(kind: type[nn.Module], params: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(params[a], params[b]) for a, b in NAMES[kind])


@every_kind
@pytest.mark.parametrize("method", list(mergers()))
def test_both_names_of_a_tensor_have_one_result(method: str, kind: type[nn.Module]) -> None:
    if (method, kind) == ("fs-merge", Tokens):
        pytest.skip("it refuses networks with an embedding")
    model, a, b = states(kind)
    given = {"model": model, "data": pictures(), "base": average([a, b]), "epochs": 1}
    given = {k: v for k, v in given.items() if k in takes(method)}
    found = merge([a, b], spec=spec_of(type(model)), method=method, **given).params
    assert same_by_every_name(kind, found)


@every_kind
@pytest.mark.parametrize("method", list(aligners()))
def test_alignment_changes_no_output_of_a_network_with_tied_tensors(method: str, kind: type[nn.Module]) -> None:
    model, a, b = states(kind)
    spec = spec_of(type(model))
    images = {"model": model, "data": pictures()} if needs_images(method) else {}
    found = align(b, to=a, spec=spec, method=method, **images)
    assert {len(perm) for perm in found.perms.values()} == ({6} if kind is Tied else {5})
    aligned = permute(b, found.perms, spec=spec)
    assert same_by_every_name(kind, aligned)
    x = torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(0))
    outputs = []
    for params in (aligned, b):
        model.load_state_dict(params)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)


@every_kind
@pytest.mark.parametrize("method", list(repairs()))
def test_repair_leaves_one_result_of_a_tensor_of_two_names(method: str, kind: type[nn.Module]) -> None:
    model, a, b = states(kind)
    merged = average([a, b])
    found = repair(model, merged, data=pictures(), method=method, sources=[a, b])
    assert same_by_every_name(kind, found)


def test_ties_counts_a_tensor_of_two_names_once_where_it_trims() -> None:
    model, base, a = states(Tied)
    found = merge([a], spec=spec_of(type(model)), method="ties", base=base, model=model, density=0.3)
    # One model is its own election: of its numbers, counted one by one, those of the 30 % largest steps are kept.
    once = [name for name, _ in model.named_parameters()]
    steps = torch.cat([(a[name].double() - base[name].double()).flatten() for name in once])
    least = steps.abs().sort(descending=True).values[round(0.3 * len(steps)) - 1]
    for name in base:
        step = a[name].double() - base[name].double()
        expected = (base[name].double() + step * (step.abs() >= least)).float()
        assert torch.equal(found.params[name], expected), name
    with pytest.raises(ParamsError, match="'b.weight' and 'c.weight' are one tensor in Tied, but their values differ"):
        merge([{**a, "c.weight": base["b.weight"]}], spec=spec_of(type(model)), method="ties",
              base=base, model=model)  # fmt: skip


@every_kind
def test_the_information_of_a_shared_tensor_is_that_of_all_its_uses(kind: type[nn.Module]) -> None:
    model, a, _ = states(kind)
    data = pictures(5)
    found = fisher_information(model, a, data)
    model.load_state_dict(a)
    expected = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    for image in data.normalise(data.images):
        logits = model(image[None])[0].log_softmax(0)
        for value in logits:
            for name, slope in zip(
                expected, torch.autograd.grad(value, list(model.parameters()), retain_graph=True), strict=True
            ):
                expected[name] += float(value.detach().exp()) * slope.double() ** 2 / len(data)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_regmean_of_an_embedding_tied_to_the_head_minimises_the_errors_of_both() -> None:
    model, a, b = states(Tokens)
    data, shares = pictures(30), (0.25, 0.75)
    spec = spec_of(type(model))
    given = {"model": model, "data": data, "order": "average", "weights": [1, 3]}
    found = merge([a, b], spec=spec, method="regmean", scale=1.0, **given).params
    assert torch.equal(found["e.weight"], found["h.weight"])
    w = found["h.weight"].double().requires_grad_()
    bias = found["h.bias"].double().requires_grad_()
    error = torch.zeros((), dtype=torch.float64)
    for share, params in zip(shares, (a, b), strict=True):
        model.load_state_dict(params)
        tokens = ((data.normalise(data.images) + 2) * 10).long().flatten(1)[:, :3] % 4
        x = model.e(tokens).mean(1).tanh().double().detach()
        old = params["h.weight"].double()
        head = x @ (w - old).T + bias - params["h.bias"].double()
        error = error + share * (head.square().sum() + (w - old)[tokens].square().sum())
    slopes = torch.autograd.grad(error, [w, bias])
    assert max(float(s.abs().max()) for s in slopes) < 1e-4
    assert float((w.detach() - average([a, b], [1, 3])["e.weight"]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2),
        nn.Conv2d(4, 6, 2, padding="same", dilation=2),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_the_gram_matrix_is_that_of_the_inputs_the_layer_sees(layer: nn.Module) -> None:
    model, data = nn.Sequential(layer), pictures(101, shape=(4, 4, 4))
    (block,) = gram_blocks(model, model.state_dict(), data)
    rows = block.matrix(model.state_dict()).reshape(block.groups, -1, block.gram.shape[1])
    with torch.no_grad():
        out = model(data.normalise(data.images)).double()
    got = torch.einsum("gud,gde,gue->gu", rows, block.gram, rows).flatten()
    torch.testing.assert_close(got, out.square().sum((0, 2, 3)) / len(data), rtol=1e-4, atol=1e-6)
    for name, tensor in block.tensors(block.matrix(model.state_dict()), model.state_dict()).items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_fisher_normalises_as_its_reference_does() -> None:
    model, a, b = states(Tied)
    data, floor = pictures(9), 0.1
    given = {"model": model, "data": data, "order": "average", "floor": floor}
    found = merge([a, b], spec=spec_of(type(model)), method="fisher", **given).params
    info = [fisher_information(model, m, data) for m in (a, b)]
    flat = [torch.cat([f.flatten() for f in i.values()]) for i in info]
    eps = floor * torch.cat(flat).mean()
    inverse = torch.stack([1 / (f.norm() + eps) for f in flat])
    share = inverse / inverse.sum()
    for name in info[0]:
        x, y = (s * (i[name] + eps) for s, i in zip(share, info, strict=True))
        torch.testing.assert_close(found[name].double(), (x * a[name] + y * b[name]) / (x + y), rtol=1e-5, atol=1e-6)


def test_broken_ties_overlapping_views_and_unfit_images_are_named() -> None:
    model, a, b = states(Tied)
    spec = spec_of(type(model))
    given = {"spec": spec, "method": "fisher", "order": "average"}
    broken = {**b, "c.weight": b["c.weight"] + 1}
    with pytest.raises(ParamsError, match="'b.weight' and 'c.weight' are one tensor in Tied, but their values differ"):
        merge([a, broken], model=model, data=pictures(), **given)
    with pytest.raises(DataError, match="Tied does not take the images of pictures"):
        merge([a, b], model=model, data=pictures(shape=(1, 4, 4)), **given)
    model.c = nn.Linear(6, 6)
    model.c.weight = nn.Parameter(model.b.weight.detach().T)
    with pytest.raises(ParamsError, match="are different views of the same memory"):
        merge([a, b], model=model, data=pictures(), **given)
