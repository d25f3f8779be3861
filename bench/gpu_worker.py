"""The part of bench.gpu that touches the device, in a process of its own: it may hang or die without harm to the rest.

Jobs come as lines of JSON on standard input. Answers go as lines of JSON to a pipe, a row each, and "done" after the
last. What is being done, and how long that may take, stands in a file at any moment: who started the process can see
there at what it hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from bench import gpu_smoke
from bench.backward import check_losses
from bench.gpu_device import message
from bench.gpu_providers import (
    BASELINE,
    COMPILING,
    Provider,
    Ready,
    UnavailableError,
    Workload,
    compiled_providers,
    providers,
    ready,
    rotation,
)
from bench.gpu_report import PENDING, Row, Section
from bench.gpu_training import ALIKE, MINIATURE, TASKS, trainings
from bench.shapes import GPU_MODELS, Shape, elements, miniature
from bench.timing import DEVICE_SAMPLE, MIN_ROUNDS, DeviceTiming, Event, HostEvent, Stopwatch, compare_on_device
from sofim_fused import SOFIM, backends

LOST = 75  # exit status: the device answers no more
PATIENCE = 60.0  # seconds that one thing may take, compiling a kernel included
HOST_MEMORY = 1 << 30


class Worker:
    """Does jobs on one device.

    Args:
        device: which.
        scale: on a CPU, the largest dimension of a parameter, and the number of parameters up to four.
        answer: takes rows.
        doing: takes what is being done, and the seconds that it may take.
    """

    def __init__(
        self,
        device: torch.device,
        scale: int,
        answer: Callable[[Row], None],
        doing: Callable[[str, float], None],
    ) -> None:
        self.device = device
        self.scale = scale
        self.answer = answer
        self.doing = doing
        self.copy_gb_per_s: float | None = None
        self.gpu = device.type == "cuda"
        self.cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size) if self.gpu else 0
        self._sampled = BASELINE  # whose turn it is
        self._exact = functools.cache(self._take_exactly)
        self._reference = functools.cache(self._take_by_reference)

    def do(self, job: Row) -> None:
        """Do one job."""
        kinds = {
            "backends": self.backends,
            "copy": self.copy,
            "smoke": self.smoke,
            "timing": self.timing,
            "training": self.training,
        }
        kinds[job["kind"]](job)

    def synchronize(self) -> None:
        """Wait for the device; if it is lost, end the process."""
        if self.gpu:
            try:
                torch.cuda.synchronize()
            except Exception as error:
                print(f"the device is lost: {error}", file=sys.stderr, flush=True)
                os._exit(LOST)

    # Jobs

    def backends(self, job: Row) -> None:
        """Which backends run here: "ok", or the reason why not."""
        param = torch.nn.Parameter(torch.zeros(1, device=self.device))
        names = [name for name in backends.names() if name != "auto"]
        for name in names:
            self.doing(name, PATIENCE)
            try:
                SOFIM([param], backend=name)
                state = "ok"
            except RuntimeError as error:
                state = str(error)
            self.answer({"backend": name, "state": state})

    def copy(self, job: Row) -> None:
        """The rate of ``Tensor.copy_``, read and written, on a GPU from 1 GiB to 1 GiB."""
        self.doing("copy bandwidth", PATIENCE)
        size = min(1 << 30, self._free() // 4) if self.gpu else 1 << 24
        source = torch.ones(size // 4, device=self.device)
        target = torch.zeros_like(source)
        seconds = min(1.0, job["seconds"] / 4)
        taken = compare_on_device({"copy": lambda: target.copy_(source)}, "copy", seconds, self._stopwatch())["copy"]
        self.answer({"gb_per_s": 2 * source.nbytes / taken.step.median / 1e9, "bytes": source.nbytes})

    def smoke(self, job: Row) -> None:
        """A few steps of each kind."""
        for case in gpu_smoke.CASES:
            name = f"{job['backend']}: {case.name}"
            row: Row = {"backend": job["backend"], "case": case.name, "status": PENDING, "reason": ""}
            if name in job["exclude"] or (case.one_launch is not None and job["backend"] == "reference"):
                continue
            if time.time() < job["deadline"]:
                self.doing(name, PATIENCE)
                row.update(self._judged(case, job["backend"]))
            self.answer(row)
            self.synchronize()

    def timing(self, job: Row) -> None:
        """One section."""
        section = Section(**job["section"])
        shapes = GPU_MODELS[section.model]()
        if not self.gpu:
            shapes = miniature(shapes, self.scale, min(self.scale, 4))
        dtype: torch.dtype = getattr(torch, section.dtype)
        wanted = compiled_providers() if section.compiled else providers(job["backends"], dtype, section.model)
        small = elements(shapes)
        wanted = [p for p in wanted if small <= p.largest and f"{section.title}: {p.name}" not in job["exclude"]]
        only, known = job.get("only") or [p.name for p in wanted], job.get("known", ())
        new = [p for p in wanted if p.name == BASELINE or (p.name in only and p.name not in known)]
        if len(wanted) > 1 and [p.name for p in new] == [BASELINE]:
            return  # it is timed beside others alone
        wanted = new
        set_bytes = small * (2 * dtype.itemsize + min(p.moment_size(dtype) for p in wanted))
        available = self._free() * 8 // 10 if self.gpu else HOST_MEMORY
        if section.cached:
            sets = 1
            if set_bytes > self.cache_bytes and self.gpu and not section.compiled:
                self.answer({"note": f"{section.title}: {set_bytes / 2**20:.0f} MiB do not fit into the L2 cache"})
                return
        else:
            cache_bytes = self.cache_bytes if self.gpu else set_bytes // 2  # miniature models are rotated as well
            sets = rotation(set_bytes, cache_bytes, available // 4)
        self.doing(f"{section.title}: tensors", PATIENCE)
        work = Workload(shapes, dtype, self.device, sets)
        self.synchronize()
        available -= sets * small * 2 * dtype.itemsize
        groups = chunks(wanted, [sets * small * p.own_size(dtype) for p in wanted], available)
        for index, group in enumerate(groups):
            rows = self._compared(section, work, group, job, len(groups) - index)
            for row in rows:
                if index == 0 or row["provider"] != BASELINE:
                    self.answer(row)

    def training(self, job: Row) -> None:
        """Whole training steps of one network."""
        name = job["model"]
        native = [backend for backend in job["backends"] if backend != "reference"]
        self.doing(f"training: {name}", 2 * PATIENCE)
        made = trainings(TASKS[name] if self.gpu else MINIATURE, self.device, native)
        losses = {provider: float(training.step()) for provider, training in made.items()}
        check_losses(losses, ALIKE)
        self.synchronize()
        left = max(0.0, job["deadline"] - time.time())
        taken = compare_on_device(
            {provider: training.step for provider, training in made.items()},
            BASELINE,
            min(job["seconds"], 0.5 * left),
            self._stopwatch(),
            min_sample=DEVICE_SAMPLE if self.gpu else DEVICE_SAMPLE // 10,
            min_rounds=MIN_ROUNDS if self.gpu else 3,
        )
        for provider, timing in taken.items():
            row = {"model": name, "provider": provider, **timing.step._asdict(), "device": timing.device}
            self.answer({**row, "host": timing.host, "loss": losses[provider]})

    # Smoke

    def _judged(self, case: gpu_smoke.Case, backend: str) -> Row:
        try:
            outcome = gpu_smoke.take(case, backend, self.device, self._smoke_shapes(case))
            verdict = gpu_smoke.judge(case, outcome, self._reference(case.name), self._exact(case.name))
        except UnavailableError as error:
            return {"status": "unavailable", "reason": str(error)}
        except Exception as error:
            return {"status": "failed", "reason": message(error)}
        numbers = {"error": verdict.error, "error_to_reference": verdict.error_to_reference}
        finite = {name: value if value < float("inf") else None for name, value in numbers.items()}
        return {"status": "wrong" if verdict.wrong else "right", "reason": verdict.wrong, **finite}

    def _take_exactly(self, name: str) -> gpu_smoke.Outcome:
        case = _case(name)
        return gpu_smoke.take(case, "reference", gpu_smoke.CPU, self._smoke_shapes(case), exact=True)

    def _take_by_reference(self, name: str) -> gpu_smoke.Outcome:
        case = _case(name)
        return gpu_smoke.take(case, "reference", self.device, self._smoke_shapes(case))

    def _smoke_shapes(self, case: gpu_smoke.Case) -> list[Shape]:
        if self.gpu:
            return gpu_smoke.MANY_SHAPES if case.many else gpu_smoke.SHAPES
        return gpu_smoke.MANY_SHAPES[:8] if case.many else gpu_smoke.TINY_SHAPES

    # Timing

    def _compared(
        self, section: Section, work: Workload, group: Sequence[Provider], job: Row, groups_left: int
    ) -> list[Row]:
        """Rows of providers that fit into the memory together."""
        gc.collect()  # what was timed before may hang together in circles, and holds memory
        rows = {p.name: self._row(section, work, p) for p in group}
        made: dict[str, Ready] = {}
        for p in group:
            # The baseline and whatever comes first are worth any wait.
            if len(made) >= 2 and time.time() > job["deadline"]:
                continue
            self.doing(f"{section.title}: {p.name}", PATIENCE + (COMPILING if p.form == "compile" else 0))
            rows[p.name].update(self._made(section, p, work, made))
            if rows[p.name]["status"] == "failed":
                self._lost_or_not(rows[p.name])
        taken: dict[str, DeviceTiming] = {}
        while BASELINE in made and not taken:
            left = max(0.0, job["deadline"] - time.time()) / groups_left
            try:
                taken = compare_on_device(
                    {name: provider.call for name, provider in made.items()},
                    BASELINE,
                    min(job["seconds"], 0.5 * left),
                    self._stopwatch(),
                    during=lambda name: self._sampling(section, name, made[name]),
                    min_sample=DEVICE_SAMPLE if self.gpu else DEVICE_SAMPLE // 10,
                    min_rounds=MIN_ROUNDS if self.gpu else 3,
                )
            except Exception as error:  # without the one that raised it, the others can still be timed
                rows[self._sampled].update({"status": "failed", "reason": message(error)})
                self._lost_or_not(rows[self._sampled])
                del made[self._sampled]
        alone = taken[BASELINE].device if taken else None
        for p in group:
            if p.name in taken:
                rows[p.name].update(self._figures(p, work, taken[p.name], alone))
        return list(rows.values())

    @contextlib.contextmanager
    def _sampling(self, section: Section, name: str, provider: Ready) -> Iterator[None]:
        self.doing(f"{section.title}: {name}", PATIENCE)
        self._sampled = name
        with provider.during():
            yield

    def _made(self, section: Section, provider: Provider, work: Workload, made: dict[str, Ready]) -> Row:
        try:
            found = ready(provider, work, alive=lambda: self.doing(f"{section.title}: {provider.name}", PATIENCE))
            if self.gpu:
                torch.cuda.synchronize()
        except UnavailableError as error:
            return {"status": "unavailable", "reason": str(error)}
        except torch.OutOfMemoryError:
            return {"status": "unavailable", "reason": "out of memory"}
        except Exception as error:
            return {"status": "failed", "reason": message(error)}
        made[provider.name] = found
        return {}

    def _lost_or_not(self, row: Row) -> None:
        if self.gpu:
            try:
                torch.cuda.synchronize()
            except Exception:
                self.answer(row)
                os._exit(LOST)

    def _row(self, section: Section, work: Workload, provider: Provider) -> Row:
        return {
            **section.columns(),
            "tensors": len(work.shapes),
            "elements": work.elements,
            "sets": len(work),
            "provider": provider.name,
            "kind": provider.kind,
            "backend": provider.backend,
            "ours": provider.ours,
            "status": PENDING,
            "reason": "",
        }

    def _figures(self, provider: Provider, work: Workload, taken: DeviceTiming, alone: float | None) -> Row:
        moved = provider.bytes_moved(work.dtype)
        time_taken = taken.device or taken.step.median
        rate = None if moved is None else moved * work.elements / time_taken / 1e9
        return {
            "status": "measured",
            **taken.step._asdict(),
            "device": taken.device,
            "device_ratio": taken.device / alone if taken.device and alone else None,
            "host": taken.host,
            "host_low": taken.host_low,
            "host_high": taken.host_high,
            "bytes_per_parameter": moved,
            "gb_per_s": rate,
            "share": rate / self.copy_gb_per_s if rate and self.copy_gb_per_s else None,
        }

    def _stopwatch(self) -> Stopwatch:
        if not self.gpu:
            return Stopwatch(HostEvent)
        return Stopwatch(_cuda_event, _hold_for(self.device))

    def _free(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free)


def chunks(wanted: Sequence[Provider], sizes: Sequence[int], available: int) -> list[list[Provider]]:
    """Providers in groups that fit into the memory together, each with the baseline, which comes first.

    Args:
        wanted: all of them.
        sizes: bytes that each has for itself.
        available: bytes.
    """
    baseline, *others = wanted
    groups = [[baseline]]
    filled = sizes[0]
    for provider, size in zip(others, sizes[1:], strict=True):
        if len(groups[-1]) > 1 and filled + size > available:
            groups.append([baseline])
            filled = sizes[0]
        groups[-1].append(provider)
        filled += size
    return groups


def _case(name: str) -> gpu_smoke.Case:
    return next(case for case in gpu_smoke.CASES if case.name == name)


def _cuda_event() -> Event:
    event: Event = torch.cuda.Event(enable_timing=True)
    return event


@functools.cache
def _hold_for(device: torch.device) -> Callable[[float], object] | None:
    """What keeps the device busy for so many seconds: a kernel of PyTorch's that counts clock cycles."""
    spin: Callable[[int], object] | None = getattr(torch.cuda, "_sleep", None)
    if spin is None:
        return None
    cycles = 20_000_000
    start, end = _cuda_event(), _cuda_event()
    spin(cycles)
    start.record()
    spin(cycles)
    end.record()
    end.synchronize()
    per_second = cycles / (start.elapsed_time(end) * 1e-3)
    return lambda seconds: spin(int(seconds * per_second))


def main(arguments: Sequence[str] | None = None) -> None:
    """Take jobs from standard input until it ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_worker", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--scale", type=int, default=8)
    parser.add_argument("--answers", type=int, required=True, help="file descriptor of the pipe")
    parser.add_argument("--doing", type=int, required=True, help="file descriptor of the file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    answers = os.fdopen(options.answers, "w", buffering=1)

    def answer(row: Row) -> None:
        answers.write(json.dumps(row) + "\n")

    def doing(what: str, patience: float) -> None:
        os.pwrite(options.doing, json.dumps([what, patience]).ljust(400).encode(), 0)

    worker = Worker(device, options.scale, answer, doing)
    for line in sys.stdin:
        job = json.loads(line)
        worker.copy_gb_per_s = job["copy_gb_per_s"]
        try:
            worker.do(job)
            worker.synchronize()
        except Exception as error:
            sys.excepthook(*sys.exc_info())
            answer({"error": message(error)})
            worker.synchronize()
        answer({"done": True})


if __name__ == "__main__":
    main()
