"""The acceptance run on a GPU: builds, checks, tests and times the package, all by one command.

    python3 -m bench.gpu --budget 540

Takes a fixed time at most, the most telling first. What is found goes at once to a new file, bench/results/
gpu_<device>_<date>.jsonl, and to a document beside it: a run may be ended at any time. The exit code is 1 after a
failed test, an exception or a hang in a step of this package, or a finding of compute-sanitizer; also if the tests of
a native backend were asked for and none has passed. It is 2 where there is no GPU. With ``--device cpu`` the same code
runs on the CPU: miniature models, Triton in its interpreter, and, with SOFIM_EMULATED=1, the CUDA kernels, where the
native parts are those of ``make emulated``.

Where one run has not enough time, another goes on: ``--continue`` takes the first one's file, leaves out what is known
there and adds to it. ``--prebuilt`` takes native parts that were compiled elsewhere.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu import record, report
from bench.gpu.processes import Command, Output, message, tail
from bench.gpu.record import ROOT, Record, Row

PACKAGE = ROOT / "sofim_fused"
NATIVE = ("_build.json", "_C.*.so")  # what native parts consist of at least
TOOLS = ("racecheck", "memcheck", "synccheck")  # compute-sanitizer's
FINDINGS = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
LEAST = 15.0  # seconds for a part, if there are as many: starting Python and PyTorch takes some of them
FINISHING = 5.0  # seconds at the end of the budget
QUIET = 90.0  # seconds without a line after which a process counts as hanging, compiling kernels included
NO_TESTS = 5  # pytest's exit code
MATRIX = "tests/step/test_matrix.py"
# Of the matrix: enough to see whether to go on; and what compute-sanitizer watches, all storage types in each case.
SMOKE = "follows_the_oracle and float32 and decoupled or 16_bit and complex64 and True-none"
WATCHED = "16_bit and complex64 and (True-none and (plain- or skip-) or mixed and nesterov and None-False)"


class Part(NamedTuple):
    """A part of a run: ``action`` takes the seconds that it may use, and returns a description of the outcome."""

    name: str
    weight: float
    action: Callable[[float], str]


class Run:
    """The parts of a run, and what they have in common.

    Args:
        options: of the command line.
        path: of the record.
        environment: of all processes.
    """

    def __init__(self, options: argparse.Namespace, path: Path, environment: dict[str, str]) -> None:
        self.options, self.path, self.environment = options, path, environment
        self.device: str = options.device
        on_cpu = ("cuda",) if environment.get("SOFIM_EMULATED") == "1" else ("cpu",)
        self.native = ("cuda", "triton") if self.device == "cuda" else on_cpu
        self.started = time.monotonic()
        self.failed = False  # whether the part that is done has failed
        self._written = 0.0
        self.plugins = plugins(os.cpu_count() or 1, self.note)
        self._watching: dict[str, Command] = {}  # compute-sanitizer at work

    def left(self) -> float:
        """Seconds, the time to finish taken off."""
        spent = time.monotonic() - self.started
        return max(0.0, float(self.options.budget) - FINISHING - spent)

    def parts(self) -> list[Part]:
        """Those that are asked for. Each gets a share of the time by its weight; what it leaves is the later ones'."""
        every = [
            Part("build", 150, self.build),
            Part("smoke", 40, self.smoke),
            Part("tests", 150, lambda seconds: self.tests("tests", seconds, "not triton")),
            Part("sanitizer", 25, self.sanitize),
            Part("rows", 220, self.rows),
            Part("triton-tests", 100, lambda seconds: self.tests("triton-tests", seconds, "triton")),
            Part("rest", 5, self.rows),  # with what the others have left
        ]
        return [part for part in every if part.name in self.options.parts]

    def run(self) -> int:
        """Do one part after the other; return the exit code."""
        parts = self.parts()
        try:
            for index, (name, weight, action) in enumerate(parts):
                share = self.left() * weight / sum(part.weight for part in parts[index:])
                seconds = min(max(share, LEAST), self.left())
                say(f"[{time.monotonic() - self.started:5.0f} s] {name} (has {seconds:.0f} s)")
                self.failed = False
                try:
                    outcome = action(seconds) if seconds > 1 else "not reached"
                except Exception as error:
                    outcome, self.failed = message(error), True
                if outcome:
                    say(f"  {outcome}")
                record.add(self.path, "part", name=name, outcome=outcome, failed=self.failed)
        finally:
            for command in self._watching.values():
                command.end()
            found = report.write(self.path)
        failures = report.failures(found)
        for title, entries in (("Remarks", report.remarks(found)), ("Failures", failures)):
            say("\n  ".join([f"{title}: {len(entries) or 'none'}", *entries]))
        say(f"Tests: {report.tested(found)}")
        say(f"Written to {self.path.name} and {self.path.with_suffix('.md').name}")
        return 1 if failures else 0

    def note(self, what: str) -> None:
        """Note something, and say it."""
        say(f"  NOTE: {what}")
        record.add(self.path, "note", name=what)

    def see(self, line: str) -> None:
        """Say a line of another process, unless it only says that it goes on; have the document follow."""
        if line.strip() and not line.startswith(("at ", "not reached ")):
            say(f"  | {line}")
        if time.monotonic() - self._written > 2:
            self._written = time.monotonic()
            report.write(self.path)

    def see_failure(self, line: str) -> None:
        """Say a line of pytest's that is about a failure."""
        if line.startswith(("FAILED", "ERROR", "E  ")):
            self.see(line)

    def python(self, *arguments: str, **environment: str) -> Command:
        """Start Python."""
        return Command([sys.executable, *arguments], {**self.environment, **environment})

    # Parts

    def build(self, seconds: float) -> str:
        """Have native parts: compiled elsewhere, or compiled here for this machine alone."""
        if (folder := self.options.prebuilt) is not None:
            for file in [*PACKAGE.glob("*.so"), PACKAGE / "_build.json"]:
                file.unlink(missing_ok=True)
            for file in [*folder.glob("*.so"), folder / "_build.json"]:
                shutil.copy2(file, PACKAGE)
            return "native parts were compiled elsewhere"
        device = Record(self.path).runs[-1]["device"]
        switches = {"SOFIM_BUILD_CUDA": "auto" if self.device == "cuda" else "0"}
        if (cpu := torch.backends.cpu.get_cpu_capability().lower()) in ("avx2", "avx512"):
            switches["SOFIM_INSTRUCTION_SETS"] = cpu  # the others take minutes, and are of no use here
        if "compute capability" in device:
            switches["TORCH_CUDA_ARCH_LIST"] = device["compute capability"]
        switches = {name: os.environ.get(name) or value for name, value in switches.items()}
        done = self.python("setup.py", "-q", "build_ext", "--inplace", **switches).wait(seconds)
        return "" if done.code == 0 else f"setup.py build_ext --inplace {done}; going on with what is there"

    def smoke(self, seconds: float) -> str:
        """A few cases of the matrix: whether anything is worth the time."""
        return self.pytest("smoke", seconds, [MATRIX], f"{self.native[0]}-{self.device} and ({SMOKE})")

    def tests(self, part: str, seconds: float, wanted: str) -> str:
        """Run tests that are marked gpu, while compute-sanitizer watches some of them."""
        self.watch()
        files = dict.fromkeys(map(str, (*self.options.tests_first, *self.options.tests)))
        return self.pytest(part, seconds, list(files), wanted)

    def pytest(self, part: str, seconds: float, files: Sequence[str], wanted: str) -> str:
        """Run tests that have not passed yet.

        Args:
            part: the one that they belong to. It fails if tests are left for it to run and none of its tests passes,
                now or, for the same code, in the run that is continued: if all of them are skipped, nothing is tested.
            seconds: for all of them.
            files: that have them.
            wanted: pytest's expression that selects them by name.
        """
        if importlib.util.find_spec("pytest") is None:
            return "pytest is not installed: no test was run"
        environment = {record.VARIABLE: str(self.path), record.PART: part, "TRITON_INTERPRET": "0"}
        environment["SOFIM_ALL_GPU_TESTS"] = os.environ.get("SOFIM_ALL_GPU_TESTS") or "1"
        command = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += ["-p", "bench.gpu.outcomes", "-m", "gpu" if self.device == "cuda" else "not slow", "-k", wanted]
        before = len(Record(self.path).of("test"))
        done = self.python(*command, *self.plugins, *files, **environment).wait(seconds, self.see_failure)
        found = Record(self.path)
        say(f"  {report.tested(found)}")
        if done.code is None:
            return f"not finished within {seconds:.0f} s, after {len(found.of('test')) - before} tests"
        passed = [test for test in found.of("test") if test["outcome"] == "passed"]
        if done.code != NO_TESTS:  # if all have passed before, they may have done so in another part
            passed = [test for test in passed if test.get("part", part) == part]
        # After 1, tests have failed, of which the record has been told.
        self.failed = done.code not in (0, 1, NO_TESTS) or not passed
        return f"{'' if passed else 'no test has passed; '}pytest {done}" if self.failed else ""

    def watch(self) -> None:
        """Begin with what :meth:`sanitize` waits for: each keeps one core of many busy while the tests run."""
        folders = [os.environ.get("PATH", ""), *(f"{cuda}/bin" for cuda in Path("/usr/local").glob("cuda*"))]
        tool = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
        if tool is None or "sanitizer" not in self.options.parts:
            return
        known = Record(self.path).passed("sanitizer")
        # Each tensor in an allocation of its own: within PyTorch's blocks nothing would be out of bounds.
        environment = {**self.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SOFIM_ALL_GPU_TESTS": "1"}
        for check, name in itertools.product(TOOLS, self.native):
            title = f"compute-sanitizer {check}, {name}"
            if title not in known and title not in self._watching:
                command = [tool, "--tool", check, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
                if check == "memcheck":  # PyTorch asks for what drivers may lack
                    command[3:3] = ["--report-api-errors", "no"]
                wanted = f"{name}-{self.device} and {WATCHED}"
                self._watching[title] = Command([*command, MATRIX, "-k", wanted], environment)

    def sanitize(self, seconds: float) -> str:
        """What compute-sanitizer has found."""
        self.watch()
        end = time.monotonic() + seconds
        for title, command in self._watching.items():
            outcome, detail = sanitizer_verdict(command.wait(max(0.1, end - time.monotonic())))
            say(f"  {title}: {outcome} {detail}")
            record.add(self.path, "sanitizer", name=title, outcome=outcome, detail=detail)
        return "" if self._watching else "compute-sanitizer is NOT THERE, or has nothing left to do"

    def rows(self, seconds: float) -> str:
        """Time what has no row yet; a provider that hangs, or whose process dies, gets one that says so."""
        end, before = time.monotonic() + min(seconds, self.left()), set[str]()
        command = ["-m", "bench.gpu.rows", str(self.path), "--device", self.device, "--rows", self.options.rows]
        while (left := end - time.monotonic()) > 1:
            more = ["--seconds", str(left), "--each", str(self.options.each)]
            done = self.python(*command, *more).wait(left + FINISHING / 2, self.see, QUIET)
            if done.code == 0:
                missing = re.findall("^not reached (.*)", done.text, re.MULTILINE)
                return f"not reached: {'; '.join(missing)}" if missing else ""
            (*_, at) = ("at the start", *re.findall("^at .*", done.text, re.MULTILINE))
            if done.code is None and not done.quiet:
                return f"the time was over {at}"
            title, _, provider = at.removeprefix("at ").rpartition(": ")
            why = f"nothing came for {QUIET:g} s" if done.quiet else str(done)
            if title in ("", "backend") or at in before:  # no row can be timed, or it died here before
                self.failed = True
                return f"bench.gpu.rows {why} ({at})"
            before.add(at)
            if (title, provider) not in Record(self.path).rows:
                ours = provider.startswith("SOFIM")
                failed: Row = {"title": title, "provider": provider, "ours": ours, "status": "failed", "reason": why}
                record.add(self.path, "row", **failed)
                self.see(f"{title}: {provider}: {why}")
        return "the time was over"


def plugins(cores: int, note: Callable[[str], object]) -> list[str]:
    """Arguments of pytest for plugins that are here: most of a test's time is one core compiling its kernels."""
    found = []
    if importlib.util.find_spec("pytest_timeout"):  # a kernel that never ends is one failure, of one worker
        found += ["--timeout", str(int(QUIET)), "--timeout-method", "thread"]
    else:
        note("pytest-timeout is not installed: a test that hangs takes all the time that tests have")
    if cores < 4:
        return found
    if importlib.util.find_spec("xdist"):
        return [*found, "-n", str(min(12, cores * 3 // 4)), "--dist", "worksteal"]
    note("pytest-xdist is not installed: tests run one after the other")
    return found


def sanitizer_verdict(done: Output) -> tuple[str, str]:
    """What compute-sanitizer says: an outcome, and the details."""
    summaries = [int(found) for found in FINDINGS.findall(done.text)]
    if any(summaries):
        return "failed", f"{sum(summaries)} errors; {tail(done.text, 12)}"
    if done.code is None:
        return "not finished", "in its time"
    if not summaries:
        return "no verdict", tail(done.text) or "no output"
    if not re.search(r"^\d+ passed", done.text, re.MULTILINE):
        return "failed", f"the tests that it watched have not passed; {tail(done.text, 12)}"
    return "passed", ""


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def device_information(device: str, environment: dict[str, str]) -> Row | str:
    """What figures depend on, or why there is no such device."""
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "Python": sys.version.split()[0]}
    try:
        versions["triton"] = importlib.import_module("triton").__version__
    except Exception as error:  # a broken installation may raise anything
        versions["triton"] = message(error)
    if device == "cpu":
        return {"name": "CPU, miniature models", **versions, "cores": os.cpu_count()}
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    properties: Any = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "-i", "0"]
    known = Command(query, environment).wait(20).text if shutil.which("nvidia-smi") else ""
    return {
        "name": str(properties.name), **versions, "cores": os.cpu_count(),
        "compute capability": f"{properties.major}.{properties.minor}", "L2 cache, MiB": properties.L2_cache_size >> 20,
        "memory, GiB": properties.total_memory >> 30, "driver, SM clock, power": tail(known),
    }  # fmt: skip


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__.splitlines()[0])
    parts = ("build", "smoke", "tests", "sanitizer", "rows", "triton-tests", "rest")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="(default: %(default)g)")
    parser.add_argument(
        "--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=f"of {', '.join(parts)}"
    )
    parser.add_argument(
        "--rows", default="", metavar="PATTERN", help='regular expression: of "TITLE: PROVIDER", as in tables'
    )
    parser.add_argument("--each", type=float, default=2.0, metavar="SECONDS", help="for rows that are timed in turns")
    parser.add_argument("--tests", type=Path, nargs="+", metavar="FILE", help="(default: all of tests/)")
    parser.add_argument("--tests-first", type=Path, nargs="+", default=[], metavar="FILE", help="before other tests")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a new .jsonl file; the document goes beside it")
    parser.add_argument("--continue", dest="earlier", type=Path, metavar="FILE",
        help="the .jsonl of an earlier run: do what has no result there, and add to it (with --output: to a copy)",
    )  # fmt: skip
    parser.add_argument("--prebuilt", type=Path, metavar="FOLDER",
        help="with native parts that were compiled for this machine elsewhere (the .so files and _build.json)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.tests is None:  # where there is no GPU, something that takes seconds
        options.tests = [Path("tests") if options.device == "cuda" else Path("tests/step/test_rounding.py")]
    if (folder := options.prebuilt) is not None and (missing := [x for x in NATIVE if not list(folder.glob(x))]):
        parser.error(f"--prebuilt {folder}: {' and '.join(missing)} not there; compile them with setup.py build_ext")
    for file in [*options.tests_first, *options.tests]:
        if not (ROOT / file).exists():
            parser.error(f"--tests, --tests-first: there is no {file}")
    try:
        re.compile(options.rows)
    except re.error as error:
        parser.error(f"--rows {options.rows}: not a regular expression ({error})")
    if options.output is not None and (options.output.suffix != ".jsonl" or options.output.exists()):
        parser.error(f"--output {options.output}: name a new file that ends in .jsonl")
    return options


def tested_backends(options: argparse.Namespace) -> list[str]:
    """The native backends of which some test has to pass: those whose tests are asked for, on a GPU."""
    parts = {"cuda": {"smoke", "tests"}, "triton": {"triton-tests"}} if options.device == "cuda" else {}
    return [backend for backend, theirs in parts.items() if theirs & {*options.parts}]


def path_of(options: argparse.Namespace, device: Row) -> Path:
    """Where the record goes: what an earlier run has left is never overwritten.

    Raises:
        ValueError: the earlier run to continue is of another device, or is none; the message names the file.
    """
    name = re.sub(r"[^a-z0-9]+", "_", device["name"].lower()).strip("_")
    folder = ROOT / ("build" if options.device == "cpu" else "bench/results")
    stem = f"gpu_{name}_{datetime.date.today().isoformat()}"
    names = (f"{stem}.jsonl", *(f"{stem}_{number}.jsonl" for number in range(2, 1000)))
    path: Path = options.output or options.earlier or next(folder / x for x in names if not (folder / x).exists())
    if options.earlier is not None:
        theirs = Record(options.earlier).runs[0]["device"]["name"]
        if theirs != device["name"]:
            raise ValueError(f"{options.earlier} is of {theirs}, and this is {device['name']}: start a new record")
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.earlier is not None:
        path.write_bytes(record.whole(options.earlier.read_bytes()))
    return path.resolve()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return the exit code."""
    options = parsed(arguments)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if options.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    device = device_information(options.device, environment)
    if isinstance(device, str):
        say(f"There is no GPU to run on: {device}. --device cpu exercises this command without one.")
        return 2
    try:
        path = path_of(options, device)
    except ValueError as error:
        say(f"--continue: {error}")
        return 2
    say("; ".join(f"{name} {value}" for name, value in device.items()))
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python3", "-m", "bench.gpu", *(Path(x).name if os.path.isabs(x) else x for x in given)])
    today = datetime.date.today().isoformat()
    code = {"code": record.code_of(), "bench": record.code_of(names=record.BENCH)}
    record.add(path, "run", command=command, date=today, device=device, **code, backends=tested_backends(options))
    return Run(options, path, environment).run()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the document written
    sys.exit(main())
