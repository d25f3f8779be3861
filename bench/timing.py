"""Times several ways to do one thing in turns, in one process, so that all run in the same conditions."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any, NamedTuple, Protocol

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
    before = before or {}
    calls, rounds = _rounds(
        names, lambda name, calls: (_sample(providers[name], before.get(name), calls, clock),), seconds, clock
    )
    timings = {}
    for name in names:
        samples = [taken[name][0] for taken in rounds]
        low, *_, high = quantiles(samples, n=5, method="inclusive")
        ratio = median(taken[name][0] / taken[baseline][0] for taken in rounds)
        timings[name] = Timing(median(samples), low, high, ratio, len(rounds), calls)
    return timings


class Phases(NamedTuple):
    """What providers took, phase by phase.

    Attributes:
        rounds: by provider, seconds per call of each phase.
        calls: per sample.
    """

    rounds: list[dict[str, tuple[float, ...]]]
    calls: int


def compare_phases(
    providers: Mapping[str, Sequence[Callable[[], object]]],
    seconds: float,
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Phases:
    """Time providers in turns, as :func:`compare` does, each being several calls that are timed one by one.

    Args:
        providers: what to call, phase after phase.
        seconds: how long to measure.
        clock: gives nanoseconds.
    """

    def sample(name: str, calls: int) -> tuple[float, ...]:
        phases = providers[name]
        taken = [0] * len(phases)
        for _ in range(calls):
            for i, call in enumerate(phases):
                started = clock()
                call()
                taken[i] += clock() - started
        return tuple(taken)

    calls, rounds = _rounds(list(providers), sample, seconds, clock)
    return Phases(rounds, calls)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median of the samples' distribution: two of the samples, by their ranks.

    Nothing is assumed of the distribution, only that samples are independent. Fewer than six cannot give 95 %.
    """
    ranked = sorted(samples)
    n, k = len(ranked), 1
    ways = sides = 1  # in which none is above the median; in which fewer than k are, all of them 2**n
    while 40 * (sides + (ways := ways * (n - k + 1) // k)) <= 2**n:
        sides += ways
        k += 1
    return ranked[k - 1], ranked[-k]


def _rounds(
    names: Sequence[str], sample: Callable[[str, int], tuple[float, ...]], seconds: float, clock: Callable[[], int]
) -> tuple[int, list[dict[str, tuple[float, ...]]]]:
    """Calls per sample, and seconds per call in each round; ``sample`` gives nanoseconds of so many calls."""
    turns = itertools.cycle(orders(len(names)))

    def one_round(calls: int) -> dict[str, tuple[float, ...]]:
        return {names[i]: sample(names[i], calls) for i in next(turns)}

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would count as time of the provider that is running
    try:
        for _ in range(WARMUP_ROUNDS):
            one_round(1)
        calls = 1
        while min(map(sum, one_round(calls).values())) < MIN_SAMPLE:
            calls *= 2
        rounds: list[dict[str, tuple[float, ...]]] = []
        started = clock()
        while len(rounds) < MIN_ROUNDS or clock() - started < seconds * 1e9:
            taken = one_round(calls)
            rounds.append({name: tuple(t * 1e-9 / calls for t in phases) for name, phases in taken.items()})
    finally:
        if collecting:
            gc.enable()
    return calls, rounds


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


# Devices that work through a queue: what a call takes there, and what it takes its caller

DEVICE_SAMPLE = 10_000_000  # ns; events have a resolution of half a microsecond, and clocks change over milliseconds
MAX_CALLS = 4096  # per sample
AHEAD_CALLS = 8  # of at most about a hundred kernels each: a queue of about a thousand takes no more
LONGEST_HOLD = 0.2  # seconds


class Event(Protocol):
    """What :class:`torch.cuda.Event` offers of a point in a device's queue."""

    def record(self) -> object:
        """Put it into the queue."""

    def synchronize(self) -> object:
        """Wait until the device has reached it."""

    def query(self) -> bool:
        """Whether the device has reached it."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds to another event of this class."""


class HostEvent:
    """The event of a device without a queue, where calls return when they are done: the time at which it was recorded.

    Args:
        clock: gives nanoseconds.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock = clock
        self._time = 0

    def record(self) -> None:
        """Note the time."""
        self._time = self._clock()

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def query(self) -> bool:
        """Always."""
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds."""
        return (end._time - self._time) * 1e-6


class Stopwatch:
    """Takes the time of calls that put work into a device's queue.

    Args:
        new_event: makes events; with timing, where that has to be asked for.
        hold: keeps the device busy for so many seconds; ``None``: it has no queue to hold up.
        clock: of the host, in nanoseconds.
    """

    def __init__(
        self,
        new_event: Callable[[], Event],
        hold: Callable[[float], object] | None = None,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._start, self._end = new_event(), new_event()
        self._hold = hold
        self._clock = clock

    def steps(self, call: Callable[[], object], calls: int) -> float:
        """Nanoseconds of so many calls, one after the other, from device event to device event.

        One more comes before: while the device works on that, the host gets ahead, as it does in a training loop.
        Where the host is the slower one, this is its time.
        """
        call()
        self._start.record()
        for _ in range(calls):
            call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e6

    def device(self, call: Callable[[], object], calls: int, host: float) -> float | None:
        """Nanoseconds per call of the device alone: all calls are in its queue before it begins with the first.

        Args:
            call: what to time.
            calls: at most so many.
            host: nanoseconds that a call takes the host, about.

        Returns:
            ``None`` where the device has no queue, or the calls cannot be put there in advance: they wait for it.
        """
        if self._hold is None:
            return None
        call()
        hold = 2e-4 + 2e-9 * host * calls
        while hold < LONGEST_HOLD:
            self._hold(hold)
            self._start.record()
            for _ in range(calls):
                call()
            late = self._start.query()
            self._end.record()
            self._end.synchronize()
            if not late:
                return self._start.elapsed_time(self._end) * 1e6 / calls
            hold, calls = 4 * hold, max(1, calls // 2)
        return None

    def host(self, call: Callable[[], object]) -> int:
        """Nanoseconds until a call returns that finds the queue empty."""
        self._end.record()
        self._end.synchronize()
        started = self._clock()
        call()
        return self._clock() - started


class DeviceTiming(NamedTuple):
    """What one provider took on a device.

    Attributes:
        step: of calls one after the other, whichever of device and host is the slower.
        device: seconds per call on the device alone; ``None`` where it has no queue or calls wait for it.
        host: seconds until a call returns, the queue being empty; ``host_low`` and ``host_high`` are the 20th and 80th
            percentile.
    """

    step: Timing
    device: float | None
    host: float
    host_low: float
    host_high: float


def compare_on_device(
    providers: Mapping[str, Callable[[], object]],
    baseline: str,
    seconds: float,
    stopwatch: Stopwatch,
    *,
    during: Callable[[str], Any] | None = None,
    min_sample: int = DEVICE_SAMPLE,
    min_rounds: int = MIN_ROUNDS,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, DeviceTiming]:
    """Time providers in turns, as :func:`compare` does, by device events.

    Args:
        providers: what to call.
        baseline: the provider that ratios refer to.
        seconds: how long to measure whole steps; a round that was begun is ended, and there are at least
            ``min_rounds``. Host and device alone take at most half as long again, with at least ``min_rounds`` each.
        stopwatch: takes the samples.
        during: by name, a context manager around each sample.
        min_sample: nanoseconds; each provider is called as often per sample as this takes.
        min_rounds: two at least.
        clock: gives nanoseconds, to know when ``seconds`` are over.
    """
    names = list(providers)
    turns = itertools.cycle(orders(len(names)))
    around = during or _nothing

    def one_round(sample: Callable[[str], float | None]) -> dict[str, float | None]:
        taken = {}
        for i in next(turns):
            with around(names[i]):
                taken[names[i]] = sample(names[i])
        return taken

    def rounds_of(sample: Callable[[str], float | None], duration: float) -> list[dict[str, float | None]]:
        rounds: list[dict[str, float | None]] = []
        started = clock()
        while len(rounds) < min_rounds or clock() - started < duration * 1e9:
            rounds.append(one_round(sample))
        return rounds

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(WARMUP_ROUNDS):
            one_round(lambda name: stopwatch.steps(providers[name], 1))
        calls = {}
        for name in names:
            with around(name):
                calls[name] = _calls_that_take(min_sample, providers[name], stopwatch)
        steps = rounds_of(lambda name: stopwatch.steps(providers[name], calls[name]) / calls[name], seconds)
        hosts = rounds_of(lambda name: stopwatch.host(providers[name]), seconds / 4)
        host = {name: quantiles(_known(hosts, name), n=5, method="inclusive") for name in names}
        middle = {name: median(_known(hosts, name)) for name in names}
        # The device is known to be the slower one where the host takes half as long; then a step is its time.
        bound = {name for name in names if middle[name] < 0.5 * median(_known(steps, name))}
        devices = []
        if bound != set(names):
            devices = rounds_of(
                lambda name: None if name in bound else stopwatch.device(providers[name], AHEAD_CALLS, middle[name]),
                seconds / 4,
            )
    finally:
        if collecting:
            gc.enable()
    timings = {}
    for name in names:
        samples = _known(steps, name)
        low, *_, high = quantiles(samples, n=5, method="inclusive")
        ratio = median(a / b for a, b in zip(samples, _known(steps, baseline), strict=True))
        step = Timing(median(samples) * 1e-9, low * 1e-9, high * 1e-9, ratio, len(samples), calls[name])
        alone = samples if name in bound else _known(devices, name)
        timings[name] = DeviceTiming(
            step,
            median(alone) * 1e-9 if alone else None,
            middle[name] * 1e-9,
            host[name][0] * 1e-9,
            host[name][-1] * 1e-9,
        )
    return timings


def _known(rounds: list[dict[str, float | None]], name: str) -> list[float]:
    return [value for taken in rounds if (value := taken[name]) is not None]


def _calls_that_take(duration: int, call: Callable[[], object], stopwatch: Stopwatch) -> int:
    calls = 1
    while calls < MAX_CALLS and stopwatch.steps(call, calls) < duration:
        calls *= 2
    return calls


@contextmanager
def _nothing(_: str) -> Iterator[None]:
    yield
