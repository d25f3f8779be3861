"""What a ``DTensor`` holds on this rank, and which ranks hold its other elements. Plain tensors are returned as is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = tuple["ProcessGroup", ...]


def is_sharded(x: object) -> bool:
    """Whether it is a ``DTensor``."""
    if type(x) is Tensor or type(x) is nn.Parameter:
        return False
    # Creating the first DTensor imports this module. Programs without any should not wait for the import.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def on_one_mesh(x: Any, y: Any) -> bool:
    """Whether two tensors are on the same mesh, or both on none."""
    sharded = is_sharded(x)
    if sharded is not is_sharded(y):
        return False
    return not sharded or x.device_mesh is y.device_mesh or x.device_mesh == y.device_mesh


def local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory. Call it under ``no_grad``."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def groups_of(param: Tensor) -> Groups:
    """The process groups whose ranks hold elements of a parameter that this rank does not hold; without replicas."""
    return _groups(param, replicated=False)


def groups_with(param: Tensor, first: bool) -> Groups:
    """Those of :func:`groups_of` that divide dimension 0 of a ``DTensor`` (``first``), or any other dimension."""
    if not is_sharded(param):
        return ()
    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    placements: Any = param.placements  # type: ignore[attr-defined]
    return tuple(
        mesh.get_group(axis)
        for axis, place in enumerate(placements)
        if not place.is_replicate() and mesh.size(axis) > 1 and (place.dim == 0) is first
    )


def spread_like(param: Tensor, part: Tensor, shape: Sequence[int], dims: Mapping[int, int]) -> Tensor:
    """This rank's part of a tensor as a ``DTensor`` on a parameter's mesh; of a plain parameter, ``part`` itself.

    Args:
        param: whose sharding it follows.
        part: what this rank holds.
        shape: of the whole tensor.
        dims: its dimension for each of the parameter's dimensions that it has; along others it is replicated.
    """
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor

    placements = placements_like(param, dims)
    strides = torch.empty(tuple(shape), device="meta").stride()
    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides)


def viewed_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same memory as elements of another dtype of the same size, with the placements of a ``DTensor``."""
    if not is_sharded(x):
        return x.detach().resolve_neg().view(dtype)
    from torch.distributed.tensor import DTensor

    part, mesh = local(x).detach().resolve_neg().view(dtype), x.device_mesh  # type: ignore[attr-defined]
    placements = x.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())


def placements_like(param: Tensor, dims: Mapping[int, int]) -> tuple[Any, ...]:
    """The placements of a tensor that follows a parameter's sharding; arguments as for :func:`spread_like`."""
    from torch.distributed.tensor import Replicate, Shard

    found: list[Any] = []
    for place in param.placements:  # type: ignore[attr-defined]
        if place.is_replicate() or place.dim not in dims:
            found.append(Replicate())
        elif dims[place.dim] == place.dim:
            found.append(place)
        elif type(place) is Shard:
            found.append(Shard(dims[place.dim]))
        else:  # the order in which meshes of FSDP and tensor parallelism divide a dimension
            found.append(type(place)(dims[place.dim], split_factor=place.split_factor))
    return tuple(found)


def replicas_of(param: Tensor) -> Groups:
    """The process groups whose ranks hold the same elements of a ``DTensor`` as this rank does."""
    return _groups(param, replicated=True)


def _groups(param: Tensor, replicated: bool) -> Groups:
    if not is_sharded(param):
        return ()
    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    placements: Any = param.placements  # type: ignore[attr-defined]
    axes = [axis for axis, place in enumerate(placements) if place.is_replicate() is replicated and mesh.size(axis) > 1]
    return tuple(mesh.get_group(axis) for axis in axes)


def placed_as(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients with the placements of their parameters.

    Some do not have them: under sequence parallelism, the gradient of a replicated parameter is a sum to which each
    rank contributes its part of the sequence (``Partial``). All transfers for that run at the same time.
    """
    moved: list[Any] = [
        grad.redistribute(placements=param.placements, async_op=True)  # type: ignore[attr-defined]
        if is_sharded(grad) and grad.placements != param.placements  # type: ignore[attr-defined]
        else None
        for param, grad in zip(params, grads, strict=True)
    ]
    return [grad if new is None else _arrived(new) for grad, new in zip(grads, moved, strict=True)]


def _arrived(grad: Any) -> Tensor:
    wait = getattr(grad.to_local(), "wait", None)  # None if nothing had to be sent
    arrived: Tensor = grad.to_local() if wait is None else wait()
    return arrived


def bump_versions(params: Iterable[Tensor]) -> None:
    """Raise the version counters of parameters whose local tensors were written to: a ``DTensor`` has its own."""
    torch.autograd.graph.increment_version([param for param in params if is_sharded(param)])
