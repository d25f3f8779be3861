"""Timing of several ways to do one thing: in turns, within one process, so that all meet the same machine."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import NamedTuple

import torch

WARMUP_ROUNDS = 2
MIN_ROUNDS = 5
MIN_SAMPLE = 1_000_000  # ns; below, the clock and the loop around a call count


class Timing(NamedTuple):
    """What one provider took.

    Attributes:
        median: seconds per call; ``low`` and ``high`` are the 20th and 80th percentile.
        ratio: to the baseline: the median of the rounds' ratios, whatever the machine's speed was in each.
        rounds: samples taken.
        calls: per sample.
    """

    median: float
    low: float
    high: float
    ratio: float
    rounds: int
    calls: int


def compare(
    providers: Mapping[str, Callable[[], object]],
    baseline: str,
    seconds: float,
    *,
    before: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Time providers in turns: in each round every provider once, in an order that changes from round to round.

    Args:
        providers: what to call.
        baseline: the provider that ratios refer to.
        seconds: how long to measure; a round that was begun is ended, and there are at least ``MIN_ROUNDS``.
        before: by provider, what to do before each call, outside of the timed part.
        clock: gives nanoseconds.

    A sample is a number of calls, the same for all providers, that takes even the fastest ``MIN_SAMPLE``.
    """
    names = list(providers)
    turns = itertools.cycle(orders(len(names)))
    before = before or {}

    def one_round(calls: int) -> dict[str, float]:
        """Nanoseconds per sample."""
        return {names[i]: _sample(providers[names[i]], before.get(names[i]), calls, clock) for i in next(turns)}

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would be charged to whoever happens to be running
    try:
        for _ in range(WARMUP_ROUNDS):
            one_round(1)
        calls = 1
        while min(one_round(calls).values()) < MIN_SAMPLE:
            calls *= 2
        rounds: list[dict[str, float]] = []
        started = clock()
        while len(rounds) < MIN_ROUNDS or clock() - started < seconds * 1e9:
            rounds.append(one_round(calls))
    finally:
        if collecting:
            gc.enable()
    timings = {}
    for name in names:
        samples = [taken[name] * 1e-9 / calls for taken in rounds]
        low, *_, high = quantiles(samples, n=5, method="inclusive")
        ratio = median(taken[name] / taken[baseline] for taken in rounds)
        timings[name] = Timing(median(samples), low, high, ratio, len(rounds), calls)
    return timings


def _sample(
    call: Callable[[], object], prepare: Callable[[], object] | None, calls: int, clock: Callable[[], int]
) -> float:
    if prepare is None:
        started = clock()
        for _ in range(calls):
            call()
        return clock() - started
    taken = 0
    for _ in range(calls):
        prepare()
        started = clock()
        call()
        taken += clock() - started
    return taken


def orders(n: int) -> list[list[int]]:
    """Orders of n things in which each follows each other equally often (Williams' design for carryover effects).

    Source: E. J. Williams, "Experimental Designs Balanced for the Estimation of Residual Effects of Treatments",
    Australian Journal of Scientific Research A 2(2), 1949.
    """
    zigzag = [(k + 1) // 2 if k % 2 else -(k // 2) for k in range(n)]
    rows = [[(first + offset) % n for offset in zigzag] for first in range(n)]
    return rows + [row[::-1] for row in rows]


def copy_bandwidth(working_set: int, seconds: float) -> float:
    """GB/s, read and written, of ``torch.Tensor.copy_`` between two float32 tensors of ``working_set`` bytes together.

    What a store reads from memory before it writes there is not counted, as it is not for a step.
    """
    source = torch.ones(max(working_set // 8, 1))
    target = torch.zeros_like(source)
    timing = compare({"copy": lambda: target.copy_(source)}, "copy", seconds)["copy"]
    return 2 * source.nbytes / timing.median / 1e9
