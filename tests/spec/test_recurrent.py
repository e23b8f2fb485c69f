"""Recurrent layers: the hidden units of a layer are one group, in every gate."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from traced import Net, sizes, trace

import fedmerge as fm
from fedmerge.spec import Factor, perm_spec

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

STEPS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("kind", "options", "units"),
    [
        (nn.LSTM, {"num_layers": 2, "batch_first": True}, [4, 4]),
        (nn.LSTM, {"num_layers": 2, "proj_size": 3, "bidirectional": True}, [3, 3, 3, 3, 4, 4, 4, 4]),
        (nn.GRU, {"bias": False, "bidirectional": True}, [4, 4]),
        (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}, [4, 4]),
    ],
)
def test_a_layer_is_one_group(kind: Any, options: dict[str, Any], units: list[int]) -> None:
    layers = kind(6, 4, **options)
    width = layers(torch.zeros(1, 1, 6))[0].shape[-1]
    model = Net(
        lambda m, x: m.head(m.layers(m.stem(x))[0][:, -1]),
        stem=nn.Linear(8, 6),
        layers=layers,
        head=nn.Linear(width, 2),
    )
    spec = trace(model, STEPS)
    assert sizes(spec) == [*units, 6]
    gates = spec.axes["layers.weight_ih_l0"][0]
    assert len(gates) == {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    assert len(set(gates)) == 1
    assert spec.axes["layers.weight_hh_l0"][0] == gates
    both = 2 if options.get("bidirectional") else 1
    assert len(spec.axes["head.weight"][1]) == both


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch.export of older versions does not follow it")
def test_last_states_carry_the_units_of_each_layer_on() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        states = m.encoder(x)[1]
        return m.head(torch.cat([m.decoder(x, states)[0][0], states[0][-1]], -1))

    model = Net(forward, encoder=nn.LSTM(8, 4, 2), decoder=nn.LSTM(8, 4, 2), head=nn.Linear(8, 2))
    spec = trace(model, STEPS)
    assert sizes(spec) == [4, 4]
    for layer in (0, 1):
        assert spec.axes[f"encoder.weight_hh_l{layer}"] == spec.axes[f"decoder.weight_hh_l{layer}"]
    assert spec.axes["head.weight"][1] == spec.axes["decoder.weight_hh_l1"][1] * 2


def test_learned_first_states_move_and_tie_the_layers_that_share_their_axis() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        start = m.start.expand(-1, 5, -1).contiguous()
        return m.head(m.layers(x, start)[0].mean(0))

    def traced(layers: int) -> Any:
        gru = nn.GRU(8, 4, layers)
        return trace(
            Net(forward, start=nn.Parameter(torch.randn(layers, 1, 4)), layers=gru, head=nn.Linear(4, 2)), STEPS
        )

    assert traced(1).axes["start"][2] == ((Factor("layers.weight_ih_l0", 4),),)
    spec = traced(2)
    assert sizes(spec) == [4]
    assert spec.axes["layers.weight_hh_l0"][1] == spec.axes["layers.weight_hh_l1"][1] == spec.axes["start"][2]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_loop_over_a_cell_is_one_group(kind: Any) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        state = None
        for t in range(2):
            state = m.cell(x[:, t], state)
        return m.head(state[0] if isinstance(state, tuple) else state)

    assert sizes(trace(Net(forward, cell=kind(8, 4), head=nn.Linear(4, 2)), STEPS)) == [4]


def test_units_of_layers_that_begin_at_the_same_zeros_stay_apart() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = torch.zeros(2, 4)
        a = b = h.view(1, 2, 4)[0]
        for t in range(2):
            a, b = m.a(x[:, t], a), m.b(x[:, t], b)
        return m.head(a * 2) + m.head2(b)

    cells = {"a": nn.GRUCell(8, 4), "b": nn.GRUCell(8, 4)}
    assert sizes(trace(Net(forward, **cells, head=nn.Linear(4, 2), head2=nn.Linear(4, 2)), STEPS)) == [4, 4]


def test_zeros_that_are_written_into_take_the_units_of_what_is_written() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = torch.zeros(2, 5, 9)
        h[..., :4] = m.a(x)
        h[..., 4:] = m.b(x)
        return m.head(h)

    spec = trace(Net(forward, a=nn.Linear(8, 4), b=nn.Linear(8, 5), head=nn.Linear(9, 2)), STEPS)
    assert spec.axes["head.weight"][1] == ((Factor("a", 4),), (Factor("b", 5),))


def test_weight_matching_recovers_a_planted_order_of_an_lstm() -> None:
    model = Net(
        lambda m, x: m.head(m.layers(x)[0][:, -1]), layers=nn.LSTM(8, 6, 2, bidirectional=True), head=nn.Linear(12, 2)
    )
    spec = perm_spec(model, STEPS)
    generator = torch.Generator().manual_seed(1)
    a = {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}
    planted = spec.random(generator)
    b = fm.permute(a, planted, spec=spec)
    found = fm.align(b, to=a, spec=spec, method="weight-matching", rng=np.random.default_rng(0))
    torch.testing.assert_close(fm.permute(b, found.perms, spec=spec), a)
