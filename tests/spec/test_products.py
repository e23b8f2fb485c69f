"""Sums of products in the forms in which networks write them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced import Net, sizes, trace

from fedmerge.spec import Factor

WORDS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(5)))


def test_a_transposed_layer_moves_like_a_linear_one() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = torch.addmm(m.bias, x.view(-1, 8), m.up).relu()
        h = torch.baddbmm(m.shift, h.view(2, 5, 6), m.middle.expand(2, -1, -1)).relu()
        return torch.addmv(m.out, h.flatten(0, 1), m.down)

    layers = {"bias": weight(6), "up": weight(8, 6), "shift": weight(1, 1, 7), "middle": weight(1, 6, 7)}
    spec = trace(Net(forward, **layers, out=weight(10), down=weight(7)), WORDS)
    assert sizes(spec) == [6, 7]
    assert spec.axes["up"] == ((), spec.axes["bias"][0])
    assert spec.axes["middle"][2] == spec.axes["down"][0] == spec.axes["shift"][2]


def test_products_with_vectors_tie_what_they_sum() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = (x[0, 0] @ m.a).relu()  # vector @ matrix
        h = (m.b @ h).relu()  # matrix @ vector
        h = torch.outer(h, torch.mv(m.c, h)).relu()
        return torch.dot(torch.inner(h, m.d), m.e) + torch.tensordot(h, m.f, ([0], [1])).sum(0)

    layers = {
        "a": weight(8, 3),
        "b": weight(4, 3),
        "c": weight(5, 4),
        "d": weight(5),
        "e": weight(4),
        "f": weight(2, 4),
    }
    spec = trace(Net(forward, **layers), WORDS)
    assert sizes(spec) == [3, 4, 5]
    assert spec.axes["d"] == (spec.axes["c"][0],)
    assert spec.axes["f"][1] == spec.axes["b"][0]


def test_einsum_understands_dots_diagonals_and_an_absent_output() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = torch.einsum("...d,de", x, m.a).relu()
        h = torch.einsum("b...e,ef->...bf", h, m.b)
        square = torch.einsum("tbf,gf,...ge->tbfe", h, m.c, m.d)
        return torch.einsum("...ff->...", square)

    spec = trace(Net(forward, a=weight(8, 3), b=weight(3, 4), c=weight(5, 4), d=weight(1, 5, 4)), WORDS)
    assert sizes(spec) == [3, 4, 5]
    assert spec.axes["d"] == ((), spec.axes["c"][0], spec.axes["b"][1])


def test_a_bilinear_layer_reads_two_tensors() -> None:
    model = Net(
        lambda m, x: m.head(m.both(m.a(x), m.b(x)).relu()),
        a=nn.Linear(8, 3), b=nn.Linear(8, 4), both=nn.Bilinear(3, 4, 5), head=nn.Linear(5, 2),
    )  # fmt: skip
    spec = trace(model, WORDS)
    assert sizes(spec) == [3, 4, 5]
    assert [axis[0][0].group for axis in spec.axes["both.weight"]] == ["both", "a", "b"]


@pytest.mark.parametrize("way", ["enable_gqa", "repeat_interleave", "expand", "repeat"])
def test_queries_that_share_keys_move_with_them_and_within_them(way: str) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(2, 5, -1, 3).transpose(1, 2) for layer in (m.q, m.k, m.v))
        if way == "repeat_interleave":
            k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        elif way == "expand":
            k, v = (t[:, :, None].expand(2, 2, 3, 5, 3).reshape(2, 6, 5, 3) for t in (k, v))
        elif way == "repeat":
            k, v = k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=way == "enable_gqa")
        return m.o(y.transpose(1, 2).reshape(2, 5, 18))

    layers = {"q": nn.Linear(8, 18), "k": nn.Linear(8, 6), "v": nn.Linear(8, 6)}
    spec = trace(Net(forward, **layers, o=nn.Linear(18, 2)), WORDS)
    assert sizes(spec) == [2, 3, 3, 3]  # heads of keys, queries of one, units of a head for keys and for values
    heads = spec.axes["k.weight"][0][0][0]
    assert heads.size == 2
    assert spec.axes["q.weight"][0][0].index(heads) == (1 if way == "repeat" else 0)


def test_a_distance_ties_what_it_compares() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        near = torch.cdist(h, m.centres) + F.cosine_similarity(h[..., None, :], m.centres, dim=-1)
        return m.head(near) * F.pairwise_distance(h, 2 * h)[..., None]

    spec = trace(Net(forward, a=nn.Linear(8, 6), centres=weight(4, 6), head=nn.Linear(4, 2)), WORDS)
    assert sizes(spec) == [4, 6]
    assert spec.axes["centres"] == (((Factor("centres", 4),),), ((Factor("a", 6),),))


def test_adapters_and_experts_in_one_tensor_move_inside() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = F.linear(x, m.frozen + 2 * m.b @ m.a)
        hidden = torch.einsum("bti,nio->bton", h, m.up).relu()
        return (torch.einsum("bton,noe->bten", hidden, m.down) * m.router(h).softmax(-1)[..., None, :]).sum(-1)

    layers = {
        "frozen": weight(6, 8),
        "a": weight(2, 8),
        "b": weight(6, 2),
        "up": weight(3, 6, 7),
        "down": weight(3, 7, 2),
    }
    spec = trace(Net(forward, **layers, router=nn.Linear(6, 3)), WORDS)
    assert sizes(spec) == [2, 3, 6, 7]  # rank, experts, stream, hidden units
