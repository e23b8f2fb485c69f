"""Operators on images: pooling, resampling, patches, pixels taken from channels."""

from typing import Any

from torch import fx

from fedmerge.spec.operators.interpreter import (
    Interpreter,
    Labels,
    args,
    handles,
    name,
    operator_name,
    shape,
    sizes,
    spatial,
)
from fedmerge.spec.symbols import Label

_DIMENSIONS = [
    f"{prefix}{kind}{d}d{suffix}"
    for d in (1, 2, 3)
    for prefix, kind, suffix in (
        ("", "max_pool", ""), ("", "max_pool", "_with_indices"), ("", "avg_pool", ""), ("", "adaptive_avg_pool", ""),
        ("_", "adaptive_avg_pool", ""), ("", "adaptive_max_pool", ""), ("", "fractional_max_pool", ""),
        ("", "max_unpool", ""), ("", "upsample_nearest", ""), ("_", "upsample_nearest_exact", ""),
        ("", "upsample_linear", ""), ("", "upsample_bilinear", ""), ("", "upsample_trilinear", ""),
        ("", "upsample_bicubic", ""), ("_", "upsample_bilinear", "_aa"), ("_", "upsample_bicubic", "_aa"),
        ("", "reflection_pad", ""), ("", "replication_pad", ""),
    )
]  # fmt: skip


@handles(*_DIMENSIONS)
def pooling(run: Interpreter, node: fx.Node) -> Any:
    """Each channel by itself: channels pass, image positions stay."""
    x = list(run.label(args(node)[0]))
    if operator_name(node).startswith("max_unpool"):  # where each maximum was: the channels of another layer
        where = run.label(args(node)[1])
        for a, b in zip(x[: -spatial(node)], where[: -spatial(node)], strict=True):
            run.symbols.tie(a, b, name(node))
    values = node.meta["val"]
    first = sizes(values[0] if isinstance(values, (tuple, list)) else values)
    for i in range(len(x) - spatial(node), len(x)):
        run.symbols.freeze(x[i], f"{name(node)} reads its positions with their neighbours")
        x[i] = run.symbols.fresh(first[i], "a position in an image")
    return [tuple(x)] * len(values) if isinstance(values, (tuple, list)) else tuple(x)


@handles("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(run: Interpreter, node: fx.Node) -> Labels:
    """Images read at the places of a grid: channels pass."""
    x, grid = run.label(args(node)[0]), run.label(args(node)[1])
    run.symbols.tie(x[0], grid[0], name(node))
    for label in (*x[2:], *grid[1:]):
        run.symbols.freeze(label, f"{name(node)} reads positions by their place")
    return (*x[:2], *_places(run, node, 2))


@handles("torchvision.roi_align", "torchvision.roi_pool")
def regions(run: Interpreter, node: fx.Node) -> Any:
    """Regions of images: channels pass; a region says by number of which image it is."""
    x, places = run.label(args(node)[0]), f"{name(node)} reads positions by their place"
    for labels in ((x[0], *x[2:]), run.label(args(node)[1])):
        run.freeze(labels, places)
    values = node.meta["val"]
    first = sizes(values[0] if isinstance(values, (tuple, list)) else values)
    found = (run.symbols.fresh(first[0], places), x[1], *(run.symbols.fresh(n, places) for n in first[2:]))
    return [found] * len(values) if isinstance(values, (tuple, list)) else found


def _places(run: Interpreter, node: fx.Node, after: int) -> Labels:
    return tuple(run.symbols.fresh(n, "a position in an image") for n in shape(node)[after:])


@handles("pixel_shuffle", "pixel_unshuffle", "im2col", "col2im")
def pixels(run: Interpreter, node: fx.Node) -> Labels:
    """Channels that hold the pixels of a block one after another, and blocks of pixels as channels."""
    x = list(run.label(args(node)[0]))
    into = operator_name(node) in ("pixel_unshuffle", "im2col")
    at = len(x) - (2 if operator_name(node) == "col2im" else 3)
    places = f"{name(node)} reads its positions by their place"
    for label in x[at + 1 :]:
        run.symbols.freeze(label, places)
    before, after = shape(args(node)[0])[at], shape(node)[at]
    block: Label = run.symbols.fresh(max(before, after) // min(before, after), places)
    if into:
        out: Label = tuple((*segment, *block[0]) for segment in run.symbols.resolve(x[at]))
    else:
        out = run.symbols.fresh(after)
        run.symbols.tie(x[at], ((*out[0], *block[0]),), name(node))
    return (*x[:at], out, *_places(run, node, at + 1))
