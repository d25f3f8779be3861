"""The acceptance run on a GPU: installs, checks, tests and times the package, all by one command.

    python3 -m bench.gpu

Takes a fixed time at most, the cheapest and most telling first, and writes bench/results/gpu_<device>.json and .md
after every row. The exit code is 1 after a wrong result, a failed test, an exception or a hang in a step of this
package, or a finding of compute-sanitizer, and 2 where there is no GPU; a missed speed target changes nothing. With
``--device cpu`` everything that can be is exercised on the CPU, on miniature models, Triton in its interpreter.

Where one run has not enough time, another goes on: ``--continue`` takes the first one's .json, leaves out what is known
there and adds to it. ``--prebuilt`` takes native parts that were compiled elsewhere.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench import gpu_earlier, gpu_outcomes
from bench.gpu_processes import ROOT, Hang, Output, Workers, run, tail
from bench.gpu_report import DONE, FAILED, PENDING, Record, Row, Section, slug
from bench.shapes import GPU_MODELS

PACKAGE = ROOT / "sofim_fused"
RESULTS = ROOT / "bench" / "results"
GRACE = 5.0  # seconds at the end of the budget for the last results
MARKED = re.compile(r"\bmark\.gpu\b")
OUTCOMES = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)")
FINISHED = re.compile(r" (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
NO_TESTS = 5  # pytest's exit code
SLOWEST = 20  # tests whose times are kept, to plan the next run by
CPU_SWITCH, CUDA_SWITCH, ARCHITECTURES = "SOFIM_BUILD_CPU", "SOFIM_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST"
INSTRUCTION_SETS = "SOFIM_INSTRUCTION_SETS"

TOOLS = ("memcheck", "racecheck", "synccheck")  # compute-sanitizer's
MANY_CORES = 8
FOR_GPUS = ("cuda", "triton")  # the backends that the run is about

# In order of what they tell for their time.
FIRST = [Section("lenet-5", cached=True), Section("resnet-50"), Section("gpt2-small")]
SECOND = [
    Section("resnet-9"),
    Section("1000x1K"),
    Section("lm-1b"),
    Section("gpt2-small", "bfloat16"),
    Section("lm-1b", "bfloat16"),
]
THIRD = [
    Section("resnet-50", "bfloat16"),
    Section("vit-b"),
    Section("1000x1K", cached=True),
    Section("lenet-5", "bfloat16", cached=True),
    Section("1000x1K", "bfloat16"),
    Section("resnet-9", "bfloat16"),
    Section("vit-b", "bfloat16"),
    Section("resnet-9", cached=True),
]
COMPILED = [
    Section("lenet-5", cached=True, compiled=True),
    Section("resnet-50", compiled=True),
    Section("gpt2-small", compiled=True),
]
TRAINED = ("resnet-9, batch 512", "resnet-9, batch 512, bfloat16 autocast", "transformer, batch 64 x 128")
PARTS = ("smoke", "tests", "timing", "training", "sanitizers")


class Budget:
    """Seconds, and how they are shared among what is left to do.

    Args:
        seconds: altogether.
        clock: gives seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._started = clock()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def left(self) -> float:
        """Seconds that are left, the time to finish taken off; never negative."""
        return max(0.0, self._seconds - GRACE - self.elapsed())

    def slice(self, weights: Sequence[float]) -> float:
        """The share of the first of the steps to come, by their weights; what it leaves is the later ones'."""
        return self.left() * weights[0] / sum(weights)


class Step(NamedTuple):
    """A part of the run: ``action`` takes the seconds that it may use."""

    name: str
    weight: float
    action: Callable[[float], None]


# The run


class Acceptance:
    """The steps of the run, and what they have in common.

    Args:
        options: of the command line.
        record: takes the results.
        budget: the time.
        environment: of all processes.
        earlier: what is known before.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        record: Record,
        budget: Budget,
        environment: dict[str, str],
        earlier: gpu_earlier.Earlier = gpu_earlier.NOTHING,
    ) -> None:
        self.options = options
        self.record = record
        self.budget = budget
        self.environment = environment
        self.gpu = options.device == "cuda"
        self.workers = Workers(options.device, options.scale, environment)
        self.backends: list[str] = []
        self.earlier = earlier
        self._passed, self._failed = set(earlier.passed), set(earlier.failed)  # tests, by id
        self._watching: dict[tuple[str, str], Future[Output]] = {}  # sanitizers at work, by tool and backend
        self._outcome = DONE  # of the step that is being done

    def steps(self) -> list[Step]:
        """All of them, in order."""

        def sections(entries: Sequence[Section], weight: float) -> list[Step]:
            return [self._section(weight, entry) for entry in entries if entry.model in self.options.models]

        def sanitizer(tool: str) -> Step:
            return Step(f"sanitizer {tool}", 20, lambda seconds: self.sanitize(tool, seconds))

        def training(name: str) -> Step:
            return Step(f"training: {name}", 6, lambda seconds: self.train(name, seconds))

        def parts(name: str, *steps: Step) -> Sequence[Step]:
            chosen = steps if name in self.options.parts else ()
            return [step for step in chosen if step.name not in self.earlier.steps]

        early, late = FIRST, [*SECOND, *THIRD, *COMPILED]
        if self.earlier.data:  # the most telling times are known: first come the tests
            early, late = [], [*FIRST, *late]
        urgent = [Step("tests that come first", 60, self.tests_first)] if self.options.tests_first else []
        return [
            *([] if self.options.no_install else [Step("install", 150, self.install)]),
            Step("info", 4, self.info),
            Step("backends", 4, self.find_backends),
            *parts("smoke", Step("smoke", 35, self.smoke)),
            *parts("tests", *urgent),
            *parts("timing", Step("copy bandwidth", 2, self.copy), *sections(early, 10)),
            *parts("tests", Step("tests", 150, self.tests)),
            *parts("sanitizers", *map(sanitizer, TOOLS)),
            *parts("training", *map(training, TRAINED)),
            *parts("timing", *sections(late, 5)),
        ]

    def run(self) -> int:
        """Do one step after the other; return the exit code."""
        steps = self.steps()
        self.record.plan([step.name for step in steps])
        for note in self.earlier.notes:
            self.note(note)
        try:
            for index, step in enumerate(steps):
                if self.budget.left() <= 0:
                    break
                seconds = self.budget.slice([other.weight for other in steps[index:]])
                say(f"[{self.budget.elapsed():5.0f} s] {step.name} (has {seconds:.0f} s)")
                self._outcome = DONE
                try:
                    step.action(seconds)
                except Exception as error:
                    traceback.print_exc()
                    self.failed(step.name, f"{type(error).__name__}: {error}")
                    self._outcome = FAILED
                self.record.mark(step.name, self._outcome)
        finally:
            self.workers.close()
            self.record.data["elapsed"] = round(self.budget.elapsed(), 1)
            self.record.save()
        return self.conclude()

    def conclude(self) -> int:
        """Print what became of everything; return the exit code."""
        data = self.record.data
        say("Targets:")
        for row in data["targets"]:
            value = "" if row["value"] is None else f" {row['value']:.3f}"
            about = ", ".join(part for part in (row["model"], row["provider"]) if part)
            say(f"  {row['verdict']}: {row['target']} ({row['limit']}){': ' + about if about else ''}{value}")
        for title, entries in (("Notes", data["notes"]), ("Not reached", data["not_reached"])):
            if entries:
                say(f"{title}:")
                for entry in entries:
                    say(f"  {entry}")
        say(f"Failures: {len(data['failures']) or 'none'}")
        for entry in data["failures"]:
            say(f"  {entry}")
        return 1 if self.record.failed else 0

    def failed(self, where: str, what: str) -> None:
        """Note a failure, and say it."""
        self.record.fail(f"{where}: {what}")
        say(f"  FAILED: {where}: {what}")

    def note(self, what: str) -> None:
        """Note something, and say it."""
        self.record.note(what)
        say(f"  NOTE: {what}")

    # Steps

    def install(self, seconds: float) -> None:
        """Install the package in place, with as much of its native parts as can be had in the time."""
        if self.options.prebuilt is not None:
            self._take_prebuilt(self.options.prebuilt)
            return
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."]
        builds = self._builds()
        left = time.monotonic() + seconds
        for build in builds:
            environment = {**self.environment, **build}
            # What is later retried without a part may take most of the time, not all.
            share = 1 if build == builds[-1] else 0.7
            done = run(pip, max(10.0, (left - time.monotonic()) * share), environment, say_more)
            if done.code not in (0, None) and "externally-managed" in done.text:
                say("  pip refuses: the Python is managed from outside; installing all the same")
                done = run([*pip, "--break-system-packages"], max(10.0, left - time.monotonic()), environment, say_more)
            if done.code == 0:
                self.record.data["install"] = f"pip, {_switches(build)}"
                return
            reason = "it took too long" if done.code is None else tail(done.text, 3)
            self.note(f"pip install with {_switches(build)} did not work: {reason}")
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = run(command, max(10.0, left - time.monotonic()), {**self.environment, **builds[0]}, say_more)
        how = "with" if done.code == 0 else "without"
        self.record.data["install"] = f"PYTHONPATH, {how} setup.py build_ext --inplace"
        self.note(f"the package is not installed but used from its folder (PYTHONPATH), {how} what setup.py builds")

    def _take_prebuilt(self, folder: Path) -> None:
        """Put native parts that were compiled elsewhere in the place of those that are here."""
        for file in [*PACKAGE.glob("*.so"), PACKAGE / gpu_earlier.BUILD]:
            file.unlink(missing_ok=True)
        for file in [*folder.glob("*.so"), folder / gpu_earlier.BUILD]:
            shutil.copy2(file, PACKAGE)
        self.record.data["install"] = "PYTHONPATH, native parts compiled elsewhere"

    def _builds(self) -> list[dict[str, str]]:
        """What to build, as setup.py reads it from the environment; what to do without, if that does not work."""
        given = "auto" if _has_ninja() else "0"
        if given == "0" and not {CPU_SWITCH, CUDA_SWITCH} <= os.environ.keys():
            self.note("ninja is not there: native parts, which would be compiled file by file, are left out")
        first = {
            CPU_SWITCH: os.environ.get(CPU_SWITCH) or given,
            CUDA_SWITCH: os.environ.get(CUDA_SWITCH) or (given if self.gpu else "0"),
        }
        if (cpu := self.record.data["device"].get("cpu")) in ("avx2", "avx512"):  # what else is there takes minutes
            first[INSTRUCTION_SETS] = os.environ.get(INSTRUCTION_SETS) or cpu
        if capability := self.record.data["device"]["more"].get("compute capability"):
            first[ARCHITECTURES] = os.environ.get(ARCHITECTURES) or capability  # for this device alone
        builds = [first, {**first, CUDA_SWITCH: "0"}, {**first, CPU_SWITCH: "0", CUDA_SWITCH: "0"}]
        return [build for i, build in enumerate(builds) if build not in builds[:i]]

    def info(self, seconds: float) -> None:
        """Print what is installed."""
        done = run([sys.executable, "-m", "sofim_fused.info"], max(seconds, 60), self.environment)
        for line in done.text.rstrip().splitlines():
            say(f"  {line}")
        if done.code != 0:
            self.failed("info", "python -m sofim_fused.info " + _ending(done))

    def find_backends(self, seconds: float) -> None:
        """Ask every backend whether it runs here."""
        for row in self._job({"kind": "backends"}, "backends", seconds):
            self.record.data["backends"][row["backend"]] = row["state"]
            say(f"  {row['backend']}: {row['state']}")
        self.backends = [name for name, state in self.record.data["backends"].items() if state == "ok"]
        if self.gpu and not self._native():
            self.failed("backends", "no native backend runs on the GPU")
        if self.options.prebuilt is not None and "cuda" not in self.backends and self.gpu:
            self.failed("backends", f"the prebuilt CUDA part is not in use: {self.record.data['backends'].get('cuda')}")
        for name in FOR_GPUS:
            if self.gpu and name not in self.backends:
                self.note(f"the backend {name} is not in this run: {self.record.data['backends'].get(name)}")
        self.record.save()

    def _native(self) -> list[str]:
        return [name for name in self.backends if name != "reference"]

    def copy(self, seconds: float) -> None:
        """Measure what the device can do."""
        for row in self._job({"kind": "copy", "seconds": 4.0}, "copy bandwidth", seconds):
            self.record.data["copy_gb_per_s"] = row["gb_per_s"]
            say(f"  {row['gb_per_s']:.1f} GB/s over {row['bytes'] / 2**20:.0f} MiB")
        self.record.save()

    def smoke(self, seconds: float) -> None:
        """Compare each backend with the reference."""
        end = time.monotonic() + seconds
        if not self.backends:
            self.failed("smoke", "no backend is known to run here")
        for index, backend in enumerate(self.backends):
            share = (end - time.monotonic()) / (len(self.backends) - index)
            for row in self._job({"kind": "smoke", "backend": backend}, f"smoke: {backend}", share, self._no_step):
                self.record.add("smoke", row, "backend", "case")
                self._see_smoke(row)
        self.record.save()

    def _see_smoke(self, row: Row) -> None:
        error = f", {row['error']:.2g} of the tolerance" if row.get("error") is not None else ""
        reason = f": {row['reason']}" if row["reason"] else ""
        say(f"  {row['backend']}: {row['case']}: {row['status']}{error}{reason}")
        if row["status"] in ("wrong", "failed"):
            self.failed(f"smoke: {row['backend']}: {row['case']}", row["reason"])

    def _no_step(self, hang: Hang) -> Row | None:
        backend, _, case = hang.doing.partition(": ")
        if backend not in self.backends or not case:
            return None
        return {"backend": backend, "case": case, "status": "failed", "reason": hang.reason}

    def train(self, name: str, seconds: float) -> None:
        """Time whole training steps."""
        job = {"kind": "training", "model": name, "backends": self.backends, "seconds": 4.0 if self.gpu else 0.5}
        for row in self._job(job, f"training: {name}", seconds):
            self.record.add("training", {"run": self.record.run, **row}, "model", "provider")
            say(f"  {row['provider']}: {row['median'] * 1e3:.3f} ms, {row['ratio']:.3f} of SGD fused")

    def _section(self, weight: float, section: Section) -> Step:
        def measure(seconds: float) -> None:
            job = {
                "kind": "timing",
                "section": section._asdict(),
                "backends": self.backends,
                "only": self.options.providers,
                "known": self.earlier.providers.get(section.title, []),
                "seconds": 4.0 if self.gpu else 0.5,
            }
            reached: set[str] = set()
            for row in self._job(job, section.title, seconds, lambda hang: _row_of(section, hang)):
                if "note" in row:
                    self.note(row["note"])
                elif row["status"] != PENDING or row["provider"] not in reached:
                    reached.add(row["provider"])
                    self.record.add("timing", {"run": self.record.run, **row}, "section", "provider", "run")
                    self._see_timing(row)

        return Step(section.title, weight, measure)

    def _see_timing(self, row: Row) -> None:
        if row["status"] == "measured":
            rate = "" if row["gb_per_s"] is None else f", {row['gb_per_s']:.0f} GB/s"
            device = "" if row["device"] is None else f", device {row['device'] * 1e6:.1f} µs"
            say(
                f"  {row['provider']}: {row['median'] * 1e6:.1f} µs, {row['ratio']:.3f} of SGD fused{device}, "
                f"host {row['host'] * 1e6:.1f} µs{rate}"
            )
            return
        say(f"  {row['provider']}: {row['status']}{': ' + row['reason'] if row['reason'] else ''}")
        if row["status"] == "failed":
            where, what = f"{row['section']}: {row['provider']}", row["reason"]
            if row["ours"]:
                self.failed(where, what)
            else:
                self.note(f"{where}: {what}")

    def _job(
        self,
        job: Row,
        name: str,
        seconds: float,
        row_of: Callable[[Hang], Row | None] = lambda hang: None,
    ) -> Iterator[Row]:
        """A job's rows. What hangs is left out, and the rest of the job tried again in a new process."""
        exclude: list[str] = []
        while True:
            now = time.time()
            given = {
                **job,
                "exclude": exclude,
                "deadline": now + min(max(seconds, 8.0), self.budget.left()),
                "copy_gb_per_s": self.record.data["copy_gb_per_s"],
            }
            limit = min(max(3 * seconds, 60.0), self.budget.left() + GRACE / 2)
            hang = None
            for answer in self.workers.do(given, limit):
                if isinstance(answer, Hang):
                    hang = answer
                elif "error" in answer and "status" not in answer:
                    say(self.workers.log())
                    self.failed(name, answer["error"])
                    self._outcome = FAILED
                else:
                    yield answer
                    if answer.get("status") == "failed" or "case" in answer:
                        exclude.append(_named(answer))
            if hang is None:
                return
            if hang.late or self.budget.left() <= 0:
                self.note(f"{name}: the time was over at {hang.doing}")
                self._outcome = PENDING
                return
            if hang.doing in exclude:  # it has told of its own failure, then its process ended
                continue
            say(self.workers.log())
            row = row_of(hang)
            if row is None:
                self.failed(name, f"{hang.reason} (at {hang.doing})")
                self._outcome = FAILED
                return
            exclude.append(hang.doing)
            yield row

    def tests_first(self, seconds: float) -> None:
        """Run those tests that are marked gpu in the files that are to come first."""
        self._test(sorted(self.options.tests_first), seconds, needed=False)

    def tests(self, seconds: float) -> None:
        """Run the tests that are marked gpu."""
        started = time.monotonic()
        files, unknown = find_tests(self.options.tests, seconds / 3, self.environment)
        if unknown:
            self.note(f"tests that cannot be imported here, and do not name the mark: {', '.join(unknown)}")
        seconds -= time.monotonic() - started
        self.watch_meanwhile(seconds)
        if not files:
            self._tested("no test is marked gpu", {}, wrong=self.gpu)
            return
        self._test(files, seconds)

    def _test(self, files: Sequence[Path], seconds: float, needed: bool = True) -> None:
        """Run the marked tests of some files; of those that are ``needed``, one has to pass."""
        # -v in the place of -q: what was done before the time ran out can be counted.
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["-p", gpu_outcomes.__name__, *plugins(os.cpu_count() or 1, seconds)]
        counted: dict[str, int] = {}

        def see(line: str) -> None:
            if found := FINISHED.search(line):
                counted[found[1].lower()] = counted.get(found[1].lower(), 0) + 1
            if re.search(r" (FAILED|ERROR)\b|^(E  |FAILED|ERROR)", line):
                say_more(line)

        before = len(self._passed)
        with tempfile.TemporaryDirectory() as folder:
            known, outcomes = Path(folder, "known"), Path(folder, "outcomes")
            known.write_text("\n".join(sorted(self._passed)), encoding="utf-8")
            environment = {**self.environment, gpu_outcomes.KNOWN: str(known), gpu_outcomes.OUTCOMES: str(outcomes)}
            done = run([*command, *map(str, files)], seconds, environment, see)
            found = gpu_outcomes.read(outcomes)
        for name, (outcome, _) in found.items():
            {"passed": self._passed, "failed": self._failed}.get(outcome, set()).add(name)
            if outcome == "passed":
                self._failed.discard(name)
        slow = sorted(found, key=lambda name: -found[name][1])[:SLOWEST]
        self.record.data["slow_tests"] = {name: found[name][1] for name in slow}
        known_before = f"; {before} more passed before" if before else ""
        if done.code is None:
            last = next((line for line in reversed(done.text.splitlines()) if "::" in line), "the start")
            summary = f"not finished within {seconds:.0f} s, at {_test_of(last)}{known_before}"
            self._tested(summary, counted, wrong=True)
            return
        counts = {name.rstrip("s"): int(n) for n, name in OUTCOMES.findall(tail(done.text, 1))}
        summary = (", ".join(f"{n} {name}" for name, n in counts.items()) or "no summary") + known_before
        if done.code in (0, NO_TESTS) and not counts.get("passed") and not before:
            self._tested(f"no tests ran ({summary})", counts, wrong=self.gpu and needed)
        elif done.code not in (0, NO_TESTS):
            say(tail(done.text, 40))
            self._tested(f"{summary} (exit status {done.code})", counts, wrong=True)
        else:
            self._tested(summary, counts, wrong=False)

    def _tested(self, summary: str, counts: dict[str, int], wrong: bool) -> None:
        named = {"passed": sorted(self._passed), "failed": sorted(self._failed)}
        self.record.data["tests"] = {"summary": summary, "counts": counts, **named}
        say(f"  {summary}")
        if wrong:
            self.failed("tests", summary)
        elif not self._passed:
            self.note(f"tests: {summary}; they need a GPU")
        if self._failed and not wrong:
            self.failed("tests", f"{len(self._failed)} failed before, and not run anew: {', '.join(named['failed'])}")
        self.record.save()

    def sanitize(self, tool: str, seconds: float) -> None:
        """Run a few steps of each native backend under one of compute-sanitizer's tools."""
        sanitizer = find_sanitizer(self.environment.get("PATH", ""))
        if sanitizer is None:
            self._sanitized(tool, "", "not there")
            self.note("compute-sanitizer is NOT THERE: nobody has watched the memory accesses")
            return
        end = time.monotonic() + seconds
        watched = self._watched()
        for index, backend in enumerate(watched):
            share = (end - time.monotonic()) / (len(watched) - index)
            begun = self._watching.pop((tool, backend), None)
            done = self._watch(sanitizer, tool, backend, share) if begun is None else begun.result()
            verdict, wrong = sanitizer_verdict(done)
            self._sanitized(tool, backend, verdict)
            if wrong:
                say(tail(done.text, 40))
                self.failed(f"compute-sanitizer {tool}: {backend}", verdict)
            elif verdict != CLEAN:
                say(tail(done.text))
                self.note(f"compute-sanitizer {tool}: {backend}: {verdict}")

    def watch_meanwhile(self, seconds: float) -> None:
        """Begin with what :meth:`sanitize` asks for: it keeps one core of many busy while the tests run."""
        sanitizer = find_sanitizer(self.environment.get("PATH", ""))
        if sanitizer is not None and "sanitizers" in self.options.parts and (os.cpu_count() or 1) >= MANY_CORES:
            wanted = [(tool, backend) for tool in TOOLS for backend in self._watched()]
            pool = ThreadPoolExecutor(max(1, len(wanted)))
            for each in wanted:
                self._watching[each] = pool.submit(self._watch, sanitizer, *each, seconds)
            pool.shutdown(wait=False)

    def _watched(self) -> list[str]:
        return self._native() or self.backends

    def _watch(self, sanitizer: str, tool: str, backend: str, seconds: float) -> Output:
        command = [sanitizer, "--tool", tool]
        if tool == "memcheck":
            command += ["--report-api-errors", "no"]  # PyTorch asks for what drivers may lack
        target = [sys.executable, "-m", "bench.gpu", "--sanitizer-target", "--device", self.options.device]
        # Each tensor in an allocation of its own: within PyTorch's blocks nothing would be out of bounds.
        environment = {**self.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return run([*command, *target, "--backend", backend], seconds, environment)

    def _sanitized(self, tool: str, backend: str, verdict: str) -> None:
        name = f"{tool}, {backend}" if backend else tool
        self.record.data["sanitizer"][name] = verdict
        say(f"  compute-sanitizer {name}: {verdict}")
        self.record.save()


TARGET_DONE = "sanitizer target: done"
CLEAN = "no errors"


def sanitizer_verdict(done: Output) -> tuple[str, bool]:
    """What compute-sanitizer says, in a few words, and whether that makes the run fail."""
    summaries = [int(found) for found in SUMMARY.findall(done.text)]
    if any(summaries):
        return f"{sum(summaries)} errors", True
    if done.code is None:
        return "not finished in its time", False
    if not summaries:
        return f"no verdict: {tail(done.text, 1) or 'no output'}", False
    if TARGET_DONE not in done.text:
        return "the steps that it watched did not come to their end", True
    return CLEAN, False


def find_sanitizer(path: str) -> str | None:
    """Where compute-sanitizer is: on the PATH, or in a CUDA toolkit."""
    toolkits = sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    places = [path, *(str(toolkit / folder) for toolkit in toolkits for folder in ("bin", "compute-sanitizer"))]
    return next((found for place in places if (found := shutil.which("compute-sanitizer", path=place))), None)


def plugins(cores: int, seconds: float) -> list[str]:
    """Arguments of pytest for plugins that are here: most of a test's time is one core compiling its kernels."""
    found = []
    if (workers := min(10, cores * 3 // 4)) > 1 and importlib.util.find_spec("xdist"):
        found += ["-n", str(workers), "--dist", "worksteal"]
        if importlib.util.find_spec("pytest_timeout"):  # a kernel that never ends is one failure, of one worker
            found += ["--timeout", str(max(10, int(seconds / 2))), "--timeout-method", "thread"]
    return found


def _test_of(line: str) -> str:
    """The test that a line of pytest's is about, as its -v has it with pytest-xdist and without."""
    words = re.sub(r"^\[gw\d+\]( \[ *\d+%\])? [A-Z]+ |^scheduling tests.*", "", line)
    return FINISHED.split(words)[0].strip()


def find_tests(folder: Path, seconds: float, environment: dict[str, str]) -> tuple[list[Path], list[str]]:
    """The files with tests that are marked gpu, and the names of those that may have some but cannot be imported.

    Not every test file can be imported here, as some need packages that are not there. A file that names the mark has
    to be; others get it from fixtures, and pytest tells which.
    """
    files = sorted(folder.rglob("test_*.py"))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command.append("--continue-on-collection-errors")
    done = run([*command, *map(str, files)], seconds, environment) if files else Output(0, "")
    naming = {file for file in files if MARKED.search(file.read_text(encoding="utf-8"))}
    selected = _these(files, re.findall(r"^(\S+\.py)::", done.text, re.MULTILINE))
    broken = _these(files, re.findall(r"ERROR collecting (\S+\.py)\b", done.text, re.MULTILINE)) - naming
    if done.code is None:
        broken = set(files) - naming
    return sorted(naming | selected), [file.name for file in sorted(broken)]


def _these(files: Sequence[Path], names: Sequence[str]) -> set[Path]:
    """The files of these names, which may be relative to any folder above."""
    return {file for file in files if any(file.as_posix().endswith(f"/{name}") for name in set(names))}


def _row_of(section: Section, hang: Hang) -> Row | None:
    """The row of a provider that was never done; ``None``: it was no provider."""
    title, _, provider = hang.doing.rpartition(": ")
    if title != section.title or provider == "tensors":
        return None
    ours = provider.startswith("SOFIM")
    size = {"tensors": 0, "elements": 0, "sets": 0}
    return {
        **section.columns(), **size, "provider": provider, "kind": "", "ours": ours,
        "status": "failed", "reason": hang.reason,
    }  # fmt: skip


def _named(row: Row) -> str:
    return f"{row['section']}: {row['provider']}" if "section" in row else f"{row['backend']}: {row['case']}"


def _ending(done: Output) -> str:
    return "took too long" if done.code is None else f"ended with exit status {done.code}: {tail(done.text, 1)}"


def _switches(build: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in build.items())


def _has_ninja() -> bool:
    return shutil.which("ninja") is not None or shutil.which("ninja", path=str(Path(sys.executable).parent)) is not None


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def say_more(line: str) -> None:
    """Print a line of another program."""
    if line.strip():
        say(f"  | {line}")


def driver() -> dict[str, str]:
    """What nvidia-smi knows of the driver and the clocks; nothing where it is not there."""
    fields = {
        "driver": "driver_version",
        "SM clock": "clocks.sm",
        "highest SM clock": "clocks.max.sm",
        "memory clock": "clocks.mem",
        "power limit": "power.limit",
        "temperature": "temperature.gpu",
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader", "-i", "0"]
    done = run(command, 20, dict(os.environ))
    values = [value.strip() for value in done.text.strip().partition("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if done.code == 0 and len(values) == len(fields) else {}


def device_information(device: str, environment: dict[str, str]) -> Row | str:
    """What PyTorch says of the device, or why there is none."""
    done = run([sys.executable, "-m", "bench.gpu_device", device], 120, environment)
    if done.code != 0:
        return _ending(done)
    information: Row = json.loads(tail(done.text, 1))
    if device == "cuda":
        information["more"] = {**information["more"], **driver()}
    return information


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="(default: %(default)g)")
    parser.add_argument("--no-install", action="store_true", help="take the package as it is installed")
    parser.add_argument(
        "--models", nargs="+", choices=list(GPU_MODELS), default=list(GPU_MODELS), metavar="MODEL",
        help=f"to time, of {', '.join(GPU_MODELS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"to do, of {', '.join(PARTS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--scale", type=int, default=16, help="with --device cpu: how large a model is at most")
    parser.add_argument("--output", type=Path, help="the JSON file; the Markdown goes beside it")
    parser.add_argument(
        "--tests-first", type=Path, nargs="+", default=[], metavar="FILE", help="of those tests, that run before others"
    )
    parser.add_argument(
        "--continue", dest="earlier", type=Path, metavar="FILE",
        help="the .json of an earlier run: do what has no result there, and add to it",
    )  # fmt: skip
    parser.add_argument(
        "--prebuilt", type=Path, metavar="FOLDER",
        help="with native parts that were compiled for this machine elsewhere (the .so files and _build.json)",
    )  # fmt: skip
    parser.add_argument(
        "--providers", nargs="+", default=[], metavar="NAME", help="to time, as in the tables (default: all)"
    )
    parser.add_argument("--tests", type=Path, default=ROOT / "tests", help="the folder of the tests marked gpu")
    parser.add_argument(
        "--sanitizer-target", action="store_true", help="take a few steps for compute-sanitizer to watch"
    )
    parser.add_argument("--backend", action="append", default=[], help="of the steps to watch")
    options = parser.parse_args(arguments)
    if (folder := options.prebuilt) is not None:
        missing = [name for name in gpu_earlier.NATIVE if not list(folder.glob(name))]
        if missing:
            parser.error(f"--prebuilt {folder}: {' and '.join(missing)} not there; compile them with setup.py build")
        if options.no_install:
            parser.error("--prebuilt is a way to install: leave out --no-install")
    for file in options.tests_first:
        if not file.is_file():
            parser.error(f"--tests-first {file}: there is no such file")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit code."""
    options = parsed(arguments)
    if options.sanitizer_target:
        from bench.gpu_smoke import sanitizer_target  # imports the package, which has to be installed first

        sanitizer_target(options.device, options.backend)
        say(TARGET_DONE)
        return 0
    budget = Budget(options.budget)
    try:
        before = None if options.earlier is None else gpu_earlier.read(options.earlier)
    except ValueError as error:
        say(f"--continue: {error}")
        return 2
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if options.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    device = device_information(options.device, environment)
    if isinstance(device, str):
        say(
            f"There is no {options.device} device to run on: {device}. --device cpu exercises this command without one."
        )
        return 2
    say(f"{device['name']}; " + ", ".join(f"{name} {value}" for name, value in device["versions"].items()))
    default = (ROOT / "build" if options.device == "cpu" else RESULTS) / f"gpu_{slug(device['name'])}.json"
    path: Path = options.output or default
    out = os.environ.get("OUT")
    given = sys.argv[1:] if arguments is None else list(arguments)
    head: Row = {
        "command": shlex.join(["python3", "-m", "bench.gpu", *_without_paths(given)]),
        "date": datetime.date.today().isoformat(),
        "device": device,
        "budget": options.budget,
        "code": gpu_earlier.code_of(ROOT),
    }
    earlier = gpu_earlier.NOTHING if before is None else gpu_earlier.taken_over(before, device, head["code"])
    record = Record(path, [Path(out)] if out else [], head, earlier.data)
    code = Acceptance(options, record, budget, environment, earlier).run()
    record.data["exit_code"] = code
    record.save()
    say(f"Written to {path.name} and {path.with_suffix('.md').name}; exit code {code}")
    return code


def _without_paths(arguments: Sequence[str]) -> list[str]:
    """Folders are of no interest to a reader, and are not the same on another machine."""
    return [Path(argument).name if os.path.isabs(argument) else argument for argument in arguments]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the worker must not outlive the run
    sys.exit(main())
