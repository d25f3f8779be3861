"""How kernels are compiled and launched, and on which devices."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from dataclasses import dataclass
from math import inf
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sofim_fused import checks
from sofim_fused.backends import addresses
from sofim_fused.backends.interface import Sums
from sofim_fused.backends.solve import on_device_of
from sofim_fused.backends.triton import pack
from sofim_fused.backends.triton.workspace import Located, Workspace

OLDEST = (3, 6)  # the oldest Triton that the kernels were compiled with
CAPABILITY = (8, 0)  # of an NVIDIA GPU: the first with bfloat16

REGISTERS = 128  # per thread at most
# The limit for whole steps in one launch with L2 decay, where one program per multiprocessor runs.
REGISTERS_ALONE = 224

_FLOAT64 = pack.TYPES[torch.float64]
_UNALIGNED_CODES = pack.CODES | pack.UNALIGNED


@dataclass(frozen=True)
class KernelConfig:
    """What a kernel is compiled for; :mod:`sofim_fused.backends.triton.kernels` has the numbers of passes.

    Attributes:
        kinds: those of the tensors (:mod:`sofim_fused.backends.triton.pack`).
        first: the pass of the first sweep.
        second: the pass of the second sweep.
        finish: what follows the sums.
        l2: some tensor has L2 weight decay.
        numerator: ``kernels.MOMENT``, ``GRADIENT`` or ``NESTEROV``; with a pass alone ``GRADIENT`` stands for sums of
            products with g, and for an update that reads g.
        per_tensor: each tensor is a Fisher block.
        clip: gradients are multiplied by a factor: clipped or unscaled.
        skip: the step may be skipped.
    """

    kinds: tuple[int, ...]
    first: int = 0
    second: int = 0
    finish: int = 0
    l2: bool = False
    numerator: int = 0
    per_tensor: bool = False
    clip: bool = False
    skip: bool = False

    @property
    def reads_gradient(self) -> bool:
        """Whether the update has a term in the gradient, for which products with it are summed."""
        return checks.reads_gradient(checks.NUMERATORS[self.numerator])

    @functools.cached_property
    def large(self) -> bool:
        """Whether programs have twice as many threads: for float64, and for moments in 8 bits that are not aligned."""
        return any(kind & 3 == _FLOAT64 or kind & _UNALIGNED_CODES == _UNALIGNED_CODES for kind in self.kinds)

    @functools.cached_property
    def takes_two(self) -> bool:
        """Whether a whole step takes two launches, as with moments in 8 bits that are not aligned: one would spill."""
        return any(kind & _UNALIGNED_CODES == _UNALIGNED_CODES for kind in self.kinds)

    def common(self, kernels: ModuleType, waits: bool = False) -> dict[str, Any]:
        """Arguments of every kernel that sweeps. ``waits``: its programs wait for each other."""
        alone = waits and self.l2 and not self.large
        return {
            # Without a limit, the compiler spills a few registers to fit more programs than memory can keep busy.
            **({} if torch.version.hip else {"maxnreg": REGISTERS_ALONE if alone else REGISTERS}),
            "KINDS": sum(kind << pack.KIND_BITS * i for i, kind in enumerate(self.kinds)),  # one constant
            "N_KINDS": len(self.kinds),
            "L2": self.l2,
            "CLIP": self.clip,
            "SKIP": self.skip,
            "SIZE": kernels.TILE,
            "num_warps": kernels.NUM_WARPS * (2 if self.large else 1),  # as many registers as float32 takes
            "enable_fp_fusion": False,  # the kernels use fma explicitly where they need a single rounding
        }


def launch_first(kernels: ModuleType, workspace: Workspace, config: KernelConfig, with_step: bool = False) -> None:
    """Launch ``accumulate`` (``with_step``: also update w by the known part of the step) or ``dots``."""
    run(
        kernels.first,
        workspace.tiles,
        *workspace.arguments(),
        PASS=config.first,
        FINISH=config.finish,
        NUMERATOR=config.numerator,
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
        GRADIENT=config.reads_gradient,
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
        NUMERATOR=config.numerator,
        GRADIENT=config.reads_gradient,
        PER_TENSOR=config.per_tensor,
        launch_cooperative_grid=True,
        **config.common(kernels, waits=True),
    )


@dataclass(frozen=True)
class SolveConfig:
    """What ``fold`` and ``solve`` are compiled for.

    Attributes:
        fisher: ``kernels.MODEL``, ``GROUP`` or ``PARAMETER``: what a Fisher block is.
        numerator: ``kernels.MOMENT``, ``GRADIENT`` or ``NESTEROV``.
        guarded: the step may clip, unscale or skip.
    """

    fisher: int
    numerator: int
    guarded: bool

    @property
    def rows(self) -> int:
        """How many values a Fisher block has: S and P, or the polynomials of S, of its scale, and of P."""
        crosses = checks.reads_gradient(checks.NUMERATORS[self.numerator])
        return (9 if crosses else 6) if self.guarded else (2 if crosses else 1)

    def common(self, kernels: ModuleType) -> dict[str, Any]:
        """Arguments of both kernels."""
        return {
            "FINISH": kernels.GUARDED if self.guarded else kernels.PLAIN,
            "NUMERATOR": self.numerator,
            "num_warps": kernels.SOLVE_BLOCK // 32,
            "enable_fp_fusion": False,
        }


def launch_fold(
    kernels: ModuleType,
    config: SolveConfig,
    located: Located,
    hyper: Tensor,
    sums: Sums,
    class_of: Tensor | None,
    totals: Tensor,
    squares: Tensor,
) -> None:
    """Launch ``fold``: from sums to totals per Fisher block.

    Args:
        kernels: :mod:`sofim_fused.backends.triton.kernels`.
        config: what to compile for.
        located: the tensors.
        hyper: float64 ``[groups, columns]``, whose columns begin as those of ``pack`` do, up to ``SIGN``.
        sums: those of the tensors; with L2 weight decay they include ``mw`` (and ``gw``, ``ww``).
        class_of: int64 ``[n]``, the class of each tensor; ``None``: there is one class.
        totals: float64 ``[classes, config.rows, blocks]``, is written.
        squares: float64 ``[classes]``, gets the sums of gg.
    """
    vectors = [sums.mm, sums.mg, sums.mw, sums.gg, sums.gw, sums.ww]
    run(
        kernels.fold,
        len(squares),
        located.rows,
        located.bounds,
        hyper,
        *(sums.mm if vector is None else vector.contiguous() for vector in vectors),  # a missing one is not read
        located.rows if class_of is None else class_of.contiguous(),
        totals,
        squares,
        len(located.rows),
        totals.shape[-1],
        L2=sums.mw is not None,
        PER_TENSOR=config.fisher == kernels.PARAMETER,
        CLASSES=class_of is not None,
        HYPERS=hyper.shape[1],
        **config.common(kernels),
    )


def launch_solve(
    kernels: ModuleType,
    config: SolveConfig,
    located: Located,
    hyper: Tensor,
    totals: Tensor,
    coefficients: Tensor,
    square: Tensor | None = None,
    outcome: Tensor | None = None,
    skipped: Tensor | None = None,
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skip_nonfinite: bool = False,
) -> None:
    """Launch ``solve``: from totals to coefficients; it also counts the update.

    Args:
        kernels: :mod:`sofim_fused.backends.triton.kernels`.
        config: what to compile for. If guarded, ``square``, ``outcome`` and ``skipped`` are tensors.
        located: the tensors.
        hyper: as for :func:`launch_fold`.
        totals: float64 ``[config.rows, blocks]``.
        coefficients: float64 ``[COEFFICIENTS, n]``, is written.
        square: float64, one element: the sum of gg over everything.
        outcome: float64 ``[2]``, gets the gradients' norm and the clip factor.
        skipped: int8 ``[1]``, gets 1 if the step is to be skipped, else 0.
        max_norm: the limit of the norm; ``None``: none.
        grad_scale: one element, float32 or float64; ``None``: 1.
        found_inf: likewise; ``None``: 0.
        skip_nonfinite: skip the step if the norm is not finite.
    """
    run(
        kernels.solve,
        max(1, -(-len(located.rows) // kernels.SOLVE_BLOCK)),
        located.rows,
        hyper,
        totals,
        totals if square is None else square,
        totals if grad_scale is None else grad_scale,
        totals if found_inf is None else found_inf,
        coefficients,
        totals if outcome is None else outcome,
        totals if skipped is None else skipped,
        inf if max_norm is None else float(max_norm),
        len(located.rows),
        totals.shape[-1],
        FISHER=config.fisher,
        CLIP=max_norm is not None,
        SCALED=grad_scale is not None,
        SKIP_NONFINITE=skip_nonfinite,
        FOUND=found_inf is not None,
        HYPERS=hyper.shape[1],
        **config.common(kernels),
    )


_compiled: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}
"""Kernels, what they were compiled to, and the constants after their arguments, by all that Triton compiles for."""
_HIP = torch.version.hip is not None


def run(kernel: Any, programs: int, *arguments: Tensor | int | float, **constants: Any) -> None:
    """Launch a kernel; Triton compiles it first if it is not in Triton's cache.

    Triton's ``kernel[grid](...)`` binds arguments by name in each launch, and compares all constants of modules that
    the kernel and its functions use with those of its compilation: tens of microseconds in Python (``bench.host``).
    So only the first launch of a kind goes there, and later ones to the compiled kernel. Kinds are told apart by all
    that Triton compiles for.

    Args:
        kernel: a function with ``triton.jit``, in whose signature constants come last.
        programs: how many.
        arguments: of the kernel, in its order; the first is a tensor on the current device.
        constants: its ``tl.constexpr`` arguments and options of the compiler, by name, always in the same order.

    Raises:
        RuntimeError: Triton's cache cannot be used; the message names the environment variable to set.
    """
    first = arguments[0]
    assert isinstance(first, Tensor)
    kind = (id(kernel), first.device.index, *map(_kind, arguments), *constants.items())
    if (known := _compiled.get(kind)) is not None:
        _, compiled, rest = known
        compiled[(programs, 1, 1)](*arguments, *rest)
        return
    try:
        compiled = kernel[(programs,)](*arguments, **constants)
    except (OSError, ValueError) as error:  # from the files of the cache
        raise RuntimeError(
            f"Triton could not compile or load a kernel ({_first_line(error)}): TRITON_CACHE_DIR has to be a folder "
            "that can be written to; empty it if it is damaged, or take backend='cuda' or 'reference'"
        ) from error
    if compiled is not None:  # as in the interpreter
        _compiled[kind] = kernel, compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _kind(argument: Tensor | float) -> Any:
    """What Triton compiles for of an argument that is no constant."""
    if isinstance(argument, Tensor):
        aligned = argument.data_ptr() & 15 == 0
        if _HIP:  # there offsets have 32 bits within small tensors
            return argument.dtype, aligned, argument.untyped_storage().size() < 1 << 31
        return argument.dtype, aligned
    if isinstance(argument, float):
        return float
    return argument == 1, argument & 15 == 0, -(1 << 31) <= argument < 1 << 31, argument < 1 << 63


def number(value: Tensor | float | None, like: Tensor) -> Tensor | None:
    """A number, or a one-element tensor, as kernels read it: a float32 or float64 tensor on ``like``'s device."""
    if value is None:
        return None
    ready = isinstance(value, Tensor) and value.device == like.device and addresses.plain(value)
    if ready and value.dtype in (torch.float32, torch.float64):  # type: ignore[union-attr]
        return value.detach()  # type: ignore[union-attr]
    return on_device_of(like, value)


def programs_per_multiprocessor(config: KernelConfig, hip: bool) -> int:
    """How many programs of one launch certainly run on a multiprocessor at once, so that they may wait for each other.

    A multiprocessor has 65,536 registers. A program takes ``REGISTERS`` for each of its 256 threads (512 if it is
    ``large``), or ``REGISTERS_ALONE`` with L2 decay, which needs more sums. The launch is also cooperative: the driver
    refuses it if the programs do not fit. On an AMD GPU, where registers are not limited, the result is 1.
    """
    return 1 if hip or config.large or config.l2 else 2


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
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
        triton.runtime.driver.active.get_current_target()  # compiles a C file
    except Exception as error:
        return f"Triton cannot use the GPU ({_first_line(error)})"
    return kernels, False


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
