"""Operators along an axis: symmetric in its positions, or going through them in order, or sorting them."""

from typing import Any

from torch import fx

from fedmerge.spec.operators._elementwise import pointwise
from fedmerge.spec.operators.interpreter import (
    Interpreter,
    Labels,
    along,
    args,
    argument,
    axes,
    freeze_all,
    handles,
    name,
    operator_name,
    shape,
    tensors,
)

_SECOND = ("norm", "linalg_vector_norm", "kthvalue", "renorm", "quantile", "nanquantile")
"""Reductions whose axis is the third argument, not the second."""


@handles("mean", "sum", "prod", "amax", "amin", "logsumexp", "norm", "linalg_vector_norm", "max", "min", "var", "std",
         "var_mean", "std_mean", "any", "all", "nansum", "nanmean", "count_nonzero", "aminmax", "median", "nanmedian",
         "mode", "kthvalue", "argmax", "argmin", "quantile", "nanquantile")  # fmt: skip
def reduction(run: Interpreter, node: fx.Node) -> Any:
    """A symmetric function of the positions of an axis: that axis may move freely, unless a position is returned."""
    operator = operator_name(node)
    if operator in ("max", "min") and len(tensors(node)) > 1:
        return pointwise(run, node)
    x = run.label(args(node)[0])
    gone = set(axes(argument(node, 2 if operator in _SECOND else 1, "dim"), len(x)))
    values = node.meta["val"]
    several = isinstance(values, (tuple, list))
    first = values[0] if several else values
    indices = several and values[-1].dtype != first.dtype
    if operator.startswith("arg") or (indices and _read(node, len(values) - 1)):
        for i in gone:
            run.symbols.freeze(x[i], f"{name(node)} returns a position")
    if "quantile" in operator:
        levels = run.like(node, f"{name(node)}: levels in order")
        return (
            tuple(levels) if first.dim() != len(x) - len(gone) else tuple(e for i, e in enumerate(x) if i not in gone)
        )
    keep = first.dim() == len(x) and first.dim() > 0
    kept = tuple(run.symbols.fresh(1) if i in gone else label for i, label in enumerate(x) if keep or i not in gone)
    return [kept] * len(values) if several else kept


def _read(node: fx.Node, result: int) -> bool:
    """Whether anything uses the result with that number."""
    return any(user.args[1] == result and user.users for user in node.users)


@handles("sort", "topk", "argsort", "msort")
def by_size(run: Interpreter, node: fx.Node) -> Any:
    """Positions in the order of their numbers: the result stays, and so does the axis if it says where they were."""
    x, operator = run.label(args(node)[0]), operator_name(node)
    position = 0 if operator == "msort" else 2 if str(node.target).endswith("sort.stable") else 1
    dim = argument(node, position, "dim", 0 if operator == "msort" else -1)
    dim = -1 if operator == "topk" and len(args(node)) < 3 else args(node)[2] if operator == "topk" else dim
    i = int(dim) % len(x)
    values = node.meta["val"]
    several = isinstance(values, (tuple, list))
    if operator == "argsort" or (several and _read(node, 1)):
        run.symbols.freeze(x[i], f"{name(node)} returns positions")
    n = int(values[0].shape[i]) if several else shape(node)[i]
    found = (*x[:i], run.symbols.fresh(n, f"{name(node)} sorts by size"), *x[i + 1 :])
    return [found, found] if several else found


@handles("cumsum", "cumprod", "logcumsumexp", "cumsum_", "cumprod_")
def running(run: Interpreter, node: fx.Node) -> Labels:
    """Sums over all positions before: their order counts, other axes pass."""
    x = run.label(args(node)[0])
    return along(run, node, x, axes(argument(node, 1, "dim"), len(x)), "goes through its positions in order")


@handles("cummax", "cummin")
def running_extreme(run: Interpreter, node: fx.Node) -> list[Labels]:
    """The largest so far, and where it was."""
    x, i = run.label(args(node)[0]), int(argument(node, 1, "dim")) % len(shape(args(node)[0]))
    reason = f"{name(node)} goes through its positions in order"
    run.symbols.freeze(x[i], reason)
    return [x, x]


@handles("tril", "triu", "tril_", "triu_")
def triangle(run: Interpreter, node: fx.Node) -> Labels:
    """Numbers on one side of the diagonal: rows and columns stay in order."""
    x = run.label(args(node)[0])
    return along(run, node, x, (len(x) - 2, len(x) - 1), "keeps one side of the diagonal")


@handles("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft", "fft_fft2", "fft_ifft2", "fft_rfft2",
         "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "fft_fftshift",
         "fft_ifftshift")  # fmt: skip
def fourier(run: Interpreter, node: fx.Node) -> Labels:
    """A Fourier transform along some axes, whose positions are places and frequencies; other axes pass."""
    x, operator = run.label(args(node)[0]), operator_name(node)
    if operator.endswith("shift"):
        dims = axes(argument(node, 1, "dim"), len(x))
    elif operator.endswith("2"):
        dims = axes(argument(node, 2, "dim", [-2, -1]), len(x))
    elif operator.endswith("n"):
        lengths = argument(node, 1, "s")
        dims = axes(argument(node, 2, "dim", list(range(-len(lengths), 0)) if lengths else None), len(x))
    else:
        dims = axes(argument(node, 2, "dim", -1), len(x))
    return along(run, node, x, dims, "tells its positions apart")


@handles("view_as_real", "view_as_complex")
def complex_pairs(run: Interpreter, node: fx.Node) -> Labels:
    """Real and imaginary part as an axis of two, or such an axis as complex numbers."""
    x, reason = run.label(args(node)[0]), f"{name(node)}: real and imaginary part"
    if operator_name(node) == "view_as_real":
        return (*x, run.symbols.fresh(2, reason))
    run.symbols.freeze(x[-1], reason)
    return x[:-1]


@handles("unfold")
def windows(run: Interpreter, node: fx.Node) -> Labels:
    """Windows that slide along an axis, their positions as a new last axis."""
    x = run.label(args(node)[0])
    dims = axes(argument(node, 1, "dimension"), len(x))
    reason = f"{name(node)} reads its positions with their neighbours"
    within = run.symbols.fresh(shape(node)[-1], reason)
    return (*along(run, node, x, dims, "reads its positions with their neighbours"), within)


@handles("linalg_householder_product", "linalg_qr", "linalg_cholesky", "linalg_svd", "linalg_eigh", "linalg_lu",
         "cross", "linalg_cross", "searchsorted", "bucketize")  # fmt: skip
def in_order(run: Interpreter, node: fx.Node) -> Any:
    """What goes through rows or columns one after the other: all of it stays."""
    return freeze_all(run, node, f"{name(node)} goes through its positions in order")


@handles("linalg_inv", "linalg_matrix_exp", "matrix_exp", "inverse")
def square(run: Interpreter, node: fx.Node) -> Labels:
    """A function of a square matrix, the same for every order of its rows and columns if both are in that order."""
    x = run.label(args(node)[0])
    run.symbols.tie(x[-2], x[-1], name(node))
    return x


@handles("linalg_solve")
def solve(run: Interpreter, node: fx.Node) -> Any:
    """X of A X = B: unknowns are the columns of A, equations its rows."""
    a, b = (run.label(t) for t in args(node)[:2])
    vector = len(b) < len(a) or shape(args(node)[1]) == shape(args(node)[0])[:-1]
    if not argument(node, 2, "left", True) or vector:
        a, b = ((*a[:-2], a[-1], a[-2]), b) if not vector else (a, (*b, run.symbols.fresh(1)))
    columns = b[-1] if argument(node, 2, "left", True) else b[-2]
    rows = b[-2] if argument(node, 2, "left", True) else b[-1]
    run.symbols.tie(a[-2], rows, name(node))
    result = (*b[:-2], a[-1], columns) if argument(node, 2, "left", True) else (*b[:-2], columns, a[-1])
    return result[:-1] if vector else result
