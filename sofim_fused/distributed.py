"""Sums over what other ranks hold: parameters in shards (``DTensor``), or whole parameters of their own.

The curvature is one number per Fisher block, a sum over all of its elements. Every rank sums over the elements that it
holds; an all-reduce over the process groups along which elements are spread makes the totals, from which each rank
computes the same coefficients and updates what it holds. Nothing else is sent, and replicas send nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Shards",
    "device_of",
    "groups_of",
    "is_sharded",
    "local",
    "on_one_mesh",
    "placed_as",
    "placement",
    "written",
]

Groups = tuple["ProcessGroup", ...]

# One tensor


def is_sharded(x: object) -> bool:
    """Whether it is a ``DTensor``."""
    if type(x) is Tensor or type(x) is nn.Parameter:
        return False
    # The module is imported with the first of them; importing it for all others would take long.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def on_one_mesh(x: Any, y: Any) -> bool:
    """Whether two tensors lie on the same mesh, or both on none."""
    sharded = is_sharded(x)
    if sharded is not is_sharded(y):
        return False
    return not sharded or x.device_mesh is y.device_mesh or x.device_mesh == y.device_mesh


def local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory. Under ``no_grad``."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def groups_of(param: Tensor) -> Groups:
    """The process groups whose ranks hold other elements of a parameter than this one does; replicas are none."""
    if not is_sharded(param):
        return ()
    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    placements: Any = param.placements  # type: ignore[attr-defined]
    axes = [axis for axis, place in enumerate(placements) if not place.is_replicate() and mesh.size(axis) > 1]
    return tuple(mesh.get_group(axis) for axis in axes)


def placement(param: Tensor) -> tuple[object, ...]:
    """Where a parameter lies; equal for the same parameter as long as that is the same. It does not keep it alive."""
    if not is_sharded(param):
        return id(param), param.device
    return id(param), param.device, param.device_mesh, param.placements  # type: ignore[attr-defined]


def placed_as(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients that lie on ranks as their parameters do.

    Some do not: under sequence parallelism each rank has the share of its part of the sequence in the gradient of a
    replicated parameter (``Partial``). What has to be sent for that is under way at the same time.
    """
    moved: list[Any] = [
        grad.redistribute(placements=param.placements, async_op=True)  # type: ignore[attr-defined]
        if is_sharded(grad) and grad.placements != param.placements  # type: ignore[attr-defined]
        else None
        for param, grad in zip(params, grads, strict=True)
    ]
    return [grad if new is None else _arrived(new) for grad, new in zip(grads, moved, strict=True)]


def _arrived(grad: Any) -> Tensor:
    wait = getattr(grad.to_local(), "wait", None)  # it may have been a matter of this rank alone
    arrived: Tensor = grad.to_local() if wait is None else wait()
    return arrived


def written(params: Iterable[Tensor]) -> None:
    """Raise the version counters of parameters whose local tensors were written to: a ``DTensor`` has its own."""
    torch.autograd.graph.increment_version([param for param in params if is_sharded(param)])


def device_of(group: ProcessGroup) -> torch.device:
    """Where the ranks of a group exchange tensors, for one that has none."""
    from torch import distributed

    if "nccl" in distributed.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# All tensors of an optimizer


class Shards:
    """How all parameters of an optimizer are spread over ranks, and the totals of their sums.

    Parameters that are spread over the same process groups are a class: their sums travel together. Classes are in the
    order in which parameters first have them, which is the same on all ranks of a mesh.

    Args:
        spread: :func:`groups_of` each parameter, by ordinal.
        device: of the sums.
        holders: the ranks that hold other parameters.
    """

    def __init__(self, spread: Sequence[Groups], device: torch.device, holders: ProcessGroup | None) -> None:
        classes = list(dict.fromkeys(spread)) or [()]
        self.device = device
        self.count = len(spread)
        self._classes = len(classes)
        self._class_of = [classes.index(groups) for groups in spread]
        self._routes = [
            (group, [number for number, theirs in enumerate(classes) if group in theirs])
            for group in dict.fromkeys(group for theirs in classes for group in theirs)
        ]
        self._holders = holders
        self._compared: set[tuple[str, str, int, bool]] = set()
        self._of_class = functools.lru_cache(8)(self._of_class_anew)
        self.places = functools.lru_cache(8)(self._places)

    def _of_class_anew(self, ordinals: tuple[int, ...]) -> Tensor:
        rows = [[self._class_of[i] == number for i in ordinals] for number in range(self._classes)]
        return torch.tensor(rows, dtype=torch.bool, device=self.device)

    def _places(self, ordinals: tuple[int, ...]) -> Tensor | None:
        """Ordinals as indices; ``None``: they are all there are."""
        if ordinals == tuple(range(self.count)):
            return None
        return torch.tensor(ordinals, dtype=torch.int64, device=self.device)

    def by_class(self, rows: Tensor, ordinals: tuple[int, ...]) -> Tensor:
        """``[k, n]`` of these parameters as ``[classes, k, n]``, with zeros in the place of other classes' tensors."""
        if self._classes == 1:
            return rows[None]
        return torch.where(self._of_class(ordinals)[:, None], rows, 0.0)  # a product with zero would keep NaN

    def total(self, blocks: Tensor, whole: Tensor, fisher: str) -> tuple[Tensor, Tensor]:
        """Sums over classes and ranks: an all-reduce for each mesh axis, and one for the holders of other parameters.

        Args:
            blocks: ``[classes, m]``, per Fisher block; the block of one parameter is not on several of those holders.
            whole: ``[classes, l]``, over everything.
            fisher: as the optimizer's.

        Returns:
            ``[m]`` and ``[l]``, the same on all ranks.
        """
        from torch import distributed

        message = torch.cat((blocks, whole), 1)
        for group, members in self._routes:
            part = message[members] if len(members) < self._classes else message
            distributed.all_reduce(part, group=group)
            if part is not message:
                message[members] = part
        total = message.sum(0)
        start = blocks.shape[1] if fisher == "parameter" else 0
        if self._holders is not None and start < len(total):
            distributed.all_reduce(total[start:], group=self._holders)
        return total[: blocks.shape[1]], total[blocks.shape[1] :]

    def compare(self, numerator: str, fisher: str, groups: int, guarded: bool) -> None:
        """Check, the first time, that all ranks have the same to add up.

        All-reduces of different sizes give wrong sums, silently, or never return.

        Args:
            numerator: as the optimizer's.
            fisher: as the optimizer's.
            groups: how many parameter groups there are.
            guarded: which kind of step it is.

        Raises:
            RuntimeError: they have not.
        """
        if (numerator, fisher, groups, guarded) in self._compared:
            return
        blocks_of = {"model": 1, "group": groups, "parameter": self.count}
        blocks = blocks_of[fisher]
        kind = [int(numerator == "gradient"), list(blocks_of).index(fisher), int(guarded)]
        for group, members in self._routes:
            spread = sum(number in members for number in self._class_of)
            self._compare(group, [len(members), spread, blocks, *kind])
        if self._holders is not None:
            self._compare(self._holders, [1, 0, 0 if fisher == "parameter" else blocks, *kind])
        self._compared.add((numerator, fisher, groups, guarded))

    def _compare(self, group: ProcessGroup, numbers: list[int]) -> None:
        from torch import distributed

        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        all_of_them = [torch.empty_like(mine) for _ in range(group.size())]
        distributed.all_gather(all_of_them, mine, group=group)
        found = torch.stack(all_of_them).tolist()
        if any(theirs != found[0] for theirs in found):
            names = ("ways to be sharded", "sharded parameters", "Fisher blocks", "numerator", "fisher", "guarded")
            differ = [
                f"{name}: {', '.join(map(str, values))}"
                for name, values in zip(names, zip(*found, strict=True), strict=True)
                if len(set(values)) > 1
            ]
            raise RuntimeError(
                f"the ranks of a process group have different sums to add up ({'; '.join(differ)}): give the optimizers"
                " of all ranks the same options and parameter groups, and the same sharded parameters in the same order"
            )
