"""What compiling the C++ costs, and what a step takes, in two revisions: side by side on one machine.

    python -m bench.builds --before 692e360

Compiles the CPU part of the earlier revision and of this folder from nothing, two files at a time, and counts the user
CPU-seconds of each compiler; then times whole steps of both on the shapes of models. Each build has a process of its
own, and they take turns. Each round of a small model has new tensors, because a step takes up to a tenth longer or
shorter depending on where they are in memory. The time of a step in a round is the tenth percentile: what else the
machine does makes others longer. Writes bench/results/builds.json and .md; ``--compile-only`` leaves out the steps, and
keeps what these files say about them, as ``--models`` does for other models. ``--folder`` keeps both builds, for
another run over their steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
# How tensors are stored: the dtype of the parameters, and options of the optimizer.
STORAGE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "float32": ("float32", {}),
    "float64": ("float64", {}),
    "bfloat16 moment": ("float32", {"state_dtype": "bfloat16"}),
    "bfloat16 weights": ("bfloat16", {}),
    "float16 weights": ("float16", {}),
}
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "gradient form": {"numerator": "gradient"},
    "clipping": {"max_grad_norm": 0.1},
}
OURS: Mapping[str, Any] = {"lr": 1e-2, "momentum": 0.9, "rho": 1.0}
SMALL = 1 << 21  # a model with fewer elements is made anew in each round
LIMITS = {"bfloat16 weights": 1.05, "float16 weights": 1.05}  # of a ratio; others: 1.03
COMPILER = "SOFIM_BENCH_COMPILER"
LOG = "SOFIM_BENCH_COMPILER_LOG"
COST = "compiler.json"
SHIM = f"""#!{sys.executable}
import json, os, resource, subprocess, sys
code = subprocess.call([os.environ["{COMPILER}"], *sys.argv[1:]])
sources = [word for word in sys.argv[1:] if word.endswith((".cpp", ".cc"))]
sets = [word[17:] for word in sys.argv[1:] if word.startswith("-DCPU_CAPABILITY=")]
seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
with open(os.environ["{LOG}"], "a") as log:
    log.write(json.dumps({{"source": sources[:1], "set": sets[:1], "seconds": seconds}}) + "\\n")
sys.exit(code)
"""


def sources_of(revision: str | None, place: Path) -> Path:
    """A copy of this folder's sources (``None``) or of a revision's."""
    place.mkdir()
    if revision is None:
        listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, place / name)
    else:
        packed = subprocess.run(["git", "archive", revision], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "x", "-C", str(place)], input=packed.stdout, check=True)
    return place


def built(place: Path) -> dict[str, float]:
    """Compile the CPU part, two files at a time; CPU-seconds of the passes by instruction set, and of everything."""
    shim, log = place / "timed-c++", place / "compiler.log"
    shim.write_text(SHIM)
    shim.chmod(0o755)
    compiler = os.environ.get("CXX", "c++")
    environment = {**os.environ, COMPILER: compiler, LOG: str(log), "CXX": str(shim), "MAX_JOBS": "2"}
    environment |= {"SOFIM_BUILD_CPU": "1", "SOFIM_BUILD_CUDA": "0"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=place, env=environment, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    seconds = {"everything": resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if entry["set"] and not entry["source"][0].endswith("module.cpp"):
            name = entry["set"][0].lower()
            seconds[name] = seconds.get(name, 0.0) + entry["seconds"]
    seconds["passes"] = sum(value for name, value in seconds.items() if name != "everything")
    (place / COST).write_text(json.dumps(seconds))
    return seconds


def cost_of(place: Path) -> dict[str, float]:
    """What built() returned in an earlier run."""
    seconds: dict[str, float] = json.loads((place / COST).read_text())
    return seconds


class Worker:
    """A process that takes steps with one build."""

    def __init__(self, package: Path, threads: int) -> None:
        # The package alone: an earlier revision has modules of bench too.
        alone = tempfile.mkdtemp(dir=package)
        os.symlink(package / "sofim_fused", os.path.join(alone, "sofim_fused"))
        environment = {**os.environ, "PYTHONPATH": f"{alone}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from bench import builds; builds.work({str(package.resolve())!r}, {threads})"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def ask(self, **job: Any) -> Any:
        """Send a job; return its answer."""
        pipes: tuple[Any, Any] = self._process.stdin, self._process.stdout
        pipes[0].write(json.dumps(job) + "\n")
        line = pipes[1].readline()
        if not line:
            raise RuntimeError(f"the process ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        stdin: IO[str] | None = self._process.stdin
        assert stdin is not None
        stdin.close()
        self._process.wait()


def work(package: str, threads: int) -> None:
    """Answer jobs: {"model", "storage", "schedule", "round"} prepares an optimizer, {"seconds"} times a step.

    Each round has its tensors at other addresses.
    """
    import torch

    import sofim_fused
    from bench.shapes import MODELS

    assert Path(sofim_fused.__file__).resolve().is_relative_to(package), sofim_fused.__file__
    torch.set_num_threads(threads)
    step: Any = None
    for line in sys.stdin:
        job = json.loads(line)
        if "model" in job:
            dtype, options = STORAGE[job["storage"]]
            generator = torch.Generator().manual_seed(0)
            gaps = random.Random(job["round"])
            # While these are there, new tensors do not get the same memory again, nor equal distances to each other.
            others = [step if job["round"] > 0 else None]
            step = None
            params = []
            for shape in MODELS[job["model"]]():
                values = torch.empty(shape).normal_(0, 0.02, generator=generator).to(getattr(torch, dtype))
                params.append(torch.nn.Parameter(values))
                others.append(torch.empty(64 * gaps.randrange(1, 64), dtype=torch.uint8))
                params[-1].grad = (values * 0.05).clone()
                others.append(torch.empty(64 * gaps.randrange(1, 64), dtype=torch.uint8))
            # Earlier revisions take a dtype, not its name.
            options = {key: getattr(torch, value) for key, value in options.items()}
            step = sofim_fused.SOFIM(params, **OURS, **options, **SCHEDULES[job["schedule"]]).step
            for _ in range(3):
                step()
            del others
            answer: Any = True
        else:
            took: list[int] = []
            ends = time.perf_counter() + job["seconds"]
            while len(took) < 5 or time.perf_counter() < ends:
                began = time.perf_counter_ns()
                step()
                took.append(time.perf_counter_ns() - began)
            answer = sorted(took)[len(took) // 10] * 1e-9
        print(json.dumps(answer), flush=True)


def steps(
    workers: Mapping[str, Worker], models: Sequence[str], rounds: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Rows: the time of a step in both builds, a median over rounds, and the median of the rounds' ratios."""
    from bench.shapes import MODELS, elements

    before, now = workers.values()
    for model in models:
        for storage in STORAGE:
            for schedule in SCHEDULES:
                pairs = []
                small = elements(MODELS[model]()) < SMALL
                for turn in range(rounds):
                    if turn == 0 or small:
                        for worker in workers.values():
                            worker.ask(model=model, storage=storage, schedule=schedule, round=turn)
                    order = (before, now) if turn % 2 == 0 else (now, before)
                    took = {id(worker): worker.ask(seconds=seconds) for worker in order}
                    pairs.append((took[id(before)], took[id(now)]))
                ratios = sorted(b / a for a, b in pairs)
                yield {
                    "model": model, "storage": storage, "schedule": schedule, "before": median(a for a, _ in pairs),
                    "now": median(b for _, b in pairs), "ratio": median(ratios), "low": ratios[len(ratios) // 5],
                    "high": ratios[-1 - len(ratios) // 5], "limit": LIMITS.get(storage, 1.03),
                }  # fmt: skip


def run(record: Mapping[str, Any]) -> str:
    """Where and when something was measured."""
    return f"`{record['command']}`: {record['cpu']}, torch {record['torch']}; {record['date']}"


def steps_run(record: Mapping[str, Any]) -> str:
    """Where and when a record's steps were measured, apart from rows that say otherwise."""
    return f"{run(record)}, {record['threads']} thread(s)"


def other_models(earlier: Mapping[str, Any] | None, models: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an earlier record that are of other models, with the run that measured them."""
    if earlier is None:
        return []
    return [{"run": steps_run(earlier), **row} for row in earlier["steps"] if row["model"] not in models]


def markdown(record: Mapping[str, Any]) -> str:
    """The results as a document."""
    cost: Mapping[str, Mapping[str, float]] = record["build"]
    compiled = record.get("compiled", record)  # where the build was measured in another run than the steps
    lines = [
        f"User CPU-seconds to compile the CPU part from nothing, two files at a time. {run(compiled)}.",
        "",
        "| | " + " | ".join(cost) + " | now / before |",
        "|---" * (2 + len(cost)) + "|",
    ]
    for name in next(iter(cost.values())):
        a, b = (values[name] for values in cost.values())
        label = {"everything": "whole build", "passes": "passes, all sets"}.get(name, f"passes, {name}")
        lines.append(f"| {label} | {a:.1f} | {b:.1f} | {b / a:.2f} |")
    lines += [
        "",
        "Whole steps: medians over rounds, in which both builds take turns; the ratio is their ratios' median, with",
        "the 20th and 80th percentile.",
    ]
    measured = None
    for row in record["steps"]:
        if row.get("run", steps_run(record)) != measured:
            measured = row.get("run", steps_run(record))
            lines += [
                "",
                f"{measured}.",
                "",
                "| parameters | storage | step | before, ms | now, ms | ratio | at most |",
                "|---|---|---|---|---|---|---|",
            ]
        lines.append(
            f"| {row['model']} | {row['storage']} | {row['schedule']} | {row['before'] * 1e3:.4g}"
            f" | {row['now'] * 1e3:.4g}"
            f" | {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            f" | {row['limit']}: {'met' if row['ratio'] <= row['limit'] else 'missed'} |"
        )
    return "\n".join(lines) + "\n"


def with_steps_of(earlier: dict[str, Any] | None, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that only compiled, with the steps that ``earlier`` has."""
    if earlier is None:
        return record
    compiled = {key: record[key] for key in ("command", "date", "cpu", "torch")}
    return {**earlier, "build": record["build"], "compiled": compiled}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write down."""
    import torch

    from bench.report import RESULTS, machine
    from bench.shapes import MODELS

    parser = argparse.ArgumentParser(prog="python -m bench.builds", description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, metavar="REVISION", help="the earlier revision, as git names it")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.15, help="for the steps of one build in a round")
    parser.add_argument("--folder", type=Path, help="where to compile; what an earlier run left there is used again")
    parser.add_argument("--compile-only", action="store_true", help="keep the results of steps that are in --output")
    parser.add_argument("--output", type=Path, default=RESULTS / "builds.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        places = {"before": folder / "before", "now": folder / "now"}
        again = all(place.exists() for place in places.values())
        if not again:
            folder.mkdir(exist_ok=True)
            sources_of(options.before, places["before"])
            sources_of(None, places["now"])
        where = machine(options.threads)
        how = " --compile-only" if options.compile_only else f" --rounds {options.rounds} --seconds {options.seconds:g}"
        if len(options.models) < len(MODELS):
            how += f" --models {' '.join(options.models)}"
        many = "" if options.threads == parser.get_default("threads") else f" --threads {options.threads}"
        record: dict[str, Any] = {
            "command": f"python -m bench.builds --before {options.before}{how}{many}",
            "date": time.strftime("%Y-%m-%d"),
            "cpu": f"{where['cpu']}, {where['cores']} cores, {where['instruction_set']}",
            "torch": torch.__version__,
            "threads": options.threads,
            "build": {name: cost_of(place) if again else built(place) for name, place in places.items()},
            "steps": [],
        }
        show = partial(print, flush=True)

        def write() -> None:
            options.output.write_text(json.dumps(record, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(markdown(record))

        earlier = json.loads(options.output.read_text()) if options.output.exists() else None
        kept = other_models(earlier, options.models)
        if options.compile_only:
            record = with_steps_of(earlier, record)
        write()
        if options.compile_only:
            show(markdown(record))
            return
        record["steps"] += kept
        workers = {name: Worker(place, options.threads) for name, place in places.items()}
        try:
            for place, row in enumerate(steps(workers, options.models, options.rounds, options.seconds)):
                record["steps"].insert(place, row)
                write()  # what was measured stays, however the run ends
                show(f"{row['model']:<12} {row['storage']:<18} {row['schedule']:<14} {row['ratio']:.3f}")
        finally:
            for worker in workers.values():
                worker.close()
    show(markdown(record))


if __name__ == "__main__":
    main()
