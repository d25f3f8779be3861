"""Times of what runs on a device with a queue, and the models that only a GPU's run has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from bench.shapes import GPU_MODELS, MODELS, elements, miniature
from bench.timing import HostEvent, Stopwatch, compare_on_device

US = 1000  # ns


# Shapes


@pytest.mark.parametrize(("model", "tensors", "size"), [("vit-b", 152, 86_567_656), ("lm-1b", 244, 1_114_290_176)])
def test_models_have_their_known_sizes(model: str, tensors: int, size: int) -> None:
    shapes = GPU_MODELS[model]()
    assert (len(shapes), elements(shapes)) == (tensors, size)
    assert model not in MODELS  # they would take the CPU's benchmarks minutes


def test_miniatures_are_small_and_varied() -> None:
    small = miniature(GPU_MODELS["gpt2-small"](), 4, 5)
    assert len(small) <= 5
    assert len(set(small)) > 1
    assert max(max(shape) for shape in small) == 4
    assert miniature([(7, 2), (3,)], 4, 5) == [(4, 2), (3,)]


# Timing


class Queue:
    """A device that works through a queue: calls take the host some time, and the device some time later."""

    def __init__(self) -> None:
        self.now = 0
        self.busy_until = 0

    def clock(self) -> int:
        return self.now

    def put(self, nanoseconds: int) -> None:
        self.busy_until = max(self.busy_until, self.now) + nanoseconds

    def call(self, host: int, device: int, waits: bool = False) -> Callable[[], None]:
        def taken() -> None:
            if waits:
                self.now = max(self.now, self.busy_until)
            self.now += host
            self.put(device)

        return taken

    def event(self) -> QueueEvent:
        return QueueEvent(self)

    def stopwatch(self, hold: bool = True) -> Stopwatch:
        return Stopwatch(self.event, (lambda s: self.put(round(s * 1e9))) if hold else None, self.clock)


class QueueEvent:
    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.time = 0

    def record(self) -> None:
        self.time = max(self.queue.now, self.queue.busy_until)

    def synchronize(self) -> None:
        self.queue.now = max(self.queue.now, self.time)

    def query(self) -> bool:
        return self.queue.now >= self.time

    def elapsed_time(self, end: QueueEvent) -> float:
        return (end.time - self.time) / 1e6


@pytest.mark.parametrize(("host", "device"), [(30 * US, 4 * US), (5 * US, 50 * US)])
def test_steps_take_what_the_slower_side_takes(host: int, device: int) -> None:
    queue = Queue()
    watch = queue.stopwatch()
    call = queue.call(host, device)
    assert watch.steps(call, 20) == pytest.approx(20 * max(host, device), rel=0.05)
    assert watch.device(call, 8, host) == pytest.approx(device)
    assert watch.host(call) == host


def test_samples_begin_with_a_device_at_work_and_host_times_with_an_idle_one() -> None:
    queue = Queue()
    watch = queue.stopwatch()
    assert watch.steps(queue.call(5 * US, 50 * US), 1) == pytest.approx(50 * US)  # not 55
    queue.put(100 * US)
    assert watch.host(queue.call(5 * US, 50 * US, waits=True)) == 5 * US


def test_the_device_alone_is_timed_however_slow_the_host() -> None:
    queue = Queue()
    call = queue.call(3000 * US, 4 * US)
    assert queue.stopwatch().device(call, 8, host=1 * US) == pytest.approx(4 * US)


def test_calls_that_wait_for_the_device_have_no_time_of_their_own() -> None:
    queue = Queue()
    assert queue.stopwatch().device(queue.call(5 * US, 50 * US, waits=True), 8, 5 * US) is None
    assert queue.stopwatch(hold=False).device(queue.call(5 * US, 50 * US), 8, 5 * US) is None


def test_providers_are_compared_by_device_events() -> None:
    queue = Queue()
    around: list[str] = []

    @contextlib.contextmanager
    def during(name: str) -> Iterator[None]:
        around.append(name)
        yield

    calls = {"a": queue.call(30 * US, 10 * US), "b": queue.call(5 * US, 60 * US), "c": queue.call(20 * US, 20 * US)}
    taken = compare_on_device(
        calls, "a", 0.2, queue.stopwatch(), during=during, min_sample=1_000_000, clock=queue.clock
    )
    assert [taken[name].step.median for name in "abc"] == pytest.approx([30e-6, 60e-6, 20e-6], rel=0.03)
    assert [taken[name].step.ratio for name in "abc"] == pytest.approx([1, 2, 2 / 3], rel=0.05)
    assert [taken[name].device for name in "abc"] == pytest.approx([10e-6, 60e-6, 20e-6], rel=0.03)
    assert [taken[name].host for name in "abc"] == pytest.approx([30e-6, 5e-6, 20e-6])
    assert [taken[name].step.calls for name in "abc"] == [64, 32, 64]  # as many as take 1 ms
    assert taken["a"].step.rounds > 5
    assert len({around.count(name) for name in "abc"}) == 1


def test_events_of_a_device_without_queue_are_times() -> None:
    now = 5
    start, end = HostEvent(lambda: now), HostEvent(lambda: now)
    start.record()
    now += 3_000_000
    end.record()
    assert start.elapsed_time(end) == pytest.approx(3.0)
