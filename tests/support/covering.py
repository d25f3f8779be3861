"""A selection of a test's cases in which any few values still meet, for tests with many cases."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heapreplace
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
    # What a case has to add only shrinks: the first whose number is still right has the most.
    queue = [(-len(found), place) for place, found in enumerate(meetings)]
    heapify(queue)
    while missing:
        known, place = queue[0]
        adds = len(meetings[place] & missing)
        if adds < -known:
            heapreplace(queue, (-adds, place))
            continue
        heappop(queue)
        places.append(place)
        missing -= meetings[place]
    return sorted(places)
