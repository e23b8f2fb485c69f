"""Merging that needs to see no one's model: alignment to a public anchor and to sums, and sums under masks.

What this hides, from whom, and what it does not, is on the page on threat models.
"""

from fedmerge.secure._alignment import masked_sum, merge_by_sums, objective, to_anchor, to_others
from fedmerge.secure._fixed import Total, Words, decode, encode, size
from fedmerge.secure._masks import Party, check_threshold, unmask
from fedmerge.secure._terms import KEYS, PARTIES, SHARES, WORDS, Terms

__all__ = [
    "KEYS",
    "PARTIES",
    "SHARES",
    "WORDS",
    "Party",
    "Terms",
    "Total",
    "Words",
    "check_threshold",
    "decode",
    "encode",
    "masked_sum",
    "merge_by_sums",
    "objective",
    "size",
    "to_anchor",
    "to_others",
    "unmask",
]
