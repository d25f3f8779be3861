"""The passes on a GPU: Triton kernels over a table of tensors, one launch per pass whatever the number of tensors.

A whole step takes two launches, or one. Sums and coefficients are finished on the device by the first
(:mod:`sofim_fused.backends.triton.kernels`), so that the host waits for nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from math import inf
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable imports the compiler: seconds

from sofim_fused import native
from sofim_fused.backends.interface import (
    Coefficients,
    Decay,
    GradientStep,
    NativeInBackward,
    NativeStep,
    StepTensors,
    Sums,
)
from sofim_fused.backends.solve import TorchSolve
from sofim_fused.backends.triton import pack

OLDEST = (3, 6)  # the oldest Triton that the kernels were compiled with
CAPABILITY = (8, 0)  # of an NVIDIA GPU: the first with bfloat16
# Tiles, a million elements, up to which a step takes one launch. On an H200 that saves 1.2 µs with 23 tiles, and loses
# 6 with 1,622, as fewer programs find room.
SINGLE_UP_TO = 256

SINGLE_LAUNCH: bool | None = None
"""One launch per step (``True``), two (``False``), or one up to ``SINGLE_UP_TO`` (``None``). Read at each step."""

REGISTERS = 128  # per thread at most
ALONE = 224  # where a program waits for others, and is the only one on its multiprocessor


class TritonPasses(TorchSolve):
    """See :class:`sofim_fused.backends.interface.Passes`. An instance serves one optimizer: it keeps tables.

    Args:
        kernels: :mod:`sofim_fused.backends.triton.kernels`.
        emulated: they run in Triton's interpreter, on the CPU.
    """

    name = "triton"

    def __init__(self, kernels: ModuleType, emulated: bool = False) -> None:
        self.emulated = emulated
        self._kernels = kernels
        self._sheet: Sheet | None = None

    def accumulate(self, tensors: StepTensors, decay: Decay, gradient_step: GradientStep | None = None) -> Sums:
        sums: Sums = self._sweep_first(tensors, decay, gradient_step, self._kernels.ACCUMULATE)
        return sums

    def dots(self, tensors: StepTensors, decay: Decay) -> Sums:
        sums: Sums = self._sweep_first(tensors, decay, None, self._kernels.DOTS)
        return sums

    def apply(self, tensors: StepTensors, coefficients: Coefficients) -> None:
        self._sweep_second(tensors, None, coefficients, self._kernels.APPLY)

    def commit(self, tensors: StepTensors, decay: Decay, coefficients: Coefficients) -> None:
        self._sweep_second(tensors, decay, coefficients, self._kernels.COMMIT)

    def native_step(self) -> NativeStep:
        return TritonStep(self._kernels, self.emulated)

    def native_in_backward(self) -> NativeInBackward | None:
        return None

    @untraced
    def _sweep_first(self, tensors: StepTensors, decay: Decay, gradient_step: GradientStep | None, which: int) -> Sums:
        k = self._kernels
        dots, l2 = which == k.DOTS, decay.weight is not None
        with _on(tensors.device):
            laid, sheet = self._laid(tensors, decay)
            if gradient_step is not None:
                sheet.set_update(gradient_step.weight, gradient_step.gradient)
            launch_first(
                k,
                sheet,
                Form(tuple(laid.kinds), first=which, l2=l2, cross=decay.cross and not dots),
                with_step=gradient_step is not None,
            )
            laid.finish(gradient_step is not None, not dots, False)
        mm, mg, gg, mw, gw, ww = sheet.sums().unbind()
        if dots:
            return Sums(mm=mm, mg=mg, mw=mw, gg=gg, gw=gw, ww=ww) if l2 else Sums(mm=mm, mg=mg, gg=gg)
        return Sums(mm, mg if decay.cross else None, mw=mw if decay.cross and l2 else None)

    @untraced
    def _sweep_second(self, tensors: StepTensors, decay: Decay | None, update: Coefficients, which: int) -> None:
        with _on(tensors.device):
            laid, sheet = self._laid(tensors, decay)
            sheet.set_update(update.weight, update.gradient, update.moment, update.gain, update.skip)
            form = Form(
                tuple(laid.kinds),
                second=which,
                l2=decay is not None and decay.weight is not None,
                cross=update.gradient is not None,
                clip=update.gain is not None,
                skip=update.skip is not None,
            )
            launch_second(self._kernels, sheet, form)
            laid.finish(True, decay is not None, False)

    def _laid(self, tensors: StepTensors, decay: Decay | None) -> tuple[pack.Laid, Sheet]:
        if capturing():  # pinned memory cannot be had then
            raise RuntimeError(
                "a pass of the Triton backend is captured in a graph, which takes whole steps alone: leave out "
                "in_backward, take one eager step before, or take backend='cuda'"
            )
        laid = pack.lay_out(
            tensors.params,
            tensors.grads,
            tensors.exp_avgs,
            tensors.kahans,
            tensors.steps,
            tensors.ordinals,
            self._kernels.TILE,
        )
        n = len(tensors)
        hyper = torch.zeros(n, pack.HYPERS, dtype=torch.float64)
        if decay is not None:
            factors = [decay.moment, decay.gradient, decay.weight or [0.0] * n]
            hyper[:, pack.DECAY_M :] = torch.tensor(factors, dtype=torch.float64).t()
        sheet = self._sheet
        if sheet is None or not sheet.serves(tensors.device, laid.rows, laid.tiles):
            sheet = self._sheet = Sheet(self._kernels, tensors.device, laid.rows, hyper, laid.tiles, [0, n])
        sheet.load(laid.rows, hyper, None)
        sheet.renew_work()  # sums that were returned stay what they are
        return laid, sheet


class StepTable(Protocol):
    """What :class:`sofim_fused.backends.triton.pack.Table`, which documents it, has in common with its twin in C++."""

    size: int
    tiles: int
    kinds: list[int]
    rows: Tensor
    hyper: Tensor
    scalars: list[tuple[int, int, Tensor]]
    device: torch.device | None
    gradient_form: bool
    fisher: str
    max_grad_norm: float | None
    skip_nonfinite: bool
    l2: bool

    def gather(self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> int | None:
        """See :meth:`sofim_fused.backends.triton.pack.Table.gather`."""

    def finish(self, weights: bool, moments: bool, steps: bool) -> None:
        """See :meth:`sofim_fused.backends.triton.pack.Table.finish`."""


class TritonStep:
    """Whole steps of one optimizer (:data:`sofim_fused.backends.interface.NativeStep`); it keeps tables between them.

    Args:
        kernels: :mod:`sofim_fused.backends.triton.kernels`.
        emulated: they run in Triton's interpreter, on the CPU.
        new_table: makes what gathers the tensors of a step, for a number of elements per tile; by default the C++ one
            where that is built.
    """

    def __init__(self, kernels: ModuleType, emulated: bool = False, new_table: Any = None) -> None:
        self._kernels = kernels
        self._emulated = emulated
        self._table: StepTable = (new_table or table_class())(kernels.TILE)
        self._sheet: Sheet | None = None
        self._form: Form | None = None
        self._captured: list[Sheet] = []  # graphs read their pinned memory at each replay
        self._cooperates = True
        self._changed = 0  # since the tables were filled
        self._given = (False, False)  # grad_scale, found_inf

    def __call__(
        self,
        groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, Any],
        grad_scale: Any = None,
        found_inf: Any = None,
        _counter: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Literal[True] | None:
        if not (pack.readable(grad_scale) and pack.readable(found_inf)):
            return None
        if not isinstance(found_inf, Tensor):
            found_inf = found_inf or None
        gathered = self._table
        changed = gathered.gather(groups, state)
        if changed is None:
            return None
        self._changed |= changed
        if gathered.size == 0:
            return True
        assert gathered.device is not None
        if gathered.device.type != ("cpu" if self._emulated else "cuda"):
            gathered.finish(False, False, False)
            return None
        given = (grad_scale is not None, found_inf is not None)
        if given != self._given:
            self._given = given
            self._changed |= pack.LAYOUT
        guarded = gathered.max_grad_norm is not None or gathered.skip_nonfinite or any(given)
        if self._form is None or self._changed & pack.LAYOUT:
            self._form = self._new_form(guarded)
        with _on(gathered.device):
            sheet = self._filled(grad_scale, found_inf)
            if guarded:  # what a step saw stays what it is
                sheet.outcome = torch.empty(2, dtype=torch.float64, device=sheet.device)
            self._launch(sheet, self._form)
            gathered.finish(True, True, True)
        if not guarded:
            return True
        norm, skipped = sheet.outcome.unbind()
        return norm, skipped.view(torch.int64)

    def _new_form(self, guarded: bool) -> Form:
        k, t = self._kernels, self._table
        return Form(
            tuple(t.kinds),
            first=k.DOTS if guarded else k.ACCUMULATE,
            second=k.COMMIT if guarded else k.APPLY,
            finish=k.GUARDED if guarded else k.PLAIN,
            l2=t.l2,
            cross=t.gradient_form,
            per_tensor=t.fisher == "parameter",
            clip=t.max_grad_norm is not None or self._given[0],
            skip=t.skip_nonfinite or self._given[1],
        )

    def _filled(self, grad_scale: Tensor | float | None, found_inf: Tensor | float | None) -> Sheet:
        """The tables on the device, as they are to be in this step."""
        t = self._table
        if capturing():
            if self._sheet is None or self._changed & pack.LAYOUT:
                t.finish(False, False, False)
                raise RuntimeError(
                    "a step is captured in a graph before any like it was taken: take one with the same gradients "
                    "present and the same settings, then capture"
                )
            # A graph has tables of its own: what eager steps write into theirs must not show in a replay.
            sheet = self._sheet.for_capture()
            self._captured.append(sheet)
            sheet.load(t.rows, t.hyper, t.max_grad_norm, t.skip_nonfinite)
        else:
            if self._sheet is None or self._changed & pack.LAYOUT:
                assert t.device is not None
                self._sheet = Sheet(self._kernels, t.device, t.rows, t.hyper, t.tiles, _bounds(t))
                self._changed = pack.EVERYTHING
            sheet = self._sheet
            sheet.load(
                t.rows if self._changed & pack.POINTERS else None,
                t.hyper if self._changed & pack.VALUES else None,
                t.max_grad_norm,
                t.skip_nonfinite,
            )
            self._changed = 0
        for group, column, value in t.scalars:
            sheet.hyper[1 + group, column].copy_(value.detach().reshape(()))
        # For the first row there are others only where the layout is another: nothing stale is left in it.
        for column, number in ((self._kernels.GRAD_SCALE, grad_scale), (self._kernels.FOUND_INF, found_inf)):
            if isinstance(number, Tensor):
                sheet.hyper[0, column].copy_(number.detach().reshape(()), non_blocking=True)
            elif number is not None:
                sheet.hyper[0, column].fill_(number)
        return sheet

    def _launch(self, sheet: Sheet, form: Form) -> None:
        single = sheet.tiles <= SINGLE_UP_TO if SINGLE_LAUNCH is None else SINGLE_LAUNCH
        if single and self._cooperates:
            try:
                launch_single(self._kernels, sheet, form, self._programs(sheet.device, form))
            except RuntimeError as error:
                if "cooperative" not in str(error).lower():
                    raise
                # Nothing has run: another process holds a part of the device.
                self._cooperates = False
                warnings.warn(f"a step in one launch was refused ({error}); from now on it takes two", stacklevel=4)
            else:
                return
        launch_first(self._kernels, sheet, form)
        launch_second(self._kernels, sheet, form)

    def _programs(self, device: torch.device, form: Form) -> int:
        if self._emulated:  # programs run one after the other there
            return 1
        return multiprocessors(device) * programs_per_multiprocessor(form, hip=torch.version.hip is not None)


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for; ``first``, ``second`` and ``finish`` are named in ``triton_kernels``.

    Attributes:
        kinds: of the tensors (:mod:`sofim_fused.backends.triton.pack`).
        cross: the gradient form of the step, or sums for it.
        per_tensor: each tensor is a Fisher block.
        clip: the gradients are scaled: clipped, or rid of the scale that they came with.
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
        """Arguments of every kernel. ``waits``: its programs wait for each other."""
        return {
            # Left to itself, the compiler spills a few to make room for more programs than memory can feed.
            **({} if torch.version.hip else {"maxnreg": ALONE if waits and self.l2 and not self.double else REGISTERS}),
            "KINDS": sum(kind << 8 * i for i, kind in enumerate(self.kinds)),  # one constant, a byte for each
            "N_KINDS": len(self.kinds),
            "L2": self.l2,
            "CLIP": self.clip,
            "SKIP": self.skip,
            "SIZE": kernels.TILE,
            "num_warps": kernels.NUM_WARPS * (2 if self.double else 1),  # as many registers as float32 takes
            "enable_fp_fusion": False,  # the kernels say where one rounding is meant
        }


class Sheet:
    """Tables on a device, whose shapes :mod:`sofim_fused.backends.triton.kernels` gives, for tensors of given sizes.

    Args:
        kernels: that module.
        device: where the tables lie.
        rows, hyper: tables on the CPU like those to come; of the first, the sizes of tensors are used.
        tiles: of all tensors.
        bounds: where Fisher blocks begin and end among the tensors.
    """

    def __init__(
        self,
        kernels: ModuleType,
        device: torch.device,
        rows: Tensor,
        hyper: Tensor,
        tiles: int,
        bounds: Sequence[int],
    ) -> None:
        self.device = device
        self.tensors = len(rows)
        self.tiles = tiles
        self.blocks = len(bounds) - 1
        self._sum_rows, self._update_rows = kernels.SUMS, kernels.UPDATES
        self._columns = kernels.LIMIT, kernels.GRAD_SCALE, kernels.SKIP_NONFINITE
        self._numels = rows[:, pack.NUMEL].clone()
        ends = torch.cat((rows[1:, pack.FIRST], torch.tensor([tiles])))
        tile_of = torch.repeat_interleave(torch.arange(self.tensors, dtype=torch.int32), ends - rows[:, pack.FIRST])
        self.tile_of = _sent(tile_of, torch.empty_like(tile_of, device=device))
        bounds_ = torch.tensor(bounds, dtype=torch.int32)
        self.bounds = _sent(bounds_, torch.empty_like(bounds_, device=device))
        size = (kernels.SUMS + kernels.UPDATES) * self.tensors + kernels.EXTRAS + kernels.SUMS * tiles
        self._make_tables(rows.shape, (1 + len(hyper), pack.HYPERS), size)

    def _make_tables(self, rows: Sequence[int], hyper: Sequence[int], work: int) -> None:
        device = self.device
        self.rows = torch.empty(rows, dtype=torch.int64, device=device)
        self.hyper = torch.empty(hyper, dtype=torch.float64, device=device)
        self.counters = torch.zeros(self.tensors + 2, dtype=torch.int32, device=device)
        self.work = torch.empty(work, dtype=torch.float64, device=device)
        self.outcome = self.work  # not written to without a guard
        self._rows = torch.empty(rows, dtype=torch.int64)
        self._hyper = torch.zeros(hyper, dtype=torch.float64)
        self._limit: float | None = None
        self._known = False
        # While a graph is captured, pinned memory cannot be had.
        self._pinned: tuple[Tensor, Tensor] | None = _pinned(self.rows), _pinned(self.hyper)
        self._reread = False

    def for_capture(self) -> Sheet:
        """Tables of the same sizes for a graph that is being captured; the first ones after an eager step."""
        if self._pinned is None:
            raise RuntimeError("two captures in a row: take a step outside of a graph before the second")
        twin: Sheet = object.__new__(Sheet)
        twin.__dict__.update(self.__dict__)
        twin.rows, twin.hyper = torch.empty_like(self.rows), torch.empty_like(self.hyper)
        twin.counters, twin.work = torch.zeros_like(self.counters), torch.empty_like(self.work)
        twin.outcome = twin.work
        twin._rows, twin._hyper = torch.empty_like(self._rows), torch.zeros_like(self._hyper)
        twin._known = False
        twin._reread = True
        self._pinned = None
        return twin

    def serves(self, device: torch.device, rows: Tensor, tiles: int) -> bool:
        """Whether these are the tables for tensors of such sizes."""
        same = self.device == device and self.tiles == tiles and len(rows) == self.tensors
        return same and torch.equal(rows[:, pack.NUMEL], self._numels)

    def load(self, rows: Tensor | None, hyper: Tensor | None, limit: float | None, skip: bool = False) -> None:
        """Write what differs from the last time, without waiting for the device.

        Args:
            rows: a table on the CPU, or ``None`` for that of the last time.
            hyper: likewise.
            limit: of the gradients' norm.
            skip: a step is skipped if that is not finite; taken over with a new ``hyper``.
        """
        if self._pinned is None:
            self._pinned = _pinned(self.rows), _pinned(self.hyper)
        if rows is not None and not (self._known and torch.equal(rows, self._rows)):
            self._rows.copy_(rows)
            _sent(self._rows, self.rows, self._pinned[0] if self._reread else None)
        if hyper is not None or limit != self._limit:
            if hyper is not None:
                self._hyper[1:] = hyper
            for column, value in zip(self._columns, (inf if limit is None else limit, 1.0, float(skip)), strict=True):
                self._hyper[0, column] = value
            self._limit = limit
            _sent(self._hyper, self.hyper, self._pinned[1] if self._reread else None)
        self._known = True

    def arguments(self) -> tuple[Tensor | int, ...]:
        """What a kernel with a first sweep takes, in its order."""
        tables = (self.rows, self.tile_of, self.bounds, self.hyper, self.work, self.counters, self.outcome)
        return (*tables, self.tensors, self.tiles, self.blocks)

    def renew_work(self) -> None:
        """Give sums and coefficients new memory; the last ones' stays with whoever has them."""
        update = self._update().clone()
        self.work = torch.empty_like(self.work)
        self._update().copy_(update)

    def sums(self) -> Tensor:
        """Float64 ``[SUMS, tensors]``: those that the last pass took, in the order of ``triton_kernels``."""
        return self.work[: self._sum_rows * self.tensors].view(self._sum_rows, self.tensors)

    def _update(self) -> Tensor:
        start = self._sum_rows * self.tensors
        return self.work[start : start + self._update_rows * self.tensors].view(self._update_rows, self.tensors)

    def set_update(
        self,
        weight: Tensor | None,
        gradient: Tensor | None,
        moment: Tensor | None = None,
        gain: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """Use coefficients (:class:`sofim_fused.backends.interface.Coefficients`) in place of a pass's own."""
        for row, vector, without in zip(self._update(), (weight, gradient, moment), (1.0, 0.0, 0.0), strict=True):
            row.fill_(without) if vector is None else row.copy_(vector)
        end = (self._sum_rows + self._update_rows) * self.tensors
        for at, value in ((end, gain), (end + 1, skip)):
            if value is not None:
                self.work[at].copy_(value)


def launch_first(kernels: ModuleType, sheet: Sheet, form: Form, with_step: bool = False) -> None:
    """Launch ``accumulate`` (``with_step``: w takes the known part of its step) or ``dots``."""
    _run(
        kernels.first,
        sheet.tiles,
        *sheet.arguments(),
        PASS=form.first,
        FINISH=form.finish,
        CROSS=form.cross,
        STEP=with_step,
        PER_TENSOR=form.per_tensor,
        **form.common(kernels),
    )


def launch_second(kernels: ModuleType, sheet: Sheet, form: Form) -> None:
    """Launch ``apply`` or ``commit``."""
    _run(
        kernels.second,
        sheet.tiles,
        sheet.rows,
        sheet.tile_of,
        sheet.hyper,
        sheet.work,
        sheet.tensors,
        sheet.tiles,
        PASS=form.second,
        GRADIENT=form.cross,
        **form.common(kernels),
    )


def launch_single(kernels: ModuleType, sheet: Sheet, form: Form, programs: int) -> None:
    """Launch both passes of a step as one kernel of at most ``programs`` programs, all of which can run at once."""
    _run(
        kernels.single,
        min(sheet.tiles, programs),
        *sheet.arguments(),
        FIRST=form.first,
        SECOND=form.second,
        FINISH=form.finish,
        CROSS=form.cross,
        GRADIENT=form.cross,
        PER_TENSOR=form.per_tensor,
        launch_cooperative_grid=True,
        **form.common(kernels, waits=True),
    )


def _run(kernel: Any, programs: int, *arguments: Tensor | int, **constants: Any) -> None:
    """Launch a kernel, which is compiled first where Triton's cache does not have it."""
    try:
        kernel[(programs,)](*arguments, **constants)
    except (OSError, ValueError) as error:  # of the cache's files
        raise RuntimeError(
            f"Triton could not compile or load a kernel ({_first_line(error)}): TRITON_CACHE_DIR has to be a folder "
            "that can be written to; empty it if it is damaged, or take backend='cuda' or 'reference'"
        ) from error


def programs_per_multiprocessor(form: Form, hip: bool) -> int:
    """How many programs of one launch are surely on a multiprocessor at once, and may wait for each other.

    It has 65,536 registers, and a program takes ``REGISTERS`` for each of its 256 threads, or 512 with float64; with L2
    decay, where there is more to sum, ``ALONE``. The launch is a cooperative one besides, which the driver refuses
    where it has no room. On an AMD GPU one program: there registers are not limited.
    """
    return 1 if hip or form.double or form.l2 else 2


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many of them a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def capturing() -> bool:
    """Whether the current stream is captured in a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def table_class() -> type[Any]:
    """The class that gathers the tensors of a step: in C++ where that is built, else in Python."""
    module = native.cpu()
    return pack.Table if isinstance(module, str) else module.PackedStep


def _bounds(t: StepTable) -> list[int]:
    """Where Fisher blocks begin and end among the tensors of a step."""
    if t.fisher != "group":
        return [0, t.size]
    groups = t.rows[:, pack.GROUP]
    return torch.searchsorted(groups.contiguous(), torch.arange(len(t.hyper) + 1)).tolist()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A launch goes to the current device, whatever its arguments are on."""
    if device.type == "cpu" or torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type != "cpu")


def _sent(values: Tensor, to: Tensor, pinned: Tensor | None = None) -> Tensor:
    """Copy from the CPU in the order of the stream, through pinned memory, which lives until it was read."""
    if to.device.type == "cpu":
        return to.copy_(values)
    return to.copy_(values.pin_memory() if pinned is None else pinned.copy_(values), non_blocking=True)


def passes_for(device: torch.device) -> TritonPasses | str:
    """The passes for ``device``, or the reason why it has none."""
    found = untraced(_kernels_for)(device)
    return found if isinstance(found, str) else TritonPasses(*found)


@functools.cache
def _kernels_for(device: torch.device) -> tuple[ModuleType, bool] | str:
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
