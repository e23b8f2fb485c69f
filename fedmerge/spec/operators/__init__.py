"""What each ATen operator does to the axes of its tensors.

One handler an operator family, one file a kind of family. A handler receives the interpreter and the graph
node, ties, cuts or freezes the labels of the node's arguments, and returns the labels of the result. An
operator without a handler freezes everything that enters it: unknown means unpermuted, never wrong.
"""

from fedmerge.spec.operators import (  # noqa: F401  # for their handlers, which register themselves
    _axes,
    _choices,
    _composite,
    _elementwise,
    _images,
    _linear,
    _norms,
    _pieces,
    _recurrent,
    _reductions,
    _reshape,
    products,
)
from fedmerge.spec.operators._norms import statistics
from fedmerge.spec.operators.interpreter import HANDLERS, Interpreter

__all__ = ["HANDLERS", "Interpreter", "statistics"]
