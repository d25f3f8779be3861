"""From sums to totals: over the Fisher blocks of each device's share of a step, over devices, and over ranks.

The curvature is one number per Fisher block, a sum over all of its elements. Each rank sums over the elements that it
holds. All-reduces over the process groups along which elements are sharded compute the totals, from which each rank
computes the same coefficients and updates what it holds. Nothing else is sent, and replicas send nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sofim_fused import checks
from sofim_fused.backends import (
    FISHER,
    Passes,
    ScaledSums,
    Squares,
    StepTensors,
    Sums,
    fisher_blocks,
    on_device_of,
    sum_of,
)
from sofim_fused.dtensor import Groups, groups_with
from sofim_fused.step.hyperparameters import Hyperparameters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(eq=False)
class DeviceShare:
    """A device's share of a step: its tensors, the backend that works on them, and their hyperparameters.

    Attributes:
        tensors: those of this step.
        passes: the backend's.
        hyper: the hyperparameters.
        rank_sums: adds up sums over ranks, if parameters are sharded; then there is only one share.
        pairs: tensors that share elements, as :func:`sofim_fused.backends.apart` found them.
        square_sums: adds up squares over ranks, if parameters are sharded and the diagonals adapt.
    """

    tensors: StepTensors
    passes: Passes
    hyper: Hyperparameters
    rank_sums: RankSums | None = None
    pairs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    square_sums: SquareSums | None = None


def totals(
    shares: Sequence[DeviceShare], sums: Sequence[Sums], guarded: bool, found_inf: Tensor | float | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor | float | None]:
    """The totals of sums per Fisher block, over all devices and ranks.

    Args:
        shares: of the step.
        sums: each share's, from its first pass.
        guarded: which kind of step it is.
        found_inf: as :func:`sofim_fused.step.schedule.guarded` takes it.

    Returns:
        For each share, the blocks ``[k, B]`` and the sum of all ``gg``, 0-dimensional; and ``found_inf``, not 0 if that
        of any rank is not.
    """
    if shares[0].rank_sums is not None:
        blocks, square, found_inf = _over_ranks(shares[0], shares[0].rank_sums, sums[0], guarded, found_inf)
        return [blocks], [square], found_inf
    folded = [
        share.passes.fold(share.tensors.steps, share.hyper.settings, theirs, guarded)
        for share, theirs in zip(shares, sums, strict=True)
    ]
    blocks_here, squares = [blocks.select(0, 0) for blocks, _ in folded], [square.select(0, 0) for _, square in folded]
    if len(shares) > 1:
        if shares[0].hyper.fisher != "parameter":
            blocks_here = _on_each(shares, blocks_here)
        squares = _on_each(shares, squares)
    return blocks_here, squares, found_inf


def square_of(
    shares: Sequence[DeviceShare], squares: Sequence[Squares], found_inf: Tensor | float | None
) -> tuple[Tensor, Tensor | float | None]:
    """The sum of the squares of all gradients, 0-dimensional on the first device, over all devices and ranks.

    Args:
        shares: of the step.
        squares: each share's, from its own tensors.
        found_inf: as :func:`sofim_fused.step.schedule.guarded` takes it.

    Returns:
        The sum; and ``found_inf``, not 0 if that of any rank is not.
    """
    rank_sums = shares[0].rank_sums
    if rank_sums is not None:
        total = squares[0].total
        whole = total.new_zeros(rank_sums.classes, 2)
        classes = rank_sums.class_of(tuple(shares[0].tensors.ordinals))
        if classes is None:
            whole[0, 0] = sum_of(total)
        else:
            whole[:, 0].index_add_(0, classes, total)
        if found_inf is not None:
            whole[:, 1] = on_device_of(total, found_inf) != 0
        nothing, fisher = whole.new_zeros(rank_sums.classes, 0), shares[0].hyper.fisher
        _, extra = rank_sums.total(nothing, whole, fisher, found_inf is not None)
        return extra[0], None if found_inf is None else extra[1]
    total = sum_of(squares[0].total)
    for theirs in squares[1:]:
        total = total + sum_of(theirs.total).to(total.device)
    return total, found_inf


def scaled_totals(shares: Sequence[DeviceShare], sums: Sequence[ScaledSums]) -> list[Tensor]:
    """For each share the totals per Fisher block, ``[4, B]``, over all devices and ranks, with an adaptive diagonal."""
    share, rank_sums = shares[0], shares[0].rank_sums
    if rank_sums is not None:
        classes = rank_sums.class_of(tuple(share.tensors.ordinals)), rank_sums.classes
        parts = share.passes.fold_scaled(share.tensors.steps, share.hyper.settings, sums[0], *classes)
        present, nothing = tuple(share.tensors.ordinals), parts.new_zeros(len(parts), 0)
        total, _ = _blocks_over_ranks(rank_sums, share.hyper.fisher, present, parts, nothing)
        return [total]
    blocks = [
        share.passes.fold_scaled(share.tensors.steps, share.hyper.settings, theirs).select(0, 0)
        for share, theirs in zip(shares, sums, strict=True)
    ]
    return _on_each(shares, blocks) if len(shares) > 1 and share.hyper.fisher != "parameter" else blocks


def _over_ranks(
    share: DeviceShare, rank_sums: RankSums, sums: Sums, guarded: bool, found_inf: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor | float | None]:
    present = tuple(share.tensors.ordinals)
    parts, squares = share.passes.fold(
        share.tensors.steps, share.hyper.settings, sums, guarded, rank_sums.class_of(present), rank_sums.classes
    )
    return over_ranks(rank_sums, share.hyper.fisher, present, parts, squares, guarded, found_inf)


def over_ranks(
    rank_sums: RankSums,
    fisher: str,
    present: tuple[int, ...],
    parts: Tensor,
    squares: Tensor,
    guarded: bool,
    found_inf: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor | float | None]:
    """The totals of a step's Fisher blocks over all ranks.

    Args:
        rank_sums: adds them up.
        fisher: as the optimizer's.
        present: ordinals of the parameters that have gradients on this rank.
        parts: the blocks of this rank, ``[classes, k, B]``.
        squares: the sums of all ``gg``, ``[classes]``, of a guarded step.
        guarded: which kind of step it is.
        found_inf: as :func:`sofim_fused.step.schedule.guarded` takes it.

    Returns:
        The blocks ``[k, B]``; the sum of all ``gg``, 0-dimensional (of a plain step: ``squares``); and ``found_inf``,
        not 0 if that of any rank is not.
    """
    whole = parts.new_zeros(len(parts), 2 if guarded else 0)
    if guarded:
        whole[:, 0] = squares
        if found_inf is not None:
            whole[:, 1] = on_device_of(squares, found_inf) != 0
    total, extra = _blocks_over_ranks(rank_sums, fisher, present, parts, whole, found_inf is not None)
    return total, extra[0] if guarded else squares, None if found_inf is None else extra[1]


def _blocks_over_ranks(
    rank_sums: RankSums, fisher: str, present: tuple[int, ...], parts: Tensor, whole: Tensor, told: bool = False
) -> tuple[Tensor, Tensor]:
    """:meth:`RankSums.total` of blocks, ``[classes, k, B]``, and of sums over everything."""
    places = rank_sums.places(present) if fisher == "parameter" else None
    if places is not None:  # other ranks may have gradients of other parameters
        parts = parts.new_zeros(*parts.shape[:-1], rank_sums.count).index_copy_(-1, places, parts)
    total, extra = rank_sums.total(parts.flatten(1), whole, fisher, told)
    total = total.view(parts.shape[1:])
    return total if places is None else total.index_select(-1, places), extra


def _on_each(shares: Sequence[DeviceShare], parts: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each share's part, on each share's device."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return [total.to(share.tensors.device) for share in shares]


class RankSums:
    """The ranks over which an optimizer's parameters are sharded, and the totals of their sums.

    Parameters that are sharded over the same process groups are a class: their sums are sent together. Classes are in
    the order in which parameters first have them, which is the same on all ranks of a mesh.

    Args:
        spread: :func:`sofim_fused.dtensor.groups_of` each parameter, by ordinal.
        device: the device of the sums.
        holders: the ranks that hold other parameters. They may include all ranks of a group of ``spread``: these have
            the same totals at that point, and only the first of them contributes its own.
        flattened: whether FSDP1 shards some of the parameters.

    Attributes:
        count: the number of parameters.
        classes: the number of classes.
        class_of_each: the class of each parameter, by ordinal.
        compared: what :meth:`compare` has compared: numerator, fisher, number of groups, guarded.
    """

    def __init__(
        self, spread: Sequence[Groups], device: torch.device, holders: ProcessGroup | None, flattened: bool = False
    ) -> None:
        classes = list(dict.fromkeys(spread)) or [()]
        self.device = device
        self.flattened = flattened
        self.count = len(spread)
        self.spread = list(spread)
        self.classes = len(classes)
        self.class_of_each = [classes.index(groups) for groups in spread]
        self._routes = [
            (group, [number for number, theirs in enumerate(classes) if group in theirs])
            for group in dict.fromkeys(group for theirs in classes for group in theirs)
        ]
        self._holders = holders
        self._hands_on = holders is None or all(_first_among(holders, group) for group, _ in self._routes)
        self.compared: set[tuple[str, str, int, bool]] = set()
        self.class_of = functools.lru_cache(8)(self._class_of_present)
        self.places = functools.lru_cache(8)(self._places)

    def _class_of_present(self, ordinals: tuple[int, ...]) -> Tensor | None:
        """The class of each of these parameters, int64 on the device; ``None``: there is one class."""
        if self.classes == 1:
            return None
        return torch.tensor([self.class_of_each[i] for i in ordinals], dtype=torch.int64, device=self.device)

    def _places(self, ordinals: tuple[int, ...]) -> Tensor | None:
        """Ordinals as indices; ``None``: these are all parameters."""
        if ordinals == tuple(range(self.count)):
            return None
        return torch.tensor(ordinals, dtype=torch.int64, device=self.device)

    def total(self, blocks: Tensor, whole: Tensor, fisher: str, told: bool = False) -> tuple[Tensor, Tensor]:
        """Totals over classes and ranks: an all-reduce for each mesh axis, and one for the holders of other parameters.

        Args:
            blocks: ``[classes, m]``, sums per Fisher block. If each parameter is a block, no holder shares it.
            whole: ``[classes, l]``, sums over everything.
            fisher: as the optimizer's.
            told: the last of these tells what this rank alone may know, not 0 for yes.

        Returns:
            ``[m]`` and ``[l]``, the same on all ranks; what a rank was told is not 0 if any rank was told it.
        """
        from torch import distributed

        message = torch.cat((blocks, whole), 1)
        for group, members in self._routes:
            if told and len(self._routes) > 1 and self.classes > 1:
                # Along an axis over which only some classes are sharded it has to go with these.
                message[:, -1] = message[:, -1].sum()
            part = message[members] if len(members) < self.classes else message
            distributed.all_reduce(part, group=group)
            if part is not message:
                message[members] = part
        total = message.sum(0)
        start = blocks.shape[1] if fisher == "parameter" else 0
        if self._holders is not None and start < len(total):
            if not self._hands_on:
                total[start:].zero_()
            distributed.all_reduce(total[start:], group=self._holders)
        return total[: blocks.shape[1]], total[blocks.shape[1] :]

    def compare(self, numerator: str, fisher: str, groups: int, guarded: bool) -> None:
        """Check, the first time, that all ranks have sums of the same kind to add up.

        All-reduces of different sizes silently give wrong sums, or never return.

        Args:
            numerator: as the optimizer's.
            fisher: as the optimizer's.
            groups: how many parameter groups there are.
            guarded: which kind of step it is.

        Raises:
            RuntimeError: they do not.
        """
        if (numerator, fisher, groups, guarded) in self.compared:
            return
        index = FISHER.index(fisher)
        blocks = fisher_blocks(index, groups, self.count)
        kind = [checks.NUMERATORS.index(numerator), index, int(guarded)]
        for group, members in self._routes:
            spread = sum(number in members for number in self.class_of_each)
            self._compare(group, [len(members), spread, blocks, *kind])
        if self._holders is not None:
            self._compare(self._holders, [1, 0, 0 if fisher == "parameter" else blocks, *kind])
        self.compared.add((numerator, fisher, groups, guarded))

    def _compare(self, group: ProcessGroup, numbers: list[int]) -> None:
        from torch import distributed

        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        all_of_them = [torch.empty_like(mine) for _ in range(group.size())]
        distributed.all_gather(all_of_them, mine, group=group)
        found = torch.stack(all_of_them).tolist()
        if any(theirs != found[0] for theirs in found):
            words = {"numerator": checks.NUMERATORS, "fisher": FISHER}
            names = ("ways to be sharded", "sharded parameters", "Fisher blocks", "numerator", "fisher", "guarded")
            differ = [
                f"{name}: {', '.join(str(words[name][value]) if name in words else str(value) for value in values)}"
                for name, values in zip(names, zip(*found, strict=True), strict=True)
                if len(set(values)) > 1
            ]
            raise RuntimeError(
                f"the ranks of a process group have different sums to add up ({'; '.join(differ)}): give the optimizers"
                " of all ranks the same options and parameter groups, and the same sharded parameters in the same order"
            )


class SquareSums:
    """Sums of squares over rows, columns and tensors of which other ranks hold a part.

    There is a message per process group, of the same length in every step: a parameter without a gradient on this rank
    has zeros in it, because other ranks may have one.

    Args:
        params: all parameters, by ordinal; ``DTensor``s or plain tensors.
        spread: :func:`sofim_fused.dtensor.groups_of` each of them.
        sizes: how many rows and columns this rank has of each; 0 where there is no ``row_var`` or ``col_var``.
        device: of the sums.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        spread: Sequence[Groups],
        sizes: Sequence[tuple[int, int]],
        device: torch.device,
    ) -> None:
        n = len(params)
        self._count = n
        self._rows, rows_end = _offsets(2 * n, [rows for rows, _ in sizes])
        self._cols, self._length = _offsets(rows_end, [cols for _, cols in sizes])
        self._sizes = list(sizes)
        parts: dict[ProcessGroup, list[tuple[int, int]]] = {}  # of the message: begin and size
        for i, (param, groups) in enumerate(zip(params, spread, strict=True)):
            across = groups_with(param, first=False)
            for group in groups:
                mine = parts.setdefault(group, [])
                mine.append((i, 1))
                if group in across:
                    mine += [(n + i, 1), (self._rows[i], sizes[i][0])]
                else:
                    mine.append((self._cols[i], sizes[i][1]))
        self._routes = [
            (group, torch.cat([torch.arange(begin, begin + size, device=device) for begin, size in mine]))
            for group, mine in parts.items()
        ]

    def total(self, tensors: StepTensors, squares: Squares) -> Squares:
        """This rank's rows and columns of the sums over all ranks."""
        message = squares.total.new_zeros(self._length)
        present = tensors.ordinals
        given = (
            squares.rows.split([self._sizes[i][0] for i in present]),
            squares.cols.split([self._sizes[i][1] for i in present]),
        )
        for at, i in enumerate(present):
            message[i] = squares.total[at]
            col_var = tensors.variances[at].col_var
            if col_var is not None:
                message[self._count + i] = col_var.sum(dtype=message.dtype)
            for offset, parts in zip((self._rows[i], self._cols[i]), given, strict=True):
                message.narrow(0, offset, len(parts[at])).copy_(parts[at])
        self._all_reduce(message)
        nothing = message.new_empty(0)
        return Squares(
            total=torch.cat([nothing, *(message.narrow(0, i, 1) for i in present)]),
            rows=torch.cat([nothing, *(message.narrow(0, self._rows[i], self._sizes[i][0]) for i in present)]),
            cols=torch.cat([nothing, *(message.narrow(0, self._cols[i], self._sizes[i][1]) for i in present)]),
            col_var=torch.cat([nothing, *(message.narrow(0, self._count + i, 1) for i in present)]),
        )

    def _all_reduce(self, message: Tensor) -> None:
        from torch import distributed

        for group, index in self._routes:
            part = message.index_select(0, index)
            distributed.all_reduce(part, group=group)
            message.index_copy_(0, index, part)


def _offsets(start: int, sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where consecutive parts of these sizes begin, and where the last one ends."""
    *begins, end = itertools.accumulate(sizes, initial=start)
    return begins, end


def _first_among(holders: ProcessGroup, group: ProcessGroup) -> bool:
    """Whether this rank contributes a group's total to ``holders``: it is the group's first, or only, rank in them."""
    from torch import distributed

    ranks = distributed.get_process_group_ranks(group)
    among = set(distributed.get_process_group_ranks(holders)).intersection(ranks)
    return len(among) < 2 or distributed.get_rank() == ranks[0]
