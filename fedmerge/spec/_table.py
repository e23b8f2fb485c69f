"""A :class:`~fedmerge.spec.PermSpec` as plain text: what moves together, what stays and why, how much that is."""

import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmerge.spec.axes import PermSpec

Place = tuple[str, int]
"""A tensor and one of its axes."""

_SHOWN = 4  # places a side
_EXAMPLES = 3
_COLUMN = 92  # characters of the last column, then it wraps
_TAKEN = ("rows are named by an index", "takes positions by number")
_KEY = "name[a]: axis a of a tensor; m.*[a]: axis a of every tensor of module m; p.{x y}: p.x and p.y"


def table(spec: "PermSpec") -> str:
    """``spec`` as aligned text: a row a group, a row a reason of axes that stay, and the totals.

    A group's places stand on two sides of a bar: the tensors that write its units, and what moves along
    (biases, normalisation, statistics), then the tensors that read them. Places are shortened: all tensors of a
    module, modules that differ in one number, a shared prefix, and at most so many a side.
    """
    rows = []
    for group, n in spec.sizes().items():
        write, read = (shorten(side, spec, _SHOWN) or "-" for side in sides(spec, group))
        row = f"{write} | {read}"
        both = row if len(row) <= _COLUMN else f"{write}\n| {read}"
        rows.append((group, f"{n}", f"{log10_factorial(n):.1f}", both))
    lines = _aligned(("group", "units", "log10(n!)", "written by | read by"), rows, "<>><")
    reasons: dict[str, list[Place]] = {}
    for frozen in spec.frozen:
        reasons.setdefault(plain(frozen.reason), []).append((frozen.name, frozen.axis))
    if reasons:
        stays = [(why, f"{len(places)}", shorten(places, spec, _EXAMPLES)) for why, places in reasons.items()]
        lines += ["", *_aligned(("stays, and why", "axes", "for example"), stays, "<><")]
    return "\n".join([*lines, "", totals(spec), _KEY])


def totals(spec: "PermSpec") -> str:
    """Groups, permutations and what is counted, share of the parameters, in one line."""
    groups = "1 group" if len(spec.groups) == 1 else f"{len(spec.groups)} groups"
    return (
        f"{groups}, 10^{spec.log10_symmetries():.1f} permutations (the product of n! over groups of n units), "
        f"{100 * spec.permutable_share():.1f} % of the parameters on a permutable axis"
    )


def log10_factorial(n: int) -> float:
    """log10 of n!."""
    return math.lgamma(n + 1) / math.log(10)


def plain(reason: str) -> str:
    """``reason`` without the number of its operator in the graph, ``chunk_1: ...`` as ``chunk: ...``."""
    return re.sub(r"^([a-z]\w*?)_\d+\b", r"\1", reason)


def read_axis(spec: "PermSpec", name: str) -> int | None:
    """The axis along which tensor ``name`` reads units; the others write them. None for vectors.

    PyTorch's layout is (out, in, ...). It is (in, out, ...) in a transposed layer, known by a bias that moves
    with axis 1 alone, and in a table whose rows are taken by number. A transposed layer without a bias cannot be
    told apart.
    """
    axes = spec.axes[name]
    if len(axes) < 2:
        return None
    taken = any((f.name, f.axis) == (name, 0) and f.reason.endswith(_TAKEN) for f in spec.frozen)
    bias = spec.axes.get(name.removesuffix("weight") + "bias", ())
    transposed = len(bias) == 1 and axes[1] == bias[0] != axes[0]
    return 0 if taken or transposed else 1


def sides(spec: "PermSpec", group: str) -> tuple[list[Place], list[Place]]:
    """The places of ``group``: those that write its units or move along, and those that read them."""
    places = list(dict.fromkeys((o.name, o.axis) for o in spec.occurrences(group)))
    reading = [place for place in places if place[1] == read_axis(spec, place[0])]
    return [place for place in places if place not in reading], reading


def shorten(places: Sequence[Place], spec: "PermSpec", most: int) -> str:
    """``places`` in few words; after ``most`` of them the number of those left out."""
    texts = [f"{path}[{axis}]" for path, axis in _in_ranges(_by_module(places, spec))]
    shown = texts[:most]
    modules = [text.split(".")[:-1] for text in shown]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))
    prefix = "".join(f"{parts[0]}." for parts in same)
    if len(shown) > 1 and prefix:
        shown = [f"{prefix}{{{' '.join(text.removeprefix(prefix) for text in shown)}}}"]
    return " ".join(shown) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def _by_module(places: Iterable[Place], spec: "PermSpec") -> list[Place]:
    """``places`` with ``m.*`` where all tensors of module m that have this axis are there, and more than one is."""
    members: dict[Place, set[str]] = {}
    for name, shape in spec.shapes.items():
        for axis in range(len(shape)):
            members.setdefault((name.rpartition(".")[0], axis), set()).add(name)
    here: dict[Place, set[str]] = {}
    for name, axis in places:
        here.setdefault((name.rpartition(".")[0], axis), set()).add(name)
    whole = {key for key, names in here.items() if key[0] and len(names) > 1 and names == members[key]}
    modules = [(name.rpartition(".")[0], axis) for name, axis in places]
    found = [
        (f"{key[0]}.*", axis) if key in whole else (name, axis)
        for (name, axis), key in zip(places, modules, strict=True)
    ]
    return list(dict.fromkeys(found))


def _in_ranges(places: Sequence[Place]) -> list[Place]:
    """``places`` with one entry for those that differ in one number only: ``blocks.0-2.conv1.weight``."""
    entries = [(re.split(r"(\d+)", path), axis) for path, axis in places]  # text, number, text, number, ...
    for at in range(1, max((len(words) for words, _ in entries), default=0), 2):  # the outermost number first
        alike: dict[tuple[object, ...], list[str]] = {}
        keys = [(axis, *words[:at], None, *words[at + 1 :]) for words, axis in entries]
        for key, (words, _) in zip(keys, entries, strict=True):
            alike.setdefault(key, []).extend(words[at : at + 1])
        merged: dict[tuple[object, ...], tuple[list[str], int]] = {}
        for key, (words, axis) in zip(keys, entries, strict=True):
            number = [_ranges(map(int, alike[key]))] if len(alike[key]) > 1 else words[at : at + 1]
            merged.setdefault(key, ([*words[:at], *number, *words[at + 1 :]], axis))
        entries = list(merged.values())
    return [("".join(words), axis) for words, axis in entries]


def _ranges(values: Iterable[int]) -> str:
    """``0-3`` for 0, 1, 2, 3; ``{0-1,4}`` for 0, 1, 4."""
    spans: list[list[int]] = []
    for value in sorted(values):
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    texts = [f"{a}-{b}" if a != b else f"{a}" for a, b in spans]
    return texts[0] if len(texts) == 1 else f"{{{','.join(texts)}}}"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Columns two spaces apart, left (<) or right (>); the last one wraps."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    margin = " " * (sum(widths) + 2 * len(widths))
    lines = []
    for row in (head, *rows):
        cells = [f"{text:{side}{width}}" for text, side, width in zip(row, sides, widths, strict=False)]
        last = [line for part in row[-1].split("\n") for line in _wrapped(part)]
        lines += [f"{'  '.join(cells)}  {last[0]}".rstrip(), *(margin + text for text in last[1:])]
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _COLUMN, break_long_words=False, break_on_hyphens=False) or [""]
