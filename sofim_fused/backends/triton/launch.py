"""How kernels are compiled and launched, and on which devices."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sofim_fused.backends.triton import pack
from sofim_fused.backends.triton.workspace import Workspace

OLDEST = (3, 6)  # the oldest Triton that the kernels were compiled with
CAPABILITY = (8, 0)  # of an NVIDIA GPU: the first with bfloat16

REGISTERS = 128  # per thread at most
# In a whole step as one launch with L2 decay: its programs wait for each other, one per multiprocessor.
REGISTERS_ALONE = 224


@dataclass(frozen=True)
class KernelConfig:
    """What a kernel is compiled for; :mod:`sofim_fused.backends.triton.kernels` names passes and ways to finish.

    Attributes:
        kinds: of the tensors (:mod:`sofim_fused.backends.triton.pack`).
        first: the pass of the first sweep.
        second: the pass of the second sweep.
        finish: what follows the sums.
        l2: some tensor has L2 weight decay.
        cross: the gradient form of the step, or sums for it.
        per_tensor: each tensor is a Fisher block.
        clip: the gradients are scaled: clipped, or freed of the scale that they came with.
        skip: the step may be skipped.
    """

    kinds: tuple[int, ...]
    first: int = 0
    second: int = 0
    finish: int = 0
    l2: bool = False
    cross: bool = False
    per_tensor: bool = False
    clip: bool = False
    skip: bool = False

    @property
    def double(self) -> bool:
        """Whether some tensor is float64."""
        return any(kind & 3 == pack.TYPES[torch.float64] for kind in self.kinds)

    def common(self, kernels: ModuleType, waits: bool = False) -> dict[str, Any]:
        """Arguments of every kernel that sweeps. ``waits``: its programs wait for each other."""
        alone = waits and self.l2 and not self.double
        return {
            # Without a limit, the compiler spills a few registers to fit more programs than memory can feed.
            **({} if torch.version.hip else {"maxnreg": REGISTERS_ALONE if alone else REGISTERS}),
            "KINDS": sum(kind << 8 * i for i, kind in enumerate(self.kinds)),  # one constant, a byte for each
            "N_KINDS": len(self.kinds),
            "L2": self.l2,
            "CLIP": self.clip,
            "SKIP": self.skip,
            "SIZE": kernels.TILE,
            "num_warps": kernels.NUM_WARPS * (2 if self.double else 1),  # as many registers as float32 takes
            "enable_fp_fusion": False,  # the kernels say where they want a single rounding
        }


def launch_first(kernels: ModuleType, workspace: Workspace, config: KernelConfig, with_step: bool = False) -> None:
    """Launch ``accumulate`` (``with_step``: w takes the known part of its step) or ``dots``."""
    run(
        kernels.first,
        workspace.tiles,
        *workspace.arguments(),
        PASS=config.first,
        FINISH=config.finish,
        CROSS=config.cross,
        STEP=with_step,
        PER_TENSOR=config.per_tensor,
        **config.common(kernels),
    )


def launch_second(kernels: ModuleType, workspace: Workspace, config: KernelConfig) -> None:
    """Launch ``apply`` or ``commit``."""
    run(
        kernels.second,
        workspace.tiles,
        workspace.rows,
        workspace.tile_of,
        workspace.hyper,
        workspace.work,
        workspace.tensors,
        workspace.tiles,
        PASS=config.second,
        GRADIENT=config.cross,
        **config.common(kernels),
    )


def launch_single(kernels: ModuleType, workspace: Workspace, config: KernelConfig, programs: int) -> None:
    """Launch both passes of a step as one kernel of at most ``programs`` programs, all of which can run at once."""
    run(
        kernels.single,
        min(workspace.tiles, programs),
        *workspace.arguments(),
        FIRST=config.first,
        SECOND=config.second,
        FINISH=config.finish,
        CROSS=config.cross,
        GRADIENT=config.cross,
        PER_TENSOR=config.per_tensor,
        launch_cooperative_grid=True,
        **config.common(kernels, waits=True),
    )


def run(kernel: Any, programs: int, *arguments: Tensor | int, **constants: Any) -> None:
    """Launch a kernel; Triton compiles it first if it is not in Triton's cache.

    Raises:
        RuntimeError: Triton's cache cannot be used; the message names the environment variable to set.
    """
    try:
        kernel[(programs,)](*arguments, **constants)
    except (OSError, ValueError) as error:  # from the files of the cache
        raise RuntimeError(
            f"Triton could not compile or load a kernel ({_first_line(error)}): TRITON_CACHE_DIR has to be a folder "
            "that can be written to; empty it if it is damaged, or take backend='cuda' or 'reference'"
        ) from error


def programs_per_multiprocessor(config: KernelConfig, hip: bool) -> int:
    """How many programs of one launch certainly run on a multiprocessor at once, and so may wait for each other.

    A multiprocessor has 65,536 registers. A program takes ``REGISTERS`` for each of its 256 threads (512 with
    float64), or ``REGISTERS_ALONE`` with L2 decay, where there is more to sum. The launch is cooperative as well, which
    the driver refuses if there is no room. One program on an AMD GPU, where registers are not limited.
    """
    return 1 if hip or config.double or config.l2 else 2


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many of them a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def device_scope(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` the current one: a launch goes to the current device, wherever its arguments are."""
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.cache
def kernels_for(device: torch.device) -> tuple[ModuleType, bool] | str:
    """The module of kernels, and whether they run in Triton's interpreter; or why there are none for ``device``."""
    if device.type not in ("cpu", "cuda"):
        return f"it runs on GPUs of NVIDIA and AMD, not on {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    try:
        triton: Any = importlib.import_module("triton")
        version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    except Exception as error:  # a broken installation may raise anything
        return f"Triton cannot be imported ({_first_line(error)}): pip install triton"
    if version < OLDEST:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}: pip install --upgrade triton"
    kernels = importlib.import_module("sofim_fused.backends.triton.kernels")
    emulated = not isinstance(kernels.first, triton.runtime.JITFunction)
    if emulated:
        return (kernels, True) if device.type == "cpu" else "TRITON_INTERPRET is set: Triton runs on the CPU alone"
    if device.type == "cpu":
        return "it runs on GPUs (and, where TRITON_INTERPRET=1 is set before Python starts, slowly on the CPU)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"it needs compute capability {'.'.join(map(str, CAPABILITY))}, that of A100, or above"
    try:
        triton.runtime.driver.active.get_current_target()  # compiles a file of C
    except Exception as error:
        return f"Triton cannot use the GPU ({_first_line(error)})"
    return kernels, False


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
