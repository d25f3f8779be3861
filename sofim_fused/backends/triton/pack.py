"""The tensors of a step as one table of addresses and numbers, for passes that take them all in one launch.

``sofim_fused._C.PackedStep`` (``csrc/gather/packed_step.cpp``) is the same class in C++, with the same results; this
one says what they are, and serves where the native part was not built.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from math import inf, nan
from operator import is_, itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sofim_fused import checks
from sofim_fused.backends import memory

W, G, M, KAHAN, STEP, NUMEL, ORDINAL, KIND, GROUP, FIRST = range(10)
COLUMNS = 10
"""Columns of ``rows``, int64 ``[n, COLUMNS]``.

``W``, ``G``, ``M``, ``KAHAN``, ``STEP``: addresses; the first four name as many elements in one and the same order,
without gaps. ``KAHAN`` is 0 where no bits are kept, and of an empty tensor all four are. ``STEP`` is that of the count,
an int64. ``NUMEL``: elements, a complex one counting as two reals. ``ORDINAL``: the place among all parameters of the
optimizer. ``KIND``: see :data:`UNALIGNED`. ``GROUP``: the index of the parameter group. ``FIRST``: the tensor's first
tile; it has ``max(1, ceil(numel / tile))`` of them."""

LR, MOMENTUM, RHO, WEIGHT_DECAY, L2, SIGN, DECAY_M, DECAY_G, DECAY_W = range(9)
HYPERS = 9
"""Columns of ``hyper``, float64 ``[number of parameter groups, HYPERS]``.

``WEIGHT_DECAY`` is the decoupled one, or 0, and ``L2`` the other kind. ``SIGN`` is -1 for ``maximize``, else 1. The
moment is ``m' = DECAY_M·m + DECAY_G·g + DECAY_W·w``."""

TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.complex64: 0,
    torch.complex128: 1,
}
WIDE, ROUNDS, KEEPS, UNALIGNED = 1 << 2, 1 << 3, 1 << 4, 1 << 5
"""A tensor's kind: w's type (:data:`TYPES`, two bits), and a bit each for: a float32 gradient of a 16-bit w; a bfloat16
moment; bits are kept; an address among w's, g's, m's and kahan's that is no multiple of 16."""

POINTERS, VALUES, LAYOUT = 1, 2, 4
EVERYTHING = POINTERS | VALUES | LAYOUT
"""What :meth:`Table.gather` returns: bits of what differs from the last time.

``POINTERS``: anything in ``rows``. ``VALUES``: anything in ``hyper``, bit for bit. ``LAYOUT``: a column of ``rows``
that is no address, the number of groups, the device, ``gradient_form``, ``fisher``, ``skip_nonfinite``, ``l2``,
``decoupled``, or whether there is a ``max_grad_norm``."""

_LOW = 1 << 40  # below, an address may be a place in storage that was given up
_address = memory.address


class Copy(NamedTuple):
    """A tensor that passes write, and the copy that they write in its place."""

    home: Tensor
    copy: Tensor
    moment: bool


@dataclass(eq=False)
class Laid:
    """Tensors of a step in a table; it keeps them alive.

    Attributes:
        rows: int64 ``[n, COLUMNS]``, on the CPU.
        kinds: the distinct ones, sorted.
        tiles: of all tensors.
        copies: in the place of what is not laid out like its moment.
        params, grads, exp_avgs, kahans, steps: the tensors themselves; of the fourth, those that there are.
    """

    rows: Tensor
    kinds: list[int]
    tiles: int
    copies: list[Copy]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    kahans: Sequence[Tensor]
    steps: Sequence[Tensor]

    def finish(self, weights: bool, moments: bool, steps: bool) -> None:
        """Take copies home, and raise the version counters of what was written, so that autograd notices.

        Args:
            weights: the parameters and what is kept of them were written.
            moments: the moments were.
            steps: the counts were.
        """
        for home, copy, moment in self.copies:
            if moments if moment else weights:
                home.detach().copy_(copy)
        written: list[Tensor] = []
        if weights:
            written += [*self.params, *self.kahans]
        if moments:
            written += self.exp_avgs
        if steps:
            written += self.steps
        torch.autograd.graph.increment_version(written)


def lay_out(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    kahans: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    ordinals: Sequence[int],
    tile: int,
) -> Laid:
    """The table of tensors that fit each other and lie on one device, as in :class:`sofim_fused.backends.StepTensors`.

    Args:
        params: w, which may be complex.
        grads: g.
        exp_avgs: m.
        kahans: the bits that w lost, ``None`` where none are kept.
        steps: counts.
        ordinals: places among all parameters of the optimizer.
        tile: elements per tile.

    Returns:
        Rows in which ``GROUP`` is the tensor's index.
    """
    copies: list[Copy] = []
    kept: list[Tensor] = []
    columns, _ = _columns(params, grads, exp_avgs, kahans, steps, copies, kept)
    numels = [_numel(w) for w in params]
    first, tiles = _first(numels, tile)
    kinds = _aligned(list(map(_kind, params, grads, exp_avgs, kahans)), columns)
    columns += [numels, list(ordinals), kinds, list(range(len(params))), first]
    rows, memory = _matrix("q", len(params), COLUMNS)
    for at, column in enumerate(columns if params else ()):
        memory[at::COLUMNS] = array("q", column)
    present = [kahan for kahan in kahans if kahan is not None]
    return Laid(rows, sorted(set(kinds)), tiles, copies, params, [*grads, *kept], exp_avgs, present, steps)


class Table:
    """The tensors of an optimizer's steps, gathered and validated anew in each step.

    It keeps numbers from one step to the next, and holds parameters and state, which the optimizer holds as well;
    gradients it holds from :meth:`gather` to :meth:`finish` alone.

    Args:
        tile: elements per tile.

    Attributes:
        size: n, the tensors that take part. This and the others are those of the last gather that did not return
            ``None``.
        tiles: of all tensors.
        kinds: the distinct ones, sorted.
        rows: int64 ``[n, COLUMNS]`` on the CPU; the same memory as long as n stays the same.
        hyper: float64 ``[number of parameter groups, HYPERS]`` on the CPU, likewise.
        scalars: (group, column, tensor) of each ``lr`` and ``rho`` that is a tensor on another device than the CPU;
            ``hyper`` has NaN there.
        device: of all tensors; ``None`` without any.
        gradient_form, fisher, max_grad_norm, skip_nonfinite: what holds for the optimizer as a whole.
        l2, decoupled: some tensor that takes part has a group with such a weight decay.

    Raises:
        ValueError: ``tile`` is less than 1.
    """

    def __init__(self, tile: int) -> None:
        if tile < 1:
            raise ValueError("tile: at least 1 element is needed")
        self._tile = tile
        self.size = 0
        self.tiles = 0
        self.kinds: list[int] = []
        self.rows, self._rows = _matrix("q", 0, COLUMNS)
        self.hyper, self._hyper = _matrix("d", 0, HYPERS)
        self.scalars: list[tuple[int, int, Tensor]] = []
        self.device: torch.device | None = None
        self.gradient_form = False
        self.fisher = "model"
        self.max_grad_norm: float | None = None
        self.skip_nonfinite = False
        self.l2 = False
        self.decoupled = False
        self._layout: tuple[Any, ...] | None = None
        self._columns: list[list[int]] = []
        self._groups: list[_Group] = []
        self._members: _Members | None = None
        self._held: Laid | None = None

    def gather(self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> int | None:
        """Gather the tensors of a step from an optimizer's groups and state, which it does not change.

        What was gathered and not finished before is let go of. Tensors that are not laid out like their moments go
        through copies, which are made here; so do gradients whose conjugation or negation was put off.

        Returns:
            Bits of what differs from the last time that it did not return ``None``: ``POINTERS``, ``VALUES``,
            ``LAYOUT``. ``None``: Python's own checks have to look at this step, and nothing was changed. A value is not
            what is expected, a state is missing, a tensor is a subclass with ways of its own or a mode watches what is
            done to tensors, or the tensors lie on several devices, or on one where they have no addresses.
        """
        self._held = None
        if torch._C._len_torch_dispatch_stack() > 0:
            return None
        changed = None
        with torch._C.DisableTorchFunction():
            try:
                changed = self._gather(param_groups, state)
            except Exception:  # whatever a value cannot be asked, Python's own checks meet too
                changed = None
        if changed is None:  # nor is what has left the optimizer kept alive
            self._groups, self._members = [], None
        return changed

    def finish(self, weights: bool, moments: bool, steps: bool) -> None:
        """Take copies home, raise the version counters of what was written, and let go of all gradients and copies.

        Args:
            weights: the parameters and what is kept of them were written.
            moments: the moments were.
            steps: the counts were.
        """
        held, self._held = self._held, None
        if held is not None:
            with torch._C.DisableTorchFunction():
                held.finish(weights, moments, steps)

    def _gather(self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> int | None:
        if not (isinstance(param_groups, list) and param_groups and isinstance(state, dict)):
            return None
        groups = [self._group(index, group) for index, group in enumerate(param_groups)]
        whole = groups[0].whole
        if any(group.whole != whole for group in groups):
            return None
        gradient_form, fisher, max_grad_norm, skip_nonfinite = _whole(*whole)
        members = self._members
        lists = [group["params"] for group in param_groups]
        params = list(chain.from_iterable(lists))
        settings = [(len(some), group.state_dtype, group.kahan) for some, group in zip(lists, groups, strict=True)]
        grads = [param.grad for param in params]
        if members is None or not members.are(settings, params, grads, state):
            members = _Members(settings, params, grads, state, self._tile)
        present = [grad for grad in grads if grad is not None]
        copies: list[Copy] = []
        kept: list[Tensor] = []
        columns = members.columns(present, copies, kept)
        if columns is None:  # they are the same objects, and differ all the same
            copies, kept = [], []
            members = _Members(settings, params, grads, state, self._tile)
            columns = members.columns(present, copies, kept)
            assert columns is not None

        # Everything is in order: from here on this gather is the last one.
        taking_part = [groups[index] for index in sorted(set(columns[GROUP]))]
        self.gradient_form, self.fisher, self.skip_nonfinite = gradient_form, fisher, skip_nonfinite
        self.max_grad_norm = max_grad_norm
        self.device = members.device
        self.l2 = any(group.hyper[L2] != 0 for group in taking_part)
        self.decoupled = any(group.hyper[WEIGHT_DECAY] != 0 for group in taking_part)
        changed = self._fill_rows(columns) | self._fill_hyper(groups)
        layout = (gradient_form, fisher, max_grad_norm is None, skip_nonfinite, self.device, self.l2, self.decoupled)
        if layout != self._layout:
            self._layout = layout
            changed |= LAYOUT
        self.tiles = members.tiles
        self._members = members
        self._held = Laid(
            self.rows,
            self.kinds,
            self.tiles,
            copies,
            members.params,
            [*present, *kept],
            members.exp_avgs,
            members.kept,
            members.steps,
        )
        return changed

    def _group(self, index: int, given: Any) -> _Group:
        if not (isinstance(given, dict) and isinstance(given["params"], list)):
            raise TypeError
        values = _SETTINGS(given)
        known = self._groups[index] if index < len(self._groups) else None
        if known is None or known.has_tensors or not all(map(is_, values, known.values)):
            return _Group(values)
        return known

    def _fill_rows(self, columns: list[list[int]]) -> int:
        n = len(columns[W])
        changed = 0
        if not self._columns or n != self.size:
            self.rows, self._rows = _matrix("q", n, COLUMNS)
            self._columns = [[]] * COLUMNS
            changed = POINTERS | LAYOUT
        for at, (new, old) in enumerate(zip(columns, self._columns, strict=True)):
            if new is not old and new != old:
                self._rows[at::COLUMNS] = array("q", new)
                changed |= POINTERS if at < NUMEL else POINTERS | LAYOUT
        if changed & LAYOUT:
            self.kinds = sorted(set(columns[KIND]))
        self._columns = columns
        self.size = n
        return changed

    def _fill_hyper(self, groups: list[_Group]) -> int:
        if len(groups) == len(self._groups) and all(map(is_, groups, self._groups)):
            return 0
        self.scalars = [(index, *scalar) for index, group in enumerate(groups) for scalar in group.scalars]
        self._groups = groups
        values = array("d", chain.from_iterable(group.hyper for group in groups))
        changed = 0
        if len(groups) != len(self.hyper):
            self.hyper, self._hyper = _matrix("d", len(groups), HYPERS)
            changed = VALUES | LAYOUT
        if values.tobytes() != self._hyper.tobytes():
            self._hyper[:] = values
            changed |= VALUES
        return changed


class _Group:
    """The settings of one parameter group.

    Attributes:
        values: as the group has them. What has the same objects is the same group, unless some are tensors.
        whole: the values that hold for the optimizer as a whole.
        hyper: a row of ``hyper``.
        scalars: columns and tensors of those that are not known on the CPU.

    Raises:
        TypeError, ValueError: one is not what is expected.
    """

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values
        self.whole = values[len(checks.PER_GROUP) :]
        lr, momentum, rho, weight_decay, decoupled, maximize, state_dtype, kahan = values[: len(checks.PER_GROUP)]
        self.has_tensors = isinstance(lr, Tensor) or isinstance(rho, Tensor)
        self.scalars: list[tuple[int, Tensor]] = []
        rate, damping = self._scalar(LR, lr, 0.0), self._scalar(RHO, rho, checks.SMALLEST_RHO)
        beta, decay = _within(_number(momentum), 0.0, 1.0), _within(_number(weight_decay), 0.0, inf)
        sign = -1.0 if _flag(maximize) else 1.0
        l2 = 0.0 if _flag(decoupled) else decay
        self.hyper = [rate, beta, damping, decay if decoupled else 0.0, l2, sign]
        self.hyper += [beta, (1.0 - beta) * sign, (1.0 - beta) * l2]
        self.kahan = kahan is None or _flag(kahan)
        if not (state_dtype is None or state_dtype in (torch.float32, torch.bfloat16)):
            raise ValueError
        self.state_dtype = state_dtype

    def _scalar(self, column: int, value: Any, low: float) -> float:
        if not isinstance(value, Tensor):
            return _within(_number(value), low, inf)
        if not _is_number(value):
            raise ValueError
        if value.device.type == "cpu":
            return _within(float(value.item()), low, inf)
        if not _has_addresses(value):
            raise ValueError
        self.scalars.append((column, value))
        return nan


class _Members:
    """The tensors that take part in a step, checked, and what to know of them to see whether they are still the same.

    Args:
        settings: of each group: how many parameters it has, ``state_dtype``, and whether lost bits are kept.
        params, grads: all parameters, and their gradients or ``None``.
        state: the optimizer's.
        tile: elements per tile.

    Raises:
        TypeError, ValueError: one is not what is expected.
    """

    def __init__(
        self,
        settings: list[tuple[int, torch.dtype | None, bool]],
        params: list[Tensor],
        grads: list[Tensor | None],
        state: dict[Tensor, Any],
        tile: int,
    ) -> None:
        self._settings = settings
        self._all = params
        self._present = [grad is not None for grad in grads]
        self._inference = torch.is_inference_mode_enabled()
        self._keys, self._entries = list(state), list(state.values())
        group_of = [index for index, (size, _, _) in enumerate(settings) for _ in range(size)]
        self.params: list[Tensor] = []
        self.exp_avgs: list[Tensor] = []
        self.kahans: list[Tensor | None] = []
        self.steps: list[Tensor] = []
        self._known: list[dict[str, Any]] = []
        self._fixed: list[list[int]] = [[], [], [], []]  # the columns that are no addresses, but for the first tile
        self.device: torch.device | None = None
        for ordinal, (w, g, group) in enumerate(zip(params, grads, group_of, strict=True)):
            if not (isinstance(w, Tensor) and (memory.plain(w) or (g is None and not w.requires_grad))):
                raise TypeError  # frozen ones may be of any kind
            if g is not None:
                if self.device is None:
                    self.device = w.device
                self._add(w, g, state[w], ordinal, group)
        self._at = [i for i, kahan in enumerate(self.kahans) if kahan is not None]
        self.kept = [kahan for kahan in self.kahans if kahan is not None]
        self._keepers = [self._known[i] for i in self._at]
        first, self.tiles = _first(self._fixed[0], tile)
        self._fixed.append(first)
        self._addresses: list[int] | None = None
        self._columns: list[list[int]] = []
        self._copied: list[int] = []
        self._unchanged: Callable[..., bool] | None = None
        self._written: memory.Written | None = None  # at these addresses

    def _add(self, w: Tensor, g: Tensor, known: Any, ordinal: int, group: int) -> None:
        _, state_dtype, keeps = self._settings[group]
        if not isinstance(known, dict):
            raise TypeError
        m, step = known["exp_avg"], known["step"]
        keeps = keeps and w.dtype in checks.NARROW_DTYPES
        kahan = known["kahan"] if keeps else None
        tensors = [w, g, m, step, kahan] if keeps else [w, g, m, step]
        if not all(isinstance(x, Tensor) and memory.plain(x) and _has_addresses(x) for x in tensors):
            raise TypeError
        natural = torch.promote_types(w.dtype, torch.float32)
        fits = (
            all(x.device == self.device for x in tensors)
            and w.dtype in TYPES
            and (g.dtype == w.dtype or (g.dtype == torch.float32 and w.dtype in checks.NARROW_DTYPES))
            and (state_dtype is None or natural == torch.float32)
            and m.dtype == (state_dtype or natural)
            and g.shape == m.shape == w.shape
            and (kahan is None or (kahan.dtype == w.dtype and kahan.shape == w.shape))
            and step.dtype == torch.int64
            and step.numel() == 1
            and (self._inference or not any(x.is_inference() for x in tensors if x is not g))
        )
        if not fits:
            raise ValueError
        self.params.append(w)
        self.exp_avgs.append(m)
        self.kahans.append(kahan)
        self.steps.append(step)
        self._known.append(known)
        for column, value in zip(self._fixed, (_numel(w), ordinal, _kind(w, g, m, kahan), group), strict=True):
            column.append(value)

    def are(
        self,
        settings: list[tuple[int, torch.dtype | None, bool]],
        params: list[Tensor],
        grads: list[Tensor | None],
        state: dict[Tensor, Any],
    ) -> bool:
        """Whether these are the same objects in the same places, gradients aside, and as many gradients."""
        return (
            settings == self._settings
            and all(map(is_, params, self._all))
            and [grad is not None for grad in grads] == self._present
            and len(state) == len(self._keys)
            and all(map(is_, state, self._keys))
            and all(map(is_, state.values(), self._entries))
            and all(map(is_, map(itemgetter("exp_avg"), self._known), self.exp_avgs))
            and all(map(is_, map(itemgetter("step"), self._known), self.steps))
            and all(map(is_, map(itemgetter("kahan"), self._keepers), self.kept))
            and torch.is_inference_mode_enabled() == self._inference
        )

    def columns(self, grads: list[Tensor], copies: list[Copy], kept: list[Tensor]) -> list[list[int]] | None:
        """The columns of ``rows``; ``None`` if a tensor is not what it was when it was checked, but for its place.

        Args:
            grads: those that there are.
            copies: gets the copies of what is written that were made.
            kept: gets the copies of what is only read.

        Raises:
            ValueError: tensors that a step writes share memory: Python code handles these one after the other.
        """
        tensors = [*self.params, *grads, *self.exp_avgs, *self.kept, *self.steps]
        # First, as it refuses what has no memory; the check below ends the process where there are no strides.
        addresses = list(map(_address, tensors))
        if addresses != self._addresses:
            self._must_not_share(addresses, grads)
        if self._addresses is None:
            columns, self._copied = _columns(self.params, grads, self.exp_avgs, self.kahans, self.steps, copies, kept)
            self._unchanged = _watch(tensors)
        elif self._unchanged is None or not self._unchanged(*tensors):
            return None
        elif addresses == self._addresses and not self._copied:
            return self._columns
        else:
            low = addresses != self._addresses and min(addresses) < _LOW
            if low and not all(_has_addresses(x) for x, at in zip(tensors, addresses, strict=True) if at < _LOW):
                return None
            n = len(grads)
            columns = [addresses[:n], addresses[n : 2 * n], addresses[2 * n : 3 * n], [0] * n, addresses[-n:]]
            for at, address in zip(self._at, addresses[3 * n :], strict=False):
                columns[KAHAN][at] = address
            for i in self._copied:
                placed = _placed(self.params[i], grads[i], self.exp_avgs[i], self.kahans[i], copies, kept)
                for column, address in zip(columns, placed, strict=False):
                    column[i] = address
        self._addresses = addresses
        numels, ordinals, kinds, groups, first = self._fixed
        self._columns = [*columns, numels, ordinals, _aligned(kinds, columns), groups, first]
        return self._columns

    def _must_not_share(self, addresses: list[int], grads: list[Tensor]) -> None:
        n = len(grads)
        moved = self._addresses is None or (addresses[:n], addresses[2 * n :]) != (
            self._addresses[:n],
            self._addresses[2 * n :],
        )
        if moved or self._written is None:
            self._written = memory.Written(self.params, self.exp_avgs, self.kahans, self.steps)
            if any(True for _ in self._written.pairs()):
                raise ValueError
        if any(self._written.has(g) and not self._written.is_param(i, g) for i, g in enumerate(grads)):
            raise ValueError


def _watch(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """A function of as many tensors: whether type, dtype, device, shape, strides and dispatch are those of these.

    Asking for them one by one would take most of the time of a step. It is PyTorch's own, for compiled code, and may
    not be there: then (``None``) every tensor is checked in each step.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: list[Any] = [list(x.shape) for x in tensors]  # no dimension is dynamic
        strides: list[Any] = [list(x.stride()) for x in tensors]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        check: Callable[..., bool] = guards.check
    except Exception:
        return None
    return check


def _is_number(x: Tensor) -> bool:
    """Whether it is one real number, and nothing else."""
    return memory.plain(x) and x.numel() == 1 and not x.is_complex() and x.dtype != torch.bool


def readable(value: Any) -> bool:
    """Whether a kernel can be given it beside the tables: nothing, a number, or a tensor that is one."""
    if value is None or isinstance(value, (float, int)):
        return not isinstance(value, bool)
    return isinstance(value, Tensor) and _is_number(value) and _has_addresses(value)


def _has_addresses(x: Tensor) -> bool:
    """Whether it is dense, has memory, and lies on a device where a pointer says where."""
    placed = x.layout == torch.strided and x.device.type not in memory.WITHOUT_ADDRESSES and torch._C._has_storage(x)
    return placed and (x.numel() == 0 or x.untyped_storage().data_ptr() != 0)


def _numel(w: Tensor) -> int:
    return 2 * w.numel() if w.is_complex() else w.numel()


def _first(numels: list[int], tile: int) -> tuple[list[int], int]:
    """The first tile of each tensor, and the number of all tiles."""
    first, tiles = [], 0
    for numel in numels:
        first.append(tiles)
        tiles += max(1, -(-numel // tile))
    return first, tiles


def _kind(w: Tensor, g: Tensor, m: Tensor, kahan: Tensor | None) -> int:
    """The kind, as if all addresses were multiples of 16."""
    kind = TYPES[w.dtype]
    kind |= WIDE if w.dtype in checks.NARROW_DTYPES and g.dtype == torch.float32 else 0
    kind |= ROUNDS if m.dtype == torch.bfloat16 else 0
    return kind | (KEEPS if kahan is not None else 0)


def _aligned(kinds: list[int], columns: list[list[int]]) -> list[int]:
    if not reduce(or_, chain(*columns[:STEP]), 0) & 15:
        return kinds
    return [
        kind | UNALIGNED if (w | g | m | kahan) & 15 else kind
        for kind, w, g, m, kahan in zip(kinds, *columns[:STEP], strict=True)
    ]


def _columns(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    kahans: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    copies: list[Copy],
    kept: list[Tensor],
) -> tuple[list[list[int]], list[int]]:
    """The columns of addresses, and the indices of the tensors that go through copies."""
    columns: list[list[int]] = [[], [], [], [], list(map(_address, steps))]
    copied = []
    for i, tensors in enumerate(zip(params, grads, exp_avgs, kahans, strict=True)):
        before = len(copies) + len(kept)
        for column, address in zip(columns, _placed(*tensors, copies, kept), strict=False):
            column.append(address)
        if len(copies) + len(kept) > before:
            copied.append(i)
    return columns, copied


def _placed(
    w: Tensor, g: Tensor, m: Tensor, kahan: Tensor | None, copies: list[Copy], kept: list[Tensor]
) -> tuple[int, int, int, int]:
    """Addresses of one tensor's w, g, m and kahan in one order of elements: m's, or that of its copy."""
    others = [x for x in (w, g, kahan) if x is not None]
    if m.is_contiguous():
        flat = all(x.is_contiguous() for x in others)
    else:
        flat = _dense(m) and all(_in_order(x, m.stride()) for x in others)
    if flat and _as_stored(w) and _as_stored(g) and _as_stored(m):
        return _address(w), _address(g), _address(m), 0 if kahan is None else _address(kahan)
    order = m.stride() if _dense(m) else _contiguous(m.shape)

    def copy_of(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, order, dtype=x.dtype, device=x.device).copy_(x.detach())

    def ready(x: Tensor) -> bool:
        return _in_order(x, order) and _as_stored(x) and _dense(x)

    def bump_versions(x: Tensor, moment: bool) -> int:
        if ready(x):
            return _address(x)
        copies.append(Copy(x, copy_of(x), moment))
        return _address(copies[-1].copy)

    at_w, at_m = bump_versions(w, False), bump_versions(m, True)
    at_kahan = 0 if kahan is None else bump_versions(kahan, False)
    if ready(g):
        return at_w, _address(g), at_m, at_kahan
    kept.append(copy_of(g))
    return at_w, _address(kept[-1]), at_m, at_kahan


def _as_stored(x: Tensor) -> bool:
    return not (x.is_conj() or x.is_neg())


def _in_order(x: Tensor, strides: Sequence[int]) -> bool:
    """Whether elements lie as these strides say; dimensions of one element have no say."""
    return all(size < 2 or a == b for size, a, b in zip(x.shape, x.stride(), strides, strict=True))


def _dense(x: Tensor) -> bool:
    """Whether elements fill a stretch of memory, in whatever order of dimensions."""
    if x.is_contiguous():
        return True
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride != reach:
            return False
        reach *= size
    return True


def _contiguous(shape: Sequence[int]) -> list[int]:
    """Strides."""
    strides: list[int] = []
    reach = 1
    for size in reversed(shape):
        strides.insert(0, reach)
        reach *= max(size, 1)
    return strides


def _matrix(code: str, rows: int, columns: int) -> tuple[Tensor, array[Any]]:
    """A tensor of zeros on the CPU, int64 (``"q"``) or float64 (``"d"``), and the memory that it shows."""
    memory = array(code, bytes(8 * rows * columns))
    dtype = {"q": torch.int64, "d": torch.float64}[code]
    with torch.inference_mode(False):  # or it could not be written to outside
        shown = torch.frombuffer(memory, dtype=dtype) if rows else torch.empty(0, dtype=dtype, device="cpu")
    return shown.view(rows, columns), memory


# Values are read like this: anything that Python's own checks should look at raises.


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise TypeError
    return float(value)


def _within(value: float, low: float, below: float) -> float:
    if not low <= value < below:
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _whole(
    numerator: Any, fisher: Any, max_grad_norm: Any, skip_nonfinite: Any
) -> tuple[bool, str, float | None, bool]:
    if not (isinstance(numerator, str) and isinstance(fisher, str)):
        raise TypeError
    if numerator not in checks.NUMERATORS or fisher not in checks.FISHERS:
        raise ValueError
    limit = None if max_grad_norm is None else _number(max_grad_norm)
    if limit is not None and not limit > 0:
        raise ValueError
    return numerator == "gradient", fisher, limit, _flag(skip_nonfinite)


_SETTINGS: Callable[[Mapping[str, Any]], tuple[Any, ...]] = itemgetter(*checks.PER_GROUP, *checks.WHOLE)
