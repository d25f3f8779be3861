"""Breaks one line for each stage of CI, and requires the stage to notice: ``python -m tests.mutations [stage ...]``.

A mutation is an entry of :data:`MUTATIONS`: the stage, the file, the text and its replacement, and what the stage then
has to print. It is made in a copy of the sources (``build/mutations``), where the stage's make target runs, restricted
to the part that has to notice. A stage has noticed if it fails and prints what is expected; failing for another reason
does not count. The text must occur exactly once, or the run ends with an error: then the entry has to be updated.

It takes many minutes, most of them to compile C++ again; ``.ci/run`` leaves it out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutations"
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "*.egg-info"
)
LIMIT = 1200.0  # seconds for a stage
ANYWHERE = {"SOFIM_INSTRUCTION_SETS": "default"}  # the one that every CPU has, compiled alone


class Mutation(NamedTuple):
    """One line that is wrong.

    Attributes:
        stage: the make target that has to notice.
        files: a pattern, relative to the root, of files one of which has ``old``, once.
        old, new: the text, and what it becomes.
        said: a regular expression for what the stage prints when it notices.
        arguments: of make; they restrict what runs.
        rebuild: whether the native part in the copy has to be compiled with the mutation first.
        needs: a program without which the stage checks nothing.
    """

    stage: str
    files: str
    old: str
    new: str
    said: str
    arguments: tuple[str, ...] = ()
    rebuild: bool = False
    needs: str = ""


MUTATIONS = [
    Mutation(
        "lint",
        "sofim_fused/backends/solve.py",
        "FLOAT32_MAX = torch.finfo(torch.float32).max",
        "FLOAT32_MAX = torch.finfo(torch.float32).max; import os",
        r"E702|F401|I001",
    ),
    Mutation(
        "types",
        "sofim_fused/step/hyperparameters.py",
        "def serves(self, sizes: Sequence[int], numerator: str, fisher: str, adaptive: bool = False) -> bool:",
        "def serves(self, sizes: Sequence[int], numerator: str, fisher: str, adaptive: bool = False) -> str:",
        r"hyperparameters\.py:\d+: error: Incompatible return value",
    ),
    Mutation(
        "test",
        "sofim_fused/backends/solve.py",
        "moment = hyper.lr * shrink * per_tensor(cross[0], settings)",
        "moment = -hyper.lr * shrink * per_tensor(cross[0], settings)",
        r"FAILED tests/step/test_matrix\.py::test_follows_the_oracle",
        ("ARGS=-x -k 'reference and gradient' tests/step/test_matrix.py",),
    ),
    Mutation(
        "test",
        "sofim_fused/backends/solve.py",
        "return momentum / later, (1 - momentum) / later",
        "return momentum * correction, (1 - momentum) / later",
        r"FAILED tests/step/test_matrix\.py::test_follows_the_oracle",
        ("ARGS=-x -k 'reference and nesterov' tests/step/test_matrix.py",),
    ),
    Mutation(
        "test",
        "sofim_fused/backends/adaptive.py",
        "m * sums.mm + g * sums.mg",
        "m * sums.mm - g * sums.mg",
        r"FAILED tests/step/test_matrix\.py::test_adaptive_diagonals_follow",
        ("ARGS=-x -k 'reference and test_adaptive_diagonals_follow' tests/step/test_matrix.py",),
    ),
    Mutation(
        "test",
        "sofim_fused/backends/adaptive.py",
        "corrections * trace / (trace + square)",
        "corrections * trace / (1 + square)",
        r"FAILED tests/step/test_matrix\.py::test_adaptive_diagonals_follow",
        ("ARGS=-x -k 'reference and test_adaptive_diagonals_follow' tests/step/test_matrix.py",),
    ),
    Mutation(
        "test",
        "sofim_fused/backends/adaptive.py",
        ".clamp(min=COLUMN_FLOOR)",
        ".clamp(min=COLUMN_FLOOR * COLUMN_FLOOR)",
        r"FAILED tests/step/test_matrix\.py::test_adaptive_diagonals_follow",
        ("ARGS=-x -k 'reference and test_adaptive_diagonals_follow' tests/step/test_matrix.py",),
    ),
    Mutation(
        "test",
        "sofim_fused/backends/adaptive.py",
        "mean * self.gain * self.gain",
        "mean * self.gain",
        r"FAILED tests/step/test_matrix\.py::test_adaptive_diagonals_follow",
        ("ARGS=-x -k 'reference and test_adaptive_diagonals_follow' tests/step/test_matrix.py",),
    ),
    Mutation(
        "test",
        "sofim_fused/backends/adaptive.py",
        ".clamp(max=torch.finfo(running.dtype).max)",
        ".clamp(min=0.0)",
        r"FAILED tests/step/test_adaptive\.py::test_a_gradient_whose_square",
        ("ARGS=-x -k 'reference and test_a_gradient_whose_square' tests/step/test_adaptive.py",),
    ),
    Mutation(
        "convergence",
        "bench/convergence/nystrom.py",
        'alpha=-group["lr"] / rho)',
        'alpha=group["lr"] / rho)',
        r"training loss went from",
    ),
    Mutation(
        "instruction-sets",
        "csrc/cpu/*.h",
        "to[i].x = static_cast<uint16_t>(word[i] >> 16);",
        "to[i].x = static_cast<uint16_t>(word[i] >> 15);",
        r"FAILED tests/",
        ("LESSER_SETS=default", "ARGS=-x"),
        rebuild=True,
    ),
    Mutation(
        "interpreter",
        "sofim_fused/backends/triton/kernels.py",
        "w = tl.fma(m, _factor(coefs + _BY_MOMENT * tensors, KIND), w)",
        "w = tl.fma(m, _factor(coefs + _BY_GRADIENT * tensors, KIND), w)",
        r"FAILED tests/step/test_matrix\.py",
        ("INTERPRETER_TESTS=tests/step/test_matrix.py", "ARGS=-x -k test_follows_the_oracle"),
    ),
    Mutation(
        "emulated",
        "csrc/cuda/*",
        "at[sum] = fma(a, b, at[sum]);",
        "at[sum] = fma(a, b, -at[sum]);",
        r"FAILED tests/step/test_matrix\.py",
        ("EMULATED_TESTS=tests/step/test_matrix.py", "ARGS=-x -k test_follows_the_oracle"),
    ),
    Mutation(
        "interpreter",
        "sofim_fused/backends/triton/kernels.py",
        "return momentum / later, (1.0 - momentum) / later",
        "return momentum / later, (1.0 - momentum) * correction",
        r"FAILED tests/step/test_matrix\.py",
        ("INTERPRETER_TESTS=tests/step/test_matrix.py", "ARGS=-x -k 'test_follows_the_oracle and nesterov'"),
    ),
    Mutation(
        "emulated",
        "csrc/step/solve.h",
        "by_gradient = (1.0 - momentum) / later;",
        "by_gradient = (1.0 - momentum) * correction;",
        r"FAILED tests/step/test_matrix\.py",
        ("EMULATED_TESTS=tests/step/test_matrix.py", "ARGS=-x -k 'test_follows_the_oracle and nesterov'"),
    ),
    Mutation(
        "cuda-syntax",
        "csrc/cuda/launch.cpp",
        "c10::cuda::getCurrentCUDAStream().stream()",
        "c10::cuda::getCurrentCUDAStream().steam()",
        r"error: .*steam",
        needs="nvcc",
    ),
    Mutation(
        "kernels",
        "sofim_fused/backends/triton/kernels.py",
        "pointer = tl.multiple_of(pointer, 16)",
        "pointer = tl.multiple_of(pointer, 1)",
        r"\b[1-9]\d* of them wrong",
        ("ARGS=--kinds 'bf16, bf16 moment' --targets sm_90",),  # in Triton alone,
    ),
    Mutation(
        "threads",
        "csrc/cpu/parallel.cpp",
        "sums + tile * width);",
        "sums + tensor * width);",
        r"ThreadSanitizer: data race|bits",
    ),
    Mutation(
        "sanitize",
        "csrc/cpu/parallel.cpp",
        "std::min(kTile, row.numel - start)",
        "kTile",
        r"AddressSanitizer: heap-",
        ("SANITIZE_TESTS=tests/backends/test_native.py", "ARGS=-x -k test_sizes_and_alignment"),
    ),
    Mutation(
        "docs",
        "docs/benchmarks.md",
        "](distributed.md#how-it-scales)",
        "](distributed.md#how-it-scaled)",
        r"how-it-scaled",
    ),
]


class Outcome(NamedTuple):
    """The result of a mutation."""

    mutation: Mutation
    noticed: str
    seconds: float


def place_of(mutation: Mutation, root: Path) -> Path:
    """The file that has a mutation's text.

    Raises:
        SystemExit: none has it, or it is there more than once.
    """
    found = [(path, path.read_text(encoding="utf-8").count(mutation.old)) for path in sorted(root.glob(mutation.files))]
    there = [path for path, count in found if count == 1]
    if sum(count for _, count in found) != 1:
        raise SystemExit(
            f"{mutation.stage}: {mutation.old!r} is {sum(count for _, count in found)} times in {mutation.files}, not "
            "once: let tests/mutations.py follow the sources"
        )
    return there[0]


def copied() -> None:
    """Copy the sources and the native part. What was compiled in an earlier copy stays, to be used again."""
    for place in COPY.iterdir() if COPY.exists() else []:
        if place.name != "build":
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    for place in ROOT.iterdir():
        if place.name == "build" or place.name in LEFT_OUT(str(ROOT), [place.name]):
            continue
        if place.is_dir():
            shutil.copytree(place, COPY / place.name, ignore=LEFT_OUT)
        else:
            COPY.mkdir(parents=True, exist_ok=True)
            shutil.copy2(place, COPY)


def native_is_new(yes: bool) -> None:
    """Make ``make`` regard the copied native part as up to date, or not."""
    stamp = COPY / "build" / "native"
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    if yes:
        stamp.touch()


def tried(mutation: Mutation, python: Path, shown: bool) -> Outcome:
    """Run a mutation's stage with the mutation, and undo the mutation afterwards."""
    if mutation.needs and shutil.which(mutation.needs) is None:
        return Outcome(mutation, f"not tried: {mutation.needs} is not here", 0.0)
    path = place_of(mutation, COPY)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace(mutation.old, mutation.new), encoding="utf-8")
    native_is_new(not mutation.rebuild)
    began = time.monotonic()
    command = ["make", mutation.stage, f"VENV={python}", "NATIVE=build/native", "JOBS=1", "-o", f"{python}/.ready"]
    try:
        done = subprocess.run(
            [*command, *mutation.arguments],
            cwd=COPY,
            env={**os.environ, **ANYWHERE},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LIMIT,
            check=False,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        status, output = 0, f"it did not end in {LIMIT:.0f} s"
    finally:
        path.write_text(whole, encoding="utf-8")  # newer than what was compiled: it will be compiled again
        if mutation.rebuild:
            for built in (ROOT / "sofim_fused").glob("*.so"):
                shutil.copy2(built, COPY / "sofim_fused")
            shutil.copy2(ROOT / "sofim_fused" / "_build.json", COPY / "sofim_fused")
    said = re.search(mutation.said, output) is not None
    noticed = "yes" if status and said else "NO: it passed" if not status else "NO: it failed for another reason"
    if shown or noticed != "yes":
        print(output[-6000:])
    return Outcome(mutation, noticed, time.monotonic() - began)


def table(outcomes: Sequence[Outcome]) -> str:
    """Stage, mutation, whether it was noticed, seconds."""
    rows = [("stage", "mutation", "noticed", "seconds")]
    rows += [(o.mutation.stage, o.mutation.new, o.noticed, f"{o.seconds:.0f}") for o in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(" | ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Try the mutations of some stages, or of all; 1 if one was not noticed."""
    stages = [mutation.stage for mutation in MUTATIONS]
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"some of {', '.join(stages)} (all)")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment to run in (.venv)")
    parser.add_argument("--show", action="store_true", help="the end of what each stage prints")
    options = parser.parse_args(argv)
    if unknown := set(options.stages) - set(stages):
        parser.error(f"no mutation for {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in MUTATIONS if not options.stages or mutation.stage in options.stages]
    for mutation in chosen:
        place_of(mutation, ROOT)  # all are there before anything takes minutes
    copied()
    outcomes = []
    for mutation in chosen:
        outcomes.append(tried(mutation, options.venv.absolute(), options.show))
        print(f"{mutation.stage}: {outcomes[-1].noticed}, {outcomes[-1].seconds:.0f} s", flush=True)
    print(table(outcomes))
    return any(outcome.noticed.startswith("NO") for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
