"""Times what the record has no row of yet, in the order of the plan, until the time is over.

    python -m bench.gpu.rows RECORD --device cuda --seconds 200

Before each thing that may hang it prints ``at TITLE: PROVIDER``: who started it can end it, add the row that failed and
start it again, and it goes on with the next.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.backward import Training, check_losses
from bench.gpu import record
from bench.gpu.processes import message
from bench.gpu.providers import BASELINE, MINIATURE, SGD_FUSED, TASKS, Group, UnavailableError, Workload

from bench.gpu.providers import launches, plan, ready, rotation  # isort: skip
from bench.gpu.record import Row
from bench.shapes import GPU_MODELS, elements, miniature
from bench.timing import DEVICE_SAMPLE, MIN_ROUNDS, DeviceTiming, HostEvent, Stopwatch, compare_on_device
from sofim_fused import SOFIM, backends

LOST = 75  # exit status: the device answers no more
LEAST = 4.0  # seconds; with less left, nothing is begun
ALIKE = 1e-3  # of first losses: convolutions may add up in another order


class Rows:
    """Measures rows on one device and writes them down.

    Args:
        path: of the record.
        device: which.
        seconds: to time the steps of a group.
        scale: on a CPU, the largest dimension of a parameter.
    """

    def __init__(self, path: Path, device: torch.device, seconds: float, scale: int = 8) -> None:
        self.path, self.device, self.seconds, self.scale = path, device, seconds, scale
        self.gpu = device.type == "cuda"
        self.cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size) if self.gpu else 0
        self._sampled = BASELINE  # whose turn it is

    def run(self, left: Callable[[], float], chosen: re.Pattern[str]) -> None:
        """Go through the plan.

        Args:
            left: gives the seconds that are left.
            chosen: found in "TITLE: PROVIDER" of what is to be timed.
        """
        known = record.Record(self.path)
        if len(known.runs) not in known.copies:
            self.copy()
        for group in plan(self.backends()):
            wanted = [
                provider
                for provider in group.providers
                if (group.title, provider.name) not in known.rows and chosen.search(f"{group.title}: {provider.name}")
            ]
            if wanted and left() > LEAST:
                for row in self.rows(group._replace(providers=wanted)):
                    if (key := (row["title"], row["provider"])) not in known.rows:  # the baseline's may be
                        known.rows[key] = row
                        self.write(row)
                gc.collect()  # what was timed may hang together in circles, and holds memory
                self.synchronize()
            else:
                for provider in wanted:
                    print(f"not reached {group.title}: {provider.name}", flush=True)

    def write(self, row: Row) -> None:
        """Write a row down."""
        record.add(self.path, "row", **row)
        figures = f"{row['median'] * 1e6:.1f} µs, {row['ratio']:.3f}" if "median" in row else row["reason"]
        print(f"{row['title']}: {row['provider']}: {row['status']}: {figures}", flush=True)

    def at(self, title: str, provider: str) -> None:
        """Say what is being done."""
        print(f"at {title}: {provider}", flush=True)

    def synchronize(self, row: Row | None = None) -> None:
        """Wait for the device; if it is lost, write the row that it was lost at and end the process."""
        if self.gpu:
            try:
                torch.cuda.synchronize()
            except Exception as error:
                print(f"the device is lost: {error}", file=sys.stderr, flush=True)
                if row is not None:
                    self.write(row)
                os._exit(LOST)

    def backends(self) -> list[str]:
        """The backends that can run here; the record gets a line for each backend."""
        found = []
        for name in (name for name in backends.names() if name != "auto"):
            self.at("backend", name)
            try:
                SOFIM([torch.nn.Parameter(torch.zeros(1, device=self.device))], backend=name)
                found.append(name)
                state = "runs"
            except RuntimeError as error:
                state = str(error)
            record.add(self.path, "backend", name=name, state=state)
        return found

    def copy(self) -> None:
        """The rate of ``Tensor.copy_``, read and written, on a GPU from 1 GiB to 1 GiB; and the speed of Python."""
        self.at("backend", "Tensor.copy_")
        source = torch.ones((1 << 28) if self.gpu else 1 << 20, device=self.device)
        target = torch.zeros_like(source)
        taken = self._compare({BASELINE: lambda: target.copy_(source)}, min(1.0, self.seconds))[BASELINE]
        record.add(self.path, "copy", gb_per_s=2 * source.nbytes / taken.step.median / 1e9)
        record.add(self.path, "python", name="loop", ms=python_ms())

    def rows(self, group: Group) -> list[Row]:
        """Rows of a group, the baseline's first; those of providers that raise say what."""
        providers = {provider.name: provider for provider in (SGD_FUSED, *group.providers)}
        rows = {name: Row(title=group.title, provider=name, ours=p.ours) for name, p in providers.items()}
        self._sampled = BASELINE
        self.at(group.title, BASELINE)
        calls: dict[str, Callable[[], object]] = {}
        try:
            new, more = self._trainings(group) if group.model in TASKS else self._workload(group)
        except Exception as error:  # too little memory, or losses that differ: none of them can be timed
            return [{**row, **self._why(error, row)} for row in rows.values()]
        for name, provider in providers.items():
            self.at(group.title, name)
            try:
                calls[name] = new(provider)
                if self.gpu:
                    torch.cuda.synchronize()
            except Exception as error:
                rows[name].update(self._why(error, rows[name]))

        @contextlib.contextmanager
        def during(name: str) -> Iterator[None]:
            if name != self._sampled:
                self.at(group.title, name)
            self._sampled = name
            with launches(providers[name]):
                yield

        taken: dict[str, DeviceTiming] = {}
        while BASELINE in calls and not taken:
            try:
                taken = self._compare(calls, self.seconds, during)
            except Exception as error:  # without the one that raised it, the others can still be timed
                rows[self._sampled].update(self._why(error, rows[self._sampled]))
                del calls[self._sampled]
        for name, timing in taken.items():
            base = taken[BASELINE].device
            ratio = timing.device / base if timing.device and base else None
            rows[name].update(status="measured", **timing.step._asdict(), host=timing.host, **more)
            rows[name].update(device=timing.device, device_ratio=ratio)
            if (moved := providers[name].bytes_moved(getattr(torch, group.dtype))) and "elements" in more:
                rate = moved * more["elements"] / (timing.device or timing.step.median) / 1e9
                rows[name].update(bytes_per_parameter=moved, gb_per_s=rate)
        untimed = {"status": "failed", "reason": "the baseline could not be timed"}
        return [row if "status" in row else {**row, **untimed} for row in rows.values()]

    def _workload(self, group: Group) -> tuple[Callable[[Any], Callable[[], object]], Row]:
        shapes, dtype = GPU_MODELS[group.model](), getattr(torch, group.dtype)
        if not self.gpu:
            shapes = miniature(shapes, self.scale, 4)
        set_bytes = 3 * dtype.itemsize * elements(shapes)  # with a moment of the least size
        free = torch.cuda.mem_get_info(self.device)[0] if self.gpu else 1 << 30
        cache_bytes = self.cache_bytes if self.gpu else set_bytes // 2  # miniature models are rotated as well
        sets = 1 if group.cached else rotation(set_bytes, cache_bytes, free // 8)
        work = Workload(shapes, dtype, self.device, sets)
        return lambda provider: ready(provider, work), {"elements": work.elements, "sets": sets}

    def _trainings(self, group: Group) -> tuple[Callable[[Any], Callable[[], object]], Row]:
        """Whole training steps, each on a copy of one network; their first losses have to agree."""
        torch.manual_seed(0)
        task = TASKS[group.model] if self.gpu else MINIATURE
        network = task.network().to(self.device)
        given, wanted = (part.to(self.device) for part in task.batch())
        if given.dim() == 4:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            given = given.to(memory_format=torch.channels_last)
        losses: dict[str, float] = {}

        def new(provider: Any) -> Callable[[], object]:
            training = Training(copy.deepcopy(network), provider.new, [(given, wanted)])
            losses[provider.name] = float(training.step())
            check_losses({BASELINE: losses[BASELINE], provider.name: losses[provider.name]}, ALIKE)
            return training.step

        return new, {}

    def _why(self, error: Exception, row: Row) -> Row:
        excused = isinstance(error, UnavailableError | torch.OutOfMemoryError)
        why = {"status": "unavailable" if excused else "failed", "reason": message(error)}
        self.synchronize({**row, **why})
        return why

    def _compare(
        self, calls: Mapping[str, Callable[[], object]], seconds: float, during: Any = None
    ) -> dict[str, DeviceTiming]:
        stopwatch = Stopwatch(_event, _hold) if self.gpu else Stopwatch(HostEvent)
        sample, rounds = (DEVICE_SAMPLE, MIN_ROUNDS) if self.gpu else (DEVICE_SAMPLE // 10, 3)
        return compare_on_device(
            calls, BASELINE, seconds, stopwatch, during=during, min_sample=sample, min_rounds=rounds
        )


def python_ms() -> float:
    """Milliseconds of a loop in Python that calls nothing: tells whether this process runs as fast as another."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        total = 0
        for i in range(200_000):
            total += i
        times.append((time.perf_counter() - began) * 1e3)
    return min(times)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def _hold(seconds: float) -> None:
    """Keep the device busy for about so long, or longer: cycles of a clock that is not faster than 2 GHz."""
    torch.cuda._sleep(int(2e9 * seconds))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.rows", description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=200.0, help="for all (default: %(default)g)")
    parser.add_argument("--each", type=float, default=2.0, help="seconds for a group (default: %(default)g)")
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), metavar="PATTERN")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    Rows(options.record, device, options.each).run(lambda: end - time.monotonic(), options.rows)


if __name__ == "__main__":
    main()
