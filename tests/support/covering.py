"""Selects some cases of a test that has many, so that any few values of its arguments still occur together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heapreplace
from itertools import combinations


def chosen(cases: Sequence[Sequence[Hashable]], strength: int) -> list[int]:
    """The indices of some cases. Any values of ``strength`` columns that occur together in a case do so in these.

    Always chooses next the case that adds the most combinations, or the first of several: the same cases give the same
    choice.
    """
    meetings = [
        {(columns, tuple(case[column] for column in columns)) for columns in combinations(range(len(case)), strength)}
        for case in cases
    ]
    missing = set().union(*meetings)
    places = []
    # What a case adds can only become less: the first case whose number is still right adds the most.
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
