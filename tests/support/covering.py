"""A choice of a test's cases in which any few values still meet, for where each case is dear."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations


def chosen(cases: Sequence[Sequence[Hashable]], strength: int) -> list[int]:
    """The places of some cases in which all values of ``strength`` columns meet that meet in any case.

    The same cases give the same choice: each time the one that has most to add, the first of several.
    """
    meetings = [
        {(columns, tuple(case[column] for column in columns)) for columns in combinations(range(len(case)), strength)}
        for case in cases
    ]
    missing = set().union(*meetings)
    places = []
    while missing:
        best = max(range(len(cases)), key=lambda place: len(meetings[place] & missing))
        places.append(best)
        missing -= meetings[best]
    return sorted(places)
