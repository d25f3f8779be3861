"""Where a step is computed: the backend of each device, the tensors of each device, and what other ranks hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from sofim_fused import backends, checks
from sofim_fused.backends import Passes
from sofim_fused.dtensor import bump_versions
from sofim_fused.sharding import Sharding, device_of, find_sharding, is_flattened, placement
from sofim_fused.step import gather
from sofim_fused.step.hyperparameters import Hyperparameters
from sofim_fused.step.reduce import DeviceShare, RankSums, SquareSums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = Sequence[Mapping[str, Any]]


class Plan:
    """What an optimizer has found out about its parameters, and finds out again if they change.

    The optimizer is an argument wherever its groups and state are needed. A reference here would make a cycle, and keep
    it alive until the garbage collector runs.

    Args:
        backend: as :func:`sofim_fused.backends.requested` returns it.
        shard_group: as the constructor's.
    """

    def __init__(self, backend: str, shard_group: ProcessGroup | None) -> None:
        self._backend = backend
        self._shard_group = shard_group
        self._passes: dict[tuple[torch.device, bool, bool], Passes] = {}
        self._hyper: dict[torch.device, Hyperparameters] = {}
        self._rank_sums: RankSums | Literal[False] | None = None  # None: not found out yet
        self._rank_sums_before: tuple[Sharding, RankSums] | None = None
        self._placed: list[tuple[object, ...]] | None = None
        self._square_sums: tuple[RankSums, list[str], SquareSums | None] | None = None

    def forget(self) -> None:
        """Forget everything, except what ranks have compared: it will be found out again."""
        self._passes.clear()
        self._hyper.clear()
        self._rank_sums = self._placed = None

    # Backends and devices

    def passes_for(self, device: torch.device, blockwise: bool = False, blockwise_variance: bool = False) -> Passes:
        """The backend's passes for a device.

        ``blockwise``: they have to take moments in 8 bits; ``blockwise_variance``: and second moments.

        Raises:
            RuntimeError: the requested backend cannot run on it.
        """
        key = device, blockwise, blockwise_variance
        found = self._passes.get(key)
        if found is None:
            found = self._passes[key] = backends.choose(self._backend, *key)
        return found

    def first_device(self, groups: Groups) -> torch.device:
        """The device of the first parameter that takes part in steps: frozen ones may be on any other."""
        params = params_of(groups)
        first = next((param.device for param in params if param.requires_grad), None)
        if first is None and params:
            first = params[0].device
        if first is None:  # all parameters are on other ranks
            assert self._shard_group is not None
            first = device_of(self._shard_group)
        return first

    def refresh_placement(self, groups: Groups) -> bool:
        """If any parameter was replaced or moved, forget how parameters are sharded and on which devices they are.

        For example, users put ``DTensor``s into the groups after ``fully_shard()``. A native step needs no such check:
        it returns to Python if anything has changed.

        Returns:
            Whether there was anything to forget.
        """
        placed = [placement(param) for param in params_of(groups)]
        before, self._placed = self._placed, placed
        if placed == before:
            return False
        self._rank_sums = None
        return before is not None

    # Ranks

    def rank_sums(self, optimizer: Optimizer) -> RankSums | None:
        """The ranks over which parameters are sharded, to add up sums over them; ``None``: this rank has all of them.

        Raises:
            ValueError: sums over these ranks would be wrong; the message says what to pass.
        """
        if self._rank_sums is None:
            groups = optimizer.param_groups
            params = params_of(groups)
            sharding = find_sharding(optimizer, params, groups[0]["fisher"], self._shard_group)
            if sharding:
                checks.one_device(params)
                made = RankSums(sharding.along, self.first_device(groups), sharding.holders, sharding.flattened)
                before = self._rank_sums_before
                if before is not None and before[0] == sharding and before[1].device == made.device:
                    made = before[1]  # already compared: another comparison on this rank alone would wait for others
                self._rank_sums, self._rank_sums_before = made, (sharding, made)
            elif torch.compiler.is_compiling():  # some versions of torch cannot trace a step that sets an attribute
                return None
            else:
                self._rank_sums = False
        return self._rank_sums or None

    def forget_ranks(self) -> None:
        """Forget how parameters are sharded: it will be found out again."""
        self._rank_sums = None

    def compare_ranks(self, optimizer: Optimizer, guarded: bool, groups: Groups | None = None) -> None:
        """Check that all ranks are about to take the same kind of step.

        Args:
            optimizer: its parameters are sharded.
            guarded: which kind of step it is.
            groups: the settings of the step; ``None``: the optimizer's groups.

        Raises:
            RuntimeError: they are not.
        """
        sums = self.rank_sums(optimizer)
        if sums is not None:
            groups = optimizer.param_groups if groups is None else groups
            sums.compare(groups[0]["numerator"], groups[0]["fisher"], len(groups), guarded)

    # The tensors of a step

    def shares(self, optimizer: Optimizer, guarded: bool = False) -> list[DeviceShare]:
        """Check everything, create missing state, and return the tensors of a step by device.

        Args:
            optimizer: its groups, gradients and state are read.
            guarded: which kind of step it is.

        Raises:
            TypeError, ValueError: a hyperparameter, a gradient or a state is refused; nothing was changed.
            RuntimeError: other ranks are about to take another kind of step.
        """
        groups, state = optimizer.param_groups, optimizer.state
        for index, group in enumerate(groups):
            checks.group(group, index)
        checks.agreement(groups)
        entries = gather.with_gradients(groups)
        for entry in entries:
            gather.check_state(entry, groups[entry.group], state)
            self.passes_for(entry.param.device, *gather.codes_of(entry.param, groups[entry.group]))
        self.compare_ranks(optimizer, guarded)
        before = [gather.ensure_state(entry, groups[entry.group], state) for entry in entries]
        bump_versions(entry.param for entry in entries)
        try:
            return self.shares_of(optimizer, entries)
        except ValueError:  # tensors share memory in a way that is refused: restore the state
            for entry, known in zip(entries, before, strict=True):
                if known:
                    state[entry.param] = known
                elif known is not None:
                    del state[entry.param]
            raise

    def shares_of(
        self, optimizer: Optimizer, entries: list[gather.Entry], groups: Groups | None = None
    ) -> list[DeviceShare]:
        """Like :meth:`shares`, for chosen parameters that have state, and without checks.

        Args:
            optimizer: its state is read.
            entries: the parameters and their gradients.
            groups: the settings of the step; ``None``: the optimizer's groups.

        Raises:
            ValueError: tensors share memory in a way that is refused; nothing was changed.
        """
        groups = optimizer.param_groups if groups is None else groups
        rank_sums = self.rank_sums(optimizer)
        if rank_sums is not None:  # even if it is empty: other ranks wait for this one
            return [self._share(optimizer, groups, self.first_device(groups), entries, rank_sums)]
        return [self._share(optimizer, groups, device, mine, None) for device, mine in gather.by_device(entries)]

    def _share(
        self,
        optimizer: Optimizer,
        groups: Groups,
        device: torch.device,
        entries: list[gather.Entry],
        rank_sums: RankSums | None,
    ) -> DeviceShare:
        sizes = [0] * len(groups)
        for entry in entries:
            sizes[entry.group] += 1
        options = groups[0]["numerator"], groups[0]["fisher"], is_adaptive(groups)
        hyper = self._hyper.get(device)
        if hyper is None or not hyper.serves(sizes, *options):
            hyper = self._hyper[device] = Hyperparameters(device, sizes, *options)
        tensors = gather.lay_out(device, entries, groups, optimizer.state)
        tensors, passes, pairs = backends.apart(
            tensors, self.passes_for(device, tensors.has_codes, tensors.has_coded_variances)
        )
        squares = self._squares_over(groups, rank_sums) if rank_sums is not None and hyper.adaptive else None
        return DeviceShare(tensors, passes, hyper, rank_sums, pairs, squares)

    def _squares_over(self, groups: Groups, rank_sums: RankSums) -> SquareSums | None:
        """What adds up squares over ranks, if a row, a column or a tensor of a parameter is on several."""
        of, diagonals, found = self._square_sums or (None, [], None)
        now = [group["diagonal"] for group in groups for _ in group["params"]]
        if of is not rank_sums or diagonals != now:
            params = params_of(groups)
            for ordinal, (param, diagonal) in enumerate(zip(params, now, strict=True)):
                if is_flattened(param):
                    checks.not_flattened(diagonal, ordinal)
            found = None
            if any(along and diagonal != "element" for along, diagonal in zip(rank_sums.spread, now, strict=True)):
                sizes = [gather.rows_and_columns(param, diagonal) for param, diagonal in zip(params, now, strict=True)]
                found = SquareSums(params, rank_sums.spread, sizes, rank_sums.device)
            self._square_sums = rank_sums, now, found
        return found


def is_adaptive(groups: Groups) -> bool:
    """Whether the diagonals adapt: those of all groups do, or those of none."""
    return bool(groups[0]["diagonal"] != "identity")


def params_of(groups: Groups) -> list[Tensor]:
    """The parameters of all groups, by ordinal."""
    return [param for group in groups for param in group["params"]]
