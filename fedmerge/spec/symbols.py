"""Unknowns for the axes of a traced network, solved by unification.

Every axis of every parameter begins as one unknown. What an operator does ties unknowns together, cuts
them into products (flatten, attention heads) or concatenations, or freezes them. What is never frozen
may be permuted.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Part(NamedTuple):
    """A factor of an axis: an unknown and the number of positions that it indexes."""

    symbol: int
    size: int


Product = tuple[Part, ...]
Label = tuple[Product, ...]
"""An axis: products laid end to end (as :data:`fedmerge.spec.axes.Axis`, over unknowns)."""


def length(label: Label) -> int:
    """Number of positions of an axis."""
    return sum(math.prod(part.size for part in product) for product in label)


class Symbols:
    """A store of unknowns with union, binding to a structure, and freezing with a reason."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._bound: dict[int, Label] = {}
        self._reason: dict[int, str] = {}
        self._ties: dict[int, list[str]] = {}

    def fresh(self, size: int, reason: str | None = None) -> Label:
        """An axis of one new unknown; with ``reason``, a frozen one. Axes of one position, or none, are frozen."""
        symbol = len(self._parent)
        self._parent.append(symbol)
        if reason is not None or size < 2:
            self._reason[symbol] = reason or "a single unit"
        return ((Part(symbol, size),),)

    def root(self, symbol: int) -> int:
        """The representative of ``symbol``."""
        while self._parent[symbol] != symbol:
            self._parent[symbol] = self._parent[self._parent[symbol]]
            symbol = self._parent[symbol]
        return symbol

    def reason(self, symbol: int) -> str | None:
        """Why ``symbol`` is frozen; None when it may be permuted."""
        return self._reason.get(self.root(symbol))

    def ties(self, symbol: int) -> tuple[str, ...]:
        """The operators that tied ``symbol`` to others, in graph order."""
        return tuple(dict.fromkeys(self._ties.get(self.root(symbol), ())))

    def resolve(self, label: Label) -> Label:
        """``label`` with every bound unknown replaced by what it is bound to."""
        resolved: list[Product] = []
        for product in label:
            alternatives: list[Product] = [()]
            for position, part in enumerate(product):
                root = self.root(part.symbol)
                inner = self.resolve(self._bound[root]) if root in self._bound else ((Part(root, part.size),),)
                if position == 0:
                    alternatives = list(inner)
                elif len(inner) == 1:
                    alternatives = [left + inner[0] for left in alternatives]
                else:
                    self.freeze(inner, "a concatenation inside a product")
                    rest = self.fresh(part.size, "a concatenation inside a product")
                    alternatives = [left + rest[0] for left in alternatives]
            resolved += alternatives
        return tuple(resolved)

    def parts(self, label: Label) -> Iterator[Part]:
        """The resolved factors of ``label``."""
        for product in self.resolve(label):
            yield from product

    def freeze(self, label: Label, reason: str) -> None:
        """Forbid every permutation of ``label``; the first reason stays."""
        for part in self.parts(label):
            self._reason.setdefault(self.root(part.symbol), reason)

    def frozen(self, label: Label) -> bool:
        """Whether no factor of ``label`` may move."""
        return all(self.reason(part.symbol) is not None for part in self.parts(label))

    def tie(self, a: Label, b: Label, operator: str) -> None:
        """Make ``a`` and ``b`` move together; what cannot be made equal is frozen with ``operator`` as reason.

        Each round cuts one unknown where the other side has a boundary, so the sides come to the same
        structure: both the finest of the two. Unknowns only shrink, so the rounds end.
        """
        if length(a) != length(b):
            raise AssertionError(f"{operator}: axes of {length(a)} and {length(b)} positions cannot be tied")
        while True:
            a, b = self.trim(a), self.trim(b)
            if a == b or (self.frozen(a) and self.frozen(b)):
                return
            if self.frozen(a) or self.frozen(b):
                reason = self.why((*a, *b)) or f"{operator} tells its positions apart, each is a unit of its own"
                self.freeze(a, reason)
                self.freeze(b, reason)
                return
            if self._shape(a) == self._shape(b):
                for left, right in zip(self.parts(a), self.parts(b), strict=True):
                    self._union(left.symbol, right.symbol, operator)
                return
            if self._bind(a, b, operator) or self._bind(b, a, operator):
                return
            if not self._refine(a, b, operator):
                for label in (a, b):
                    self.freeze(label, f"{operator}: axes of different structure meet")
                return

    def trim(self, label: Label) -> Label:
        """``label`` resolved, without the factors of one position."""
        return tuple(tuple(part for part in product if part.size > 1) for product in self.resolve(label))

    def why(self, label: Label) -> str | None:
        """The first reason for which a factor of ``label`` is frozen."""
        reasons = (self.reason(part.symbol) for part in self.parts(label) if part.size > 1)
        return next((reason for reason in reasons if reason is not None), None)

    def split(self, part: Part, sizes: Iterable[int]) -> Product:
        """Cut one unknown into a product of new ones (slowest first); it then moves only as that product."""
        reason = self.reason(part.symbol)
        product = tuple(self.fresh(size, reason)[0][0] for size in sizes)
        self._bound[self.root(part.symbol)] = (product,)
        return product

    def cut(self, label: Label, at: int, operator: str) -> tuple[Label, Label]:
        """The positions of ``label`` before ``at`` and from it on; units then move on one side only."""
        while True:
            label, start = self.trim(label), 0
            for i, product in enumerate(label):
                if start == at:
                    return label[:i], label[i:]
                end = start + length((product,))
                if at < end:
                    break
                start = end
            else:
                return label, ()
            if self.frozen((product,)) or not self._divide(product, at - start):
                if not self.frozen((product,)):
                    self.freeze((product,), f"{operator}: an axis is cut within its units")
                reason = self.why((product,))
                left, right = self.fresh(at - start, reason), self.fresh(end - at, reason)
                return (*label[:i], *left), (*right, *label[i + 1 :])

    def _divide(self, product: Product, at: int) -> bool:
        """Cut the slowest factor of ``product`` so that a boundary falls at ``at``; False if there is none."""
        head = product[0]
        units, odd = divmod(at, length((product[1:],)))
        if odd:
            return False
        reason = self.reason(head.symbol)
        pieces = (self.fresh(units, reason), self.fresh(head.size - units, reason))
        self._bound[self.root(head.symbol)] = (*pieces[0], *pieces[1])
        return True

    def _bind(self, single: Label, other: Label, operator: str) -> bool:
        """Bind ``single`` to the structure of ``other``, if it is one unknown."""
        if len(single) != 1 or len(single[0]) != 1 or any(p.symbol == single[0][0].symbol for p in self.parts(other)):
            return False
        symbol = single[0][0].symbol
        self._bound[symbol] = other
        for part in self.parts(other):
            self._ties.setdefault(self.root(part.symbol), []).extend([*self._ties.get(symbol, []), operator])
        return True

    def _refine(self, a: Label, b: Label, operator: str) -> bool:
        """Cut one unknown where the structures of ``a`` and ``b`` first differ; False if that cannot be done."""
        for left, right in zip(a, b, strict=False):
            n, m = length((left,)), length((right,))
            if n != m:
                return self._divide(left if n > m else right, min(n, m))
            for p, q in zip(reversed(left), reversed(right), strict=False):
                if p.size != q.size:
                    large, small = (p, q) if p.size > q.size else (q, p)
                    if large.size % small.size:
                        return False
                    self.split(large, (large.size // small.size, small.size))
                    return True
        return False

    @staticmethod
    def _shape(label: Label) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(part.size for part in product) for product in label)

    def _union(self, a: int, b: int, operator: str) -> None:
        a, b = self.root(a), self.root(b)
        if a != b:
            first, second = min(a, b), max(a, b)
            self._parent[second] = first
            self._ties.setdefault(first, []).extend(self._ties.pop(second, []))
            if second in self._reason:
                self._reason.setdefault(first, self._reason[second])
        self._ties.setdefault(self.root(a), []).append(operator)
