"""How an optimizer's parameters are sharded over ranks: as ``DTensor``, by FSDP1, by ZeRO, or by a ``shard_group``."""

from __future__ import annotations

import gc
import hashlib
import inspect
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable imports the compiler: seconds

from sofim_fused.dtensor import Groups, groups_of, is_sharded, replicas_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sharding(NamedTuple):
    """How an optimizer's parameters are sharded over ranks.

    Attributes:
        along: by ordinal, the process groups whose ranks hold other elements of a parameter.
        holders: the ranks that hold other parameters, or ``None``.
        flattened: whether FSDP1 shards some of the parameters.
    """

    along: list[Groups]
    holders: ProcessGroup | None
    flattened: bool = False

    def __bool__(self) -> bool:
        return any(self.along) or self.holders is not None


def placement(param: Tensor) -> tuple[object, ...]:
    """A parameter's identity, device and sharding, to compare later. It does not keep the parameter alive."""
    if not is_sharded(param):
        return id(param), param.device, is_flattened(param)
    return id(param), param.device, param.device_mesh, param.placements  # type: ignore[attr-defined]


def device_of(group: ProcessGroup) -> torch.device:
    """The device on which the ranks of a group exchange tensors, for a rank that has no tensors."""
    from torch import distributed

    if "nccl" in distributed.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 made this parameter: a flat parameter, or with ``use_orig_params=True`` a view of one."""
    return bool(getattr(param, "_fsdp_flattened", False))


def find_sharding(optimizer: Any, params: Sequence[Tensor], fisher: str, shard_group: ProcessGroup | None) -> Sharding:
    """Find out how an optimizer's parameters are sharded over ranks.

    ``DTensor`` parameters have this information themselves. Parameters of FSDP1 (``FullyShardedDataParallel``) have a
    mark, and their module has the process group. So has a ``ZeroRedundancyOptimizer`` around the optimizer.

    Args:
        optimizer: the owner of the parameters.
        params: in the order of its groups.
        fisher: as the optimizer's.
        shard_group: as the constructor's.

    Raises:
        ValueError: sums over these ranks would be wrong; the message says what to pass.
    """
    for ordinal, param in enumerate(params):
        if fisher == "parameter" and is_flattened(param) and getattr(param, "_num_params", 1) > 1:
            raise ValueError(
                f"parameter {ordinal} is a flat parameter of FullyShardedDataParallel, with {param._num_params} "  # type: ignore[attr-defined]
                "parameters in it: with fisher='parameter' they would share a Fisher matrix. Pass use_orig_params=True "
                "to FullyShardedDataParallel, or fisher='model' or 'group'"
            )
    along = [groups_of(param) for param in params]
    if not _several_ranks():
        return Sharding(along, shard_group)
    replicas = [replicas_of(param) for param in params]
    flattened = any(is_flattened(param) for param in params)
    if flattened:
        for ordinal, (groups, others) in untraced(_flattened)(params, shard_group).items():
            along[ordinal], replicas[ordinal] = groups, others
    if shard_group is None and not any(along):
        around, found = untraced(_holders_around)(optimizer)
        if not found:
            untraced(_warn_of_others)(params)
        return Sharding(along, around)
    if shard_group is not None:
        shard_group = _holders_besides(shard_group, along, replicas)
    return Sharding(along, shard_group, flattened)


def _several_ranks() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _flattened(params: Sequence[Tensor], shard_group: ProcessGroup | None) -> dict[int, tuple[Groups, Groups]]:
    """By ordinal, the groups over which FSDP1 shards a parameter, and those over which it replicates it."""
    handles: dict[int, tuple[Any, Any]] = {}
    module: Any = sys.modules.get("torch.distributed.fsdp")
    for thing in gc.get_objects() if module is not None else ():
        if issubclass(type(thing), module.FullyShardedDataParallel):
            handle = getattr(thing, "_handle", None)
            if handle is None:  # all parameters of this module belong to modules inside it
                continue
            flat = handle.flat_param
            for param in (flat, *(flat._params or ()), *(flat._shared_params or ())):
                handles[id(param)] = handle, getattr(thing, "_inter_node_pg", None)
    found: dict[int, tuple[Groups, Groups]] = {}
    for ordinal, param in enumerate(params):
        if not is_flattened(param):
            continue
        if id(param) not in handles:
            if shard_group is not None:
                continue
            raise ValueError(
                f"parameter {ordinal} is marked as one of FullyShardedDataParallel's, but no module in this process has"
                " it: pass shard_group= with the process group over which it is sharded, or make the optimizer from "
                "model.parameters() after wrapping the model"
            )
        handle, between = handles[id(param)]
        if any(extension is not None for extension in handle.flat_param._param_extensions):
            raise ValueError(
                f"parameter {ordinal} is sharded both by FullyShardedDataParallel and by tensor parallelism, and SOFIM "
                "cannot tell which of its elements are replicas: shard the model with fully_shard() instead"
            )
        group = handle.process_group if handle.process_group.size() > 1 else None
        if not handle.uses_sharded_strategy:
            found[ordinal] = (), () if group is None else (group,)
        else:
            hybrid = "HYBRID" in handle._sharding_strategy.name and between is not None
            found[ordinal] = () if group is None else (group,), (between,) if hybrid else ()
    return found


def _holders_around(optimizer: Any) -> tuple[ProcessGroup | None, bool]:
    """The ranks of a ``ZeroRedundancyOptimizer`` that uses this optimizer for its own part, and whether there is one.

    Raises:
        ValueError: DeepSpeed uses this optimizer for its own part. Such parts have no mark, and may be on more ranks
            than DeepSpeed's process group has.
    """
    zero: Any = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    deepspeed = "deepspeed" in sys.modules
    for thing in gc.get_objects() if zero is not None or deepspeed else ():
        kind = type(thing)
        if zero is not None and issubclass(kind, zero.ZeroRedundancyOptimizer):
            if vars(thing).get("optim") is optimizer:
                group: ProcessGroup = thing.process_group
                return (group if group.size() > 1 else None), True
        elif deepspeed and str(getattr(kind, "__module__", "")).startswith("deepspeed."):
            known = getattr(thing, "__dict__", {})
            parts = known.get("dp_process_group")
            if known.get("optimizer") is optimizer and parts is not None and parts.size() > 1:
                raise ValueError(
                    f"DeepSpeed ({kind.__name__}) gives each rank a part of the parameters, and the Fisher matrix and "
                    "the gradient norm would cover that part alone: pass shard_group= with the process group of all "
                    "ranks that hold a part (torch.distributed.group.WORLD, unless the model is parallel in other ways "
                    "too)"
                )
    return None, False


class _Warned:
    """What this process has published in a default process group: the shapes of its optimizers' parameters."""

    MOST = 16
    """The largest number of optimizers that are published, for programs that make very many."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.digests: list[str] = []  # in the order of first steps
        self.warned = False


_warned: list[_Warned] = []  # at most one


def _warn_of_others(params: Sequence[Tensor]) -> None:
    """Warn, once, if a neighbouring rank has parameters of other shapes: each may have a part of one model.

    No rank waits for another: it writes its shapes to the default process group's store, and reads what its neighbours
    have written there; if two ranks differ, at least the later one notices. The n-th optimizer of one rank is compared
    with the n-th of the other, and optimizers that the other rank has at another position are ignored.
    """
    from torch import distributed

    try:
        store = distributed.distributed_c10d._get_default_store()
        if not _warned or _warned[0].store is not store:
            _warned[:] = [_Warned(store)]
        told = _warned[0]
        if told.warned or len(told.digests) == told.MOST:
            return
        shapes = repr([tuple(param.shape) for param in params])
        told.digests.append(hashlib.sha256(shapes.encode()).hexdigest())
        rank, world = distributed.get_rank(), distributed.get_world_size()
        store.set(f"sofim_fused/{rank}", ",".join(told.digests))
        differs = [other for other in {(rank - 1) % world, (rank + 1) % world} if _differ(told.digests, store, other)]
    except (RuntimeError, NotImplementedError):  # not every store can be asked without waiting
        return
    if differs:
        told.warned = True
        warnings.warn(
            f"SOFIM has parameters of other shapes on rank {rank} than on rank {differs[0]}. If these are parts of one "
            "model, each part gets its own Fisher matrix and gradient norm: pass shard_group= with the process group of"
            " the ranks that hold the parts. If each rank trains its own model, ignore this warning",
            UserWarning,
            stacklevel=2,
        )


def _differ(mine: list[str], store: Any, other: int) -> bool:
    """Whether this rank's newest optimizer and the other rank's at that position both have no counterpart."""
    key = f"sofim_fused/{other}"
    if not store.check([key]):
        return False
    theirs = store.get(key).decode().split(",")
    return len(theirs) >= len(mine) and mine[-1] not in theirs and theirs[len(mine) - 1] not in mine


def _holders_besides(shard_group: ProcessGroup, along: list[Groups], replicas: list[Groups]) -> ProcessGroup | None:
    """The ``shard_group`` to sum over after the sums over shards; ``None`` if it has no other ranks than those.

    Raises:
        ValueError: it contains replicas, or only some of the ranks over which a parameter is sharded.
    """
    from torch import distributed

    ranks = set(distributed.get_process_group_ranks(shard_group))
    spread = dict.fromkeys(group for groups in along for group in groups)
    replicated = {group: ordinal for ordinal, groups in enumerate(replicas) for group in groups if group not in spread}
    for group, ordinal in replicated.items():
        shared = ranks.intersection(distributed.get_process_group_ranks(group))
        if len(shared) > 1:
            raise ValueError(
                f"shard_group has the ranks {sorted(shared)}, which hold copies of parameter {ordinal}: sums would"
                " count them several times. Leave shard_group out, or pass a group that has one rank of each part of "
                "the model (with pipeline stages: the group of the stages)"
            )
    for group in spread:
        theirs = set(distributed.get_process_group_ranks(group))
        if len(ranks & theirs) > 1 and not theirs <= ranks:
            raise ValueError(
                f"shard_group has the ranks {sorted(ranks & theirs)} of {sorted(theirs)}, over which parameters are "
                "sharded: sums would count them several times. Leave shard_group out, or pass a group that has all of "
                "these ranks, or one rank of each part of the model (with pipeline stages: the group of the stages)"
            )
        if theirs == ranks:
            return None
    return shard_group


# Calls from torch.distributed.checkpoint


def checkpoint_calls(function: str) -> bool:
    """Whether this function of ``torch.distributed.checkpoint.state_dict`` is anywhere among our callers.

    - ``_init_optim_state``: ``get_state_dict`` and ``set_state_dict`` call ``step()`` before the first step, with
      gradients of zero and a learning rate of zero, so that the state is created. As an ordinary step, this would raise
      step counts, and bias correction would be wrong from then on.
    - ``_get_optim_state_dict``: if a gradient is set, they skip that call. The state dict would then have no state, and
      that of a checkpoint would not be loaded.
    """
    module: Any = sys.modules.get("torch.distributed.checkpoint.state_dict")
    known = getattr(module, function, None)
    if known is None:
        return False
    code = inspect.unwrap(known).__code__  # the module's functions have decorators
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
