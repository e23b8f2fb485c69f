"""Recurrent layers: the hidden units of a layer move together, in all of its gates."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import fx

from fedmerge.spec.operators.interpreter import Interpreter, Labels, Stack, args, handles, name, operator_name, shape
from fedmerge.spec.symbols import Label

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@handles(*_GATES)
def recurrent(run: Interpreter, node: fx.Node) -> list[Any]:
    """LSTM, GRU or plain RNN, of one or several layers, in one or both directions.

    A layer of H units and G gates has weights (G H, inputs) and (G H, H): their rows are G blocks of the same H
    units. An LSTM with projections of P units has (G H, P) and the projection (P, H). The steps stay in order.
    """
    packed = str(node.target).endswith(".data")
    x, rest = run.label(args(node)[0]), args(node)[2 if packed else 1 :]
    states = rest[0] if isinstance(rest[0], (tuple, list)) else [rest[0]]
    weights, biases, layers, both = rest[1], bool(rest[2]), int(rest[3]), bool(rest[6])
    steps = 1 if not packed and bool(rest[7]) else 0
    run.symbols.freeze(x[steps], f"{name(node)} reads its steps in order")
    batch = () if packed else (x[1 - steps],)
    gates, directions = _GATES[operator_name(node)], 2 if both else 1
    each = len(weights) // (layers * directions)
    incoming, hidden, cells = x[-1], [], []
    for layer in range(layers):
        outputs: list[Label] = []
        for direction in range(directions):
            at = layer * directions + direction
            given = [run.label(w) for w in weights[at * each : (at + 1) * each]]
            projection = given[-1] if each > (4 if biases else 2) else None
            n = shape(weights[at * each])[0] // gates
            unit = run.symbols.fresh(n)
            output = unit if projection is None else projection[0]
            if projection is not None:
                run.symbols.tie(projection[1], unit, name(node))
            for labels in given[: 4 if biases else 2]:
                run.symbols.tie(labels[0], unit * gates, name(node))
            run.symbols.tie(given[0][1], incoming, name(node))
            run.symbols.tie(given[1][1], output, name(node))
            outputs.append(output)
            hidden.append(output)
            cells.append(unit)
        incoming = tuple(product for label in outputs for product in run.symbols.resolve(label))
    for state, units in zip(states, (hidden, cells), strict=False):
        for labels, unit in zip(_slices(run, state, len(units)), units, strict=True):
            run.symbols.tie(labels[-1], unit, name(node))
            for a, b in pairwise((*labels[:-1], *batch)):
                run.symbols.tie(a, b, name(node))
    y = list(x)
    y[steps], y[-1] = run.symbols.fresh(shape(args(node)[0])[steps], f"{name(node)} gives its steps in order"), incoming
    lasts = [_states(run, batch or (run.symbols.fresh(shape(states[0])[1]),), units) for units in (hidden, cells)]
    return [tuple(y), *lasts[: len(states)]]


def _slices(run: Interpreter, state: fx.Node, n: int) -> Iterator[Labels]:
    """Labels of the state (n, batch, units) of each layer and direction."""
    value = run.env[state]
    if state in run.alike:
        yield from (tuple(run.symbols.fresh(m) for m in shape(state)[1:]) for _ in range(n))
    elif isinstance(value, Stack) and value.dim == 0:
        yield from value.slices
    else:
        labels = run.label(state)
        run.symbols.freeze(labels[0], f"{state.name}: numbers the layers of a recurrent network")
        yield from (labels[1:] for _ in range(n))


def _states(run: Interpreter, batch: Labels, units: list[Label]) -> Any:
    """The last states (layers and directions, batch, units)."""
    return Stack(0, tuple((*batch, unit) for unit in units))
