"""Operators that tell positions apart: along other axes units move freely, along their own axis they stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced import Net, sizes, trace

import fedmerge as fm
from fedmerge.spec import Factor, perm_spec

WORDS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))
FIRST = torch.zeros(2, 1, 1, dtype=torch.long)


def written(x: Tensor, at: Any, value: Any) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


SIDEWAYS: tuple[Callable[[Tensor], Tensor], ...] = (  # of (2, 5, units), what broadcasts to it
    lambda h: h.cumsum(1) + h.exp().cumprod(1) + h.logcumsumexp(1) + h.cummax(1)[0],
    lambda h: h.flip(1) + h.roll(1, 1) + F.pad(h.diff(dim=1), (0, 0, 1, 0)),
    lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1), n=5, dim=1) + torch.view_as_real(torch.fft.fft2(h, dim=(0, 1)))[..., 0],
    lambda h: h.unfold(1, 2, 1).sum(-1).mean(1, keepdim=True) + h.sort(1)[0] + h.topk(1, 1)[0],
    lambda h: h.gather(1, FIRST.expand(2, 1, h.shape[-1])) + h.take_along_dim(FIRST, 1) + h[:, torch.tensor([1, 0, 2, 3, 4])],
    lambda h: h.index_select(1, torch.tensor([3])) + h[torch.tensor([0, 1]), torch.tensor([2, 3])][:, None],
    lambda h: torch.zeros_like(h).scatter_add(1, FIRST.expand(2, 5, h.shape[-1]), h),
    lambda h: torch.zeros(2, 3, h.shape[-1]).index_add_(1, torch.tensor([0, 1, 2, 1, 0]), h)[:, :1],
    lambda h: h.index_put((torch.tensor([0, 1]), torch.tensor([2, 3])), h[:, 0]) + written(h, (slice(None), 1), h[:, 2]),
    lambda h: written(h, (slice(None), torch.arange(5) > 2), 1.0) + written(torch.zeros_like(h), WORDS[..., 0] > 0, h[WORDS[..., 0] > 0]),
    lambda h: h.masked_fill(h.argmax(1, keepdim=True) == 0, 0.0) + torch.cat([a + 1 for a in h.chunk(5, 1)], 1),
    lambda h: torch.eye(5) @ h * torch.linspace(0, 1, 5)[:, None] + h.transpose(1, 2)[..., None].expand(-1, -1, -1, 5).tril().sum(-1).transpose(1, 2),
)  # fmt: skip

SYMMETRIC: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda h: torch.var_mean(h, -1, keepdim=True)[1] + torch.std_mean(h, -1, keepdim=True)[0] + h.logsumexp(-1, keepdim=True),
    lambda h: h.norm(dim=-1, keepdim=True) + torch.linalg.norm(h, dim=-1, keepdim=True) + h.prod(-1, keepdim=True),
    lambda h: h.max(-1, True)[0] + h.median(-1, True)[0] + h.aminmax(dim=-1, keepdim=True)[0] + h.quantile(0.3, -1, keepdim=True),
    lambda h: h.sort(-1)[0][..., :1] + h.topk(2)[0].sum(-1, keepdim=True) + (h > 0).any(-1, True) + (h > 0).count_nonzero(-1)[..., None],
)  # fmt: skip


def test_units_move_beside_the_axis_whose_positions_count() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.head(sum((f(h) for f in SIDEWAYS), h))

    assert sizes(trace(Net(forward, a=nn.Linear(8, 6), head=nn.Linear(6, 2)), WORDS)) == [6]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch.export of older versions does not follow it")
def test_units_move_under_a_symmetric_function_of_them() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.head(sum((f(h) for f in SYMMETRIC), h))

    assert sizes(trace(Net(forward, a=nn.Linear(8, 6), head=nn.Linear(6, 2)), WORDS)) == [6]


ALONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {  # of (2, 5, 6): the result, and why the units stay
    "argmax": (lambda h: h * h.argmax(-1, keepdim=True), "returns a position"),
    "largest": (lambda h: h * h.max(-1, keepdim=True)[1], "returns a position"),
    "argsort": (lambda h: h * h.argsort(-1), "returns positions"),
    "topk": (lambda h: h[..., :2] * h.topk(2)[1], "returns positions"),
    "roll": (lambda h: h.roll(1, -1), "moves its positions"),
    "cumsum": (lambda h: h.cumsum(-1), "in order"),
    "cummax": (lambda h: h.cummax(-1)[0], "in order"),
    "nonzero": (lambda h: h * (h > 0).nonzero().sum(), "in order"),
    "cross": (lambda h: torch.linalg.cross(h.view(2, 5, 2, 3), h.view(2, 5, 2, 3) + 1).flatten(2), "in order"),
    "fft": (lambda h: torch.fft.fft(h).real, "tells its positions apart"),
    "tril": (lambda h: h[..., None].expand(2, 5, 6, 6).tril().sum(-1), "one side of the diagonal"),
    "gather": (lambda h: h.gather(-1, torch.arange(6).flip(0).expand(2, 5, 6)), "takes positions by number"),
    "select": (lambda h: h.index_select(-1, torch.arange(6)), "takes positions by number"),
    "mask": (lambda h: h[..., torch.arange(6) != 2], "takes positions by number"),
    "put": (lambda h: h.index_put((torch.tensor([0]), torch.tensor([0]), torch.tensor([1])), torch.zeros(1)), "by number"),
    "column": (lambda h: written(h, (..., 1), 3.0), "takes a position of it"),
    "response": (lambda h: F.local_response_norm(h.transpose(1, 2), 3).transpose(1, 2), "with their neighbours"),
    "pool": (lambda h: F.avg_pool1d(h, 3, 1, 1), "with their neighbours"),
    "windows": (lambda h: h.unfold(-1, 2, 1).sum(-1), "with their neighbours"),
    "constant": (lambda h: h * (torch.arange(6) > 2), "a constant of the network"),
    "one hot": (lambda h: h + F.one_hot(torch.zeros(5, dtype=torch.long), 6), "numbers its positions"),
}  # fmt: skip


def test_units_whose_positions_are_told_apart_stay_for_that_reason() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        parts = [f(layer(x)) for layer, (f, _) in zip(m.layers, ALONG.values(), strict=True)]
        return m.head(m.free(x)) + sum(part.sum(-1, keepdim=True) for part in parts)

    layers = nn.ModuleList(nn.Linear(8, 6) for _ in ALONG)
    spec = trace(Net(forward, layers=layers, free=nn.Linear(8, 6), head=nn.Linear(6, 2)), WORDS)
    assert spec.sizes() == {"free": 6}
    for i, (name, (_, why)) in enumerate(ALONG.items()):
        reasons = [f.reason for f in spec.frozen if (f.name, f.axis) == (f"layers.{i}.weight", 0)]
        assert len(reasons) == 1, name
        assert why in reasons[0], (name, reasons)


def test_images_are_resampled_channel_by_channel() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        for mode in ("bilinear", "bicubic", "nearest-exact"):
            h = h + F.interpolate(h, size=(6, 6), mode=mode)
        h = h + F.interpolate(h, size=(6, 6), mode="bilinear", antialias=True)
        h = h + F.grid_sample(
            h, F.affine_grid(torch.eye(2, 3).expand(2, -1, -1), [2, 12, 6, 6], align_corners=False), align_corners=False
        )
        h = h + F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2) + F.fold(F.unfold(h, 2), (6, 6), 2)
        return m.head(m.b(F.channel_shuffle(h, 3)).mean((2, 3)))

    spec = trace(Net(forward, a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(12, 5, 1), head=nn.Linear(5, 2)), IMAGES)
    assert spec.axes["a.weight"][0] == ((Factor("a", 3), Factor("a#1", 4)),)
    assert spec.axes["b.weight"][1] == ((Factor("a#1", 4), Factor("a", 3)),)


def test_pixels_taken_from_channels_stay_in_their_block() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = F.pixel_shuffle(m.a(x), 2)
        return m.head(
            torch.cat([m.b(F.pixel_unshuffle(h, 2)), m.c(F.unfold(h, 2, stride=2).unflatten(-1, (6, 6)))], 1).mean(
                (2, 3)
            )
        )

    layers = {"a": nn.Conv2d(3, 12, 1), "b": nn.Conv2d(12, 5, 1), "c": nn.Conv2d(12, 4, 1)}
    spec = trace(Net(forward, **layers, head=nn.Linear(9, 2)), IMAGES)
    assert sizes(spec) == [3, 4, 5]
    assert spec.axes["a.weight"][0] == spec.axes["b.weight"][1] == spec.axes["c.weight"][1]
    assert spec.axes["a.weight"][0] == ((Factor("a", 3), Factor(None, 4)),)


def test_images_are_read_at_places_channel_by_channel() -> None:
    ops = pytest.importorskip("torchvision.ops")

    def deformed(m: Net, x: Tensor) -> Tensor:
        h = m.stem(x)
        return m.head(m.deformed(h, m.places(h), m.share(h).sigmoid()).mean((2, 3)))

    def regions(m: Net, x: Tensor) -> Tensor:
        return m.head(ops.roi_align(m.stem(x), m.boxes.to(x.dtype), 2).flatten(1))

    for offsets, units in ((1, [4, 6]), (2, [3, 4])):
        model = Net(
            deformed, stem=nn.Conv2d(3, 6, 1), deformed=ops.DeformConv2d(6, 4, 3, padding=1), head=nn.Linear(4, 2),
            places=nn.Conv2d(6, 18 * offsets, 3, padding=1), share=nn.Conv2d(6, 9 * offsets, 3, padding=1),
        )  # fmt: skip
        spec = trace(model, IMAGES)
        assert sizes(spec) == units
        assert not any(f.name == "deformed.weight" for f in spec.frozen)
    model = Net(regions, stem=nn.Conv2d(3, 6, 1), head=nn.Linear(24, 2))
    model.register_buffer("boxes", torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 0.0, 4.0, 3.0]]))
    assert trace(model, IMAGES).sizes() == {"stem": 6}


def test_tokens_that_are_sent_to_experts_leave_their_units_free() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = x.flatten(0, 1)
        weights, chosen = m.router(h).softmax(-1).topk(1)
        out = torch.zeros(10, 7)
        for i, expert in enumerate(m.experts):
            rows, which = torch.where(chosen == i)
            out.index_add_(0, rows, expert(h[rows]) * weights[rows, which, None])
        return m.head(out)

    experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 7)) for _ in range(2))
    spec = trace(Net(forward, router=nn.Linear(8, 2), experts=experts, head=nn.Linear(7, 2)), WORDS)
    assert sizes(spec) == [6, 6, 7]
    assert any(f.name == "router.weight" and "returns positions" in f.reason for f in spec.frozen)


def test_a_table_summed_in_bags_moves_its_features() -> None:
    spec = trace(nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2)), torch.arange(6).reshape(2, 3))
    assert spec.sizes() == {"0.weight[1]": 4}


def test_sections_without_gradients_or_autocast_are_looked_into() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        with torch.no_grad():
            gate = h.sigmoid()
        with torch.autocast("cpu", enabled=False):
            return m.head(h.float() * gate)

    assert sizes(trace(Net(forward, a=nn.Linear(8, 6), head=nn.Linear(6, 2)), WORDS)) == [6]


def test_both_branches_of_a_condition_are_followed() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        def gated(h: Tensor) -> Tensor:
            return h * m.gate

        return m.head(torch.cond(x.sum() > 0, gated, lambda h: h.relu(), (m.a(x),)))

    def by_hand(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = F.linear(x, p["a.weight"], p["a.bias"])
        return F.linear(h * p["gate"] if x.sum() > 0 else h.relu(), p["head.weight"], p["head.bias"])

    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(8, 6), gate=nn.Parameter(torch.randn(6)), head=nn.Linear(6, 2))
    spec = perm_spec(model, WORDS)
    assert sizes(spec) == [6]
    assert spec.axes["gate"] == (spec.axes["a.weight"][0],)
    moved = fm.permute(model.state_dict(), spec.random(torch.Generator().manual_seed(0)), spec=spec)
    for x in (WORDS, -WORDS):  # one for each branch
        torch.testing.assert_close(by_hand(moved, x), by_hand(model.state_dict(), x))


def test_an_operator_made_of_others_is_understood_by_its_parts() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = torch.tile(m.a(x), (1, 1, 2)).movedim(1, -1)
        return m.head(torch.kron(h[0], torch.ones(1, 1)).mT + F.hardshrink(torch.hstack([h[0], h[0]])[:, :5].mT))

    model = Net(forward, a=nn.Linear(8, 6), head=nn.Linear(12, 2))
    assert sizes(trace(model, WORDS)) == [2, 6]  # the two copies are alike, and their readers may change places


def test_what_writes_into_its_argument_is_not_taken_apart() -> None:
    spec = perm_spec(
        Net(lambda m, x: m.head(m.a(x).squeeze_(0).t_().mT), a=nn.Linear(8, 6), head=nn.Linear(6, 2)), WORDS[0]
    )
    assert any("understood" in f.reason for f in spec.frozen)


def test_positions_beyond_the_example_stay() -> None:
    """A table that is cut to the length of its input: what this example does not read, a longer one does."""
    model = Net(
        lambda m, x: m.head(m.a(x + m.table[: x.shape[1]]).relu()),
        table=nn.Parameter(torch.randn(9, 8)), a=nn.Linear(8, 6), head=nn.Linear(6, 2),
    )  # fmt: skip
    spec = trace(model, WORDS)
    assert sizes(spec) == [6]
    moved = fm.permute(model.state_dict(), spec.random(torch.Generator().manual_seed(0)), spec=spec)
    longer = torch.randn(2, 9, 8).double()
    before = model(longer)
    model.load_state_dict(moved)
    torch.testing.assert_close(model(longer), before)


def test_what_is_left_out_by_one_slice_and_read_by_another_moves() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.head(h[..., :4].relu() * h[..., 4:].mean(-1, keepdim=True))

    assert sizes(trace(Net(forward, a=nn.Linear(8, 7, bias=False), head=nn.Linear(4, 2)), WORDS)) == [3, 4]


def test_channels_move_with_the_places_of_their_maxima() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h, places = F.max_pool2d(m.a(x).relu(), 2, return_indices=True)
        return m.head(F.max_unpool2d(m.b(h), places, 2))

    layers = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(6, 6, 1), "head": nn.Conv2d(6, 2, 1)}
    assert sizes(trace(Net(forward, **layers), IMAGES)) == [6]
