"""Where the tests of backends run: each backend that this process can use, on each of its devices.

Environment variables choose what replaces a GPU in the whole process: with ``TRITON_INTERPRET=1`` there are only runs
in Triton's interpreter, with ``SOFIM_EMULATED=1`` only those of the CUDA kernels in the emulator (``tests/emulator``),
without them neither. Runs on a GPU are marked ``gpu``; if there is none, ``tests/conftest.py`` leaves them out.
"""

from __future__ import annotations

import os
import zlib
from typing import Any, NamedTuple

import pytest
import torch

from sofim_fused import backends
from sofim_fused.backends import cuda, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("SOFIM_EMULATED") == "1"
CPU_BACKENDS = ["triton"] if INTERPRETED else ["cuda"] if EMULATED else ["cpu", "reference"]
GPU_BACKENDS: dict[str, Any] = {"cuda": cuda, "triton": triton}  # by name, their modules
ALL_ON_GPU = os.environ.get("SOFIM_ALL_GPU_TESTS") == "1"  # else one case in eight: most have a kernel to compile
once = pytest.mark.skipif(INTERPRETED or EMULATED, reason="nothing stands in for a GPU in it")


class Run(NamedTuple):
    """A backend on a device.

    Attributes:
        single: whether whole steps take one launch, or two; ``None``: chosen by each test's name (:func:`chance`).
        ready: whether there is state before the first step, so that it can be a whole one; ``None``: chosen likewise.
    """

    backend: str
    device: str
    single: bool | None = False
    ready: bool | None = False

    def steps(self, count: int) -> int:
        """How many steps to take where another backend takes ``count``: a few in the interpreter, which is slow."""
        return min(count, 4) if INTERPRETED else count

    @property
    def layouts(self) -> tuple[str, ...]:
        """A choice of :data:`tests.support.problems.LAYOUTS`: all of them (empty), or those that differ for kernels."""
        return ("scalar", "channels-last", "sliced", "offset", "empty") if INTERPRETED else ()


def _params() -> list[Any]:
    if INTERPRETED or EMULATED:
        return [Run(CPU_BACKENDS[0], "cpu", None, None)]
    gpu_runs = [*(Run(name, "cuda", None, None) for name in GPU_BACKENDS), Run("reference", "cuda")]
    return [
        *(Run(name, "cpu") for name in CPU_BACKENDS),
        *(pytest.param(run, marks=pytest.mark.gpu) for run in gpu_runs),
    ]


def chance(name: str) -> int:
    """A number that depends on a test's name alone, to choose options evenly among tests."""
    return zlib.crc32(name.encode())


def as_named(run: Run, name: str) -> Run:
    """A run with the options that a test's name chooses."""
    bits = chance(name)
    return run._replace(
        single=bool(bits & 1) if run.single is None else run.single,
        ready=bool(bits & 2) if run.ready is None else run.ready,
    )


def on_gpu(name: str) -> str:
    """A backend by name; skips the test where it cannot run on this machine's GPU."""
    found = GPU_BACKENDS[name].passes_for(torch.device("cuda", torch.cuda.current_device()))
    if isinstance(found, str):
        pytest.skip(f"{name}: {found}")
    return name


def name_of(run: object) -> str:
    """A run's part of a test's name."""
    assert isinstance(run, Run)
    if run.single is None:
        return f"{run.backend}-{run.device}"
    launches = "" if run.backend not in GPU_BACKENDS else "-one-launch" if run.single else "-two-launches"
    return f"{run.backend}-{run.device}{launches}"


RUNS = _params()
assert set(CPU_BACKENDS) <= set(backends.names())
