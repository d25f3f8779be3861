"""Which tensors take part in a step, their state, and how they are laid out for the passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sofim_fused import blockwise, checks, checks_state_dict
from sofim_fused.backends import StepTensors, Variance
from sofim_fused.backends.master_bits import converted
from sofim_fused.checks import REST, SENT_AS
from sofim_fused.dtensor import is_sharded, local, placed_as, placements_like, spread_like, viewed_as


class Entry(NamedTuple):
    """A parameter that has a gradient, and its place: the group's index and the ordinal over all groups.

    The gradient of a ``DTensor`` may be what this rank holds of it.
    """

    group: int
    ordinal: int
    param: Tensor
    grad: Tensor


def with_gradients(groups: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The parameters that have a gradient, in the order of groups; each gradient is checked.

    Raises:
        ValueError: a gradient is sparse, or its shape, dtype or device does not fit; the message names the parameter.
    """
    entries = []
    ordinal = 0
    for index, group in enumerate(groups):
        for place, param in enumerate(group["params"]):
            if param.grad is not None:
                checks.gradient(param, param.grad, index, place)
                entries.append(Entry(index, ordinal, param, param.grad))
            ordinal += 1
    grads = placed_as([entry.param for entry in entries], [entry.grad for entry in entries])
    return [entry._replace(grad=grad) for entry, grad in zip(entries, grads, strict=True)]


def check_state(entry: Entry, group: Mapping[str, Any], state: Mapping[Tensor, Any]) -> None:
    """Check that a parameter's state fits it, or, if it has none, that the group's settings allow to create it.

    A rest that has the dtype that it has in state dicts gets its own: a ZeroRedundancyOptimizer puts the saved tensors
    into the state themselves.

    Raises:
        TypeError, ValueError: they do not; the message names the parameter.
    """
    known = state.get(entry.param, {})
    if isinstance(known, dict) and _is_sent(known.get("master_bits")):
        known["master_bits"] = viewed_as(known["master_bits"], REST)
    checks.apart(entry.param, entry.ordinal)
    checks.state_entries(entry.param, known, entry.ordinal)
    if "exp_avg" in known:
        dtype = moment_dtype(entry.param, group["state_dtype"])
        checks.state_of_parameter(entry.param, known, dtype, entry.ordinal, checks.lost_bits(entry.param, group))
        shapes = variance_shapes(entry.param, group["diagonal"])
        dtype = variance_dtype(entry.param, group)
        checks.variances(entry.param, known, shapes, dtype, entry.ordinal, group["diagonal"])
        for name, codes in zip(("exp_avg", "variance"), codes_of(entry.param, group), strict=True):
            if codes:
                placements = placements_like(entry.param, {0: 0}) if is_sharded(entry.param) else None
                checks.scales_of(name, entry.param, known, entry.ordinal, placements)
        for name, shape in shapes.items():
            if is_sharded(entry.param):
                placements = placements_like(entry.param, _dims(name, entry.param, shape))
                checks.placed(entry.param, known[name], placements, entry.ordinal, name)
    else:
        checks.first_gradient(entry.param, entry.ordinal, group["state_dtype"])


def has_fitting_state(entry: Entry, group: Mapping[str, Any], state: Mapping[Tensor, Any]) -> bool:
    """Whether a parameter still has the state that a pass needs, of its shape, dtype and device: a quick look."""
    param, known = entry.param, state[entry.param]
    moment, lost = known["exp_avg"], checks.lost_bits(param, group)
    kept = lost is None or (lost in known and _has_right_bits(param, known, group))
    if not kept or moment.shape != param.shape or moment.device != param.device:
        return False
    return bool(moment.dtype == moment_dtype(param, group["state_dtype"]))


def _has_right_bits(param: Tensor, known: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether ``master_bits``, if they are kept, are as many as the group says now."""
    if checks.lost_bits(param, group) != "master_bits" or "master_bits" not in known:
        return True
    return bool(known["master_bits"].dtype == checks.rest_dtype(group))


def _converted(param: Tensor, rest: Tensor, dtype: torch.dtype) -> Tensor:
    """The rest of a weight with more or fewer bits, laid out like the parameter."""
    made = torch.empty_like(param.detach(), dtype=dtype, memory_format=torch.preserve_format)
    local(made).copy_(converted(local(rest), dtype))
    return made


def ensure_state(entry: Entry, group: Mapping[str, Any], state: MutableMapping[Tensor, Any]) -> Any:
    """Give a parameter that has its first gradient a zero moment and a zero step count.

    Returns:
        The state before; ``None`` if nothing was missing.
    """
    param = entry.param
    before = known = state.get(param, {})
    whole = "exp_avg" in known
    lost = checks.lost_bits(param, group)
    kept = lost is None or lost in known
    if whole and kept and _has_right_bits(param, known, group):
        return None
    made = {}
    with torch.inference_mode(False):  # otherwise no later step could write to them
        if not whole:
            dtype = moment_dtype(param, group["state_dtype"])
            made["step"] = torch.zeros((), dtype=torch.int64, device=param.device)
            if in_8_bits(param, group["state_dtype"]):
                made.update(_zero_codes(param, "exp_avg"))
            else:
                made["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            made.update(_zero_variances(param, group))
        if kept and not _has_right_bits(param, known, group):
            made["master_bits"] = _converted(param, known["master_bits"], checks.rest_dtype(group))
        if lost is not None and not kept:
            dtype = checks.lost_bits_dtype(param, group)
            made[lost] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            # Those of an earlier setting or dtype would be out of date if they were ever used again.
            known = {name: value for name, value in known.items() if name not in checks.LOST_BITS}
    state[param] = {**known, **made}
    return before


def variance_shapes(param: Tensor, diagonal: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a parameter's running means of g² (:class:`sofim_fused.backends.Variance`).

    Rows are those of the parameter as the user made it. Of a complex one, the real and the imaginary part are elements.
    """
    if diagonal == "identity":
        return {}
    shape = (*param.shape, 2) if param.is_complex() else tuple(param.shape)
    if diagonal == "element" or (diagonal == "factored" and param.dim() < 2):
        return {"variance": shape}
    if diagonal == "tensor" or param.dim() < 2:
        return {"variance": ()}
    return {"row_var": shape[:1], "col_var": shape[1:]} if diagonal == "factored" else {"row_var": shape[:1]}


def variance_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype of running means of g²."""
    if codes_of(param, group)[1]:
        return blockwise.DTYPE
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def _zero_codes(param: Tensor, name: str) -> dict[str, Tensor]:
    """Zeros in 8 bits for an entry, and their scales: contiguous, sharded along dimension 0 as the parameter is."""
    part = local(param.detach())
    codes = torch.zeros(part.shape, dtype=blockwise.DTYPE, device=param.device)
    rows, blocks = blockwise.scale_shape(param.shape)
    scale = torch.zeros(part.shape[0], blocks, dtype=torch.float32, device=param.device)
    return {
        name: spread_like(param, codes, param.shape, {dim: dim for dim in range(param.dim())}),
        f"{name}_scale": spread_like(param, scale, (rows, blocks), {0: 0}),
    }


def store_moment(param: Tensor, known: Mapping[str, Tensor], value: Tensor) -> None:
    """Copy a moment into a parameter's state, which has one already; into 8 bits it is rounded to nearest.

    Args:
        param: the owner of the state.
        known: its state.
        value: of the parameter's shape and any dtype; a ``DTensor`` if the parameter is one.
    """
    if "exp_avg_scale" not in known:
        known["exp_avg"].copy_(value)
        return
    (value,) = placed_as([param], [value])
    # Saturated: float64 has numbers that would be infinite, and would spoil their blocks.
    most = torch.finfo(torch.float32).max
    value = local(value).to(torch.promote_types(value.dtype, torch.float32))
    finite = torch.where(value.isinf(), value, value.clamp(-most, most)).to(torch.float32)
    codes, scale = blockwise.encode(finite)
    local(known["exp_avg"]).copy_(codes)
    local(known["exp_avg_scale"]).copy_(scale)


def store_variance(param: Tensor, known: Mapping[str, Tensor], name: str, value: Tensor) -> None:
    """Copy running means of g² into a parameter's state; into 8 bits they are rounded to nearest.

    Numbers above the largest one of the dtype in the state become that one, as in a step.

    Args:
        param: the owner of the state.
        known: its state.
        name: of the entry.
        value: of the entry's shape and any dtype, not negative; a ``DTensor`` if the parameter is one.
    """
    dtype = torch.float32 if f"{name}_scale" in known else known[name].dtype
    value = value.detach().to(torch.promote_types(value.dtype, dtype)).clamp(max=torch.finfo(dtype).max)
    if f"{name}_scale" not in known:
        known[name].copy_(value)
        return
    (value,) = placed_as([param], [value])
    codes, scale = blockwise.encode_squares(local(value).to(device=param.device, dtype=dtype))
    local(known[name]).copy_(codes)
    local(known[f"{name}_scale"]).copy_(scale)


def _zero_variances(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Running means of g² before the first gradient, in the parameter's order in memory where they have its shape.

    Of a ``DTensor`` they are sharded as it is, where they have the dimension along which it is.
    """
    if codes_of(param, group)[1]:
        return _zero_codes(param, "variance")
    part, diagonal = _real(local(param.detach())), group["diagonal"]
    dtype, preserve = variance_dtype(param, group), torch.preserve_format
    made = {}
    for name, shape in variance_shapes(param, diagonal).items():
        if name == "variance" and shape:
            mine = torch.zeros_like(part, dtype=dtype, memory_format=preserve)
        elif name == "variance":
            mine = torch.zeros((), dtype=dtype, device=param.device)
        elif name == "row_var":
            mine = torch.zeros(part.shape[:1], dtype=dtype, device=param.device)
        elif part.shape[0]:
            mine = torch.zeros_like(part.select(0, 0), dtype=dtype, memory_format=preserve)
        else:
            mine = torch.zeros(part.shape[1:], dtype=dtype, device=param.device)
        made[name] = spread_like(param, mine, shape, _dims(name, param, shape))
    return made


def _dims(name: str, param: Tensor, shape: tuple[int, ...]) -> dict[int, int]:
    """The dimension of a running mean for each dimension of its parameter that it has."""
    if name == "row_var":
        return {0: 0}
    if name == "col_var":
        return {dim: dim - 1 for dim in range(1, param.dim())}
    return {dim: dim for dim in range(param.dim())} if shape else {}


def rows_and_columns(param: Tensor, diagonal: str) -> tuple[int, int]:
    """How many rows and columns this rank has of a parameter; 0 where it has no ``row_var`` or ``col_var``."""
    shapes, part = variance_shapes(param, diagonal), _real(local(param.detach()))
    rows = part.shape[0] if "row_var" in shapes else 0
    return rows, math.prod(part.shape[1:]) if "col_var" in shapes else 0


def restored_states(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """The states of a checked state dict for the parameters of ``groups``, as copies."""
    return {
        param: _restored(param, saved["state"][key], theirs)
        for theirs, ours in zip(saved["param_groups"], groups, strict=True)
        for key, param in zip(theirs["params"], ours["params"], strict=True)
        if key in saved["state"]
    }


def _restored(param: Tensor, saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state in the parameter's layout and on its device, each tensor in its own dtype.

    Bits that a 16-bit parameter lost are dropped if the parameter is now wider, or if the group asks for none or for
    those of the other kind.
    """
    state = {name: _own(value, param.device) for name, value in saved.items() if name not in checks.STATE}
    entries = checks_state_dict.saved_entries(saved)
    if not entries:
        return state
    step = entries["step"]
    count = torch.empty((), dtype=torch.int64, device=param.device)
    state["step"] = _filled(count, local(step)) if isinstance(step, Tensor) else count.fill_(int(step))
    state.update(_restored_moment(param, entries, group["state_dtype"]))
    lost = checks.lost_bits(param, group)
    if lost is not None and lost in entries:
        value = viewed_as(entries[lost], REST) if _is_sent(entries[lost]) and lost == "master_bits" else entries[lost]
        state[lost] = _like(param, value, value.dtype if lost == "master_bits" else param.dtype)
        if not _has_right_bits(param, state, group):
            state[lost] = _converted(param, state[lost], checks.rest_dtype(group))
    state.update(_restored_variances(param, entries, group))
    return state


def _restored_moment(param: Tensor, entries: Mapping[str, Any], state_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A saved moment as ``state_dtype`` has it: codes as they are if it is codes, and otherwise converted once."""
    saved = entries["exp_avg"].detach()
    codes = in_8_bits(param, state_dtype)
    if saved.dtype != blockwise.DTYPE:
        if not codes:
            return {"exp_avg": _like(param, saved, moment_dtype(param, state_dtype))}
        made = _zero_codes(param, "exp_avg")
        store_moment(param, made, saved)
        return made
    made = _restored_codes(param, entries, "exp_avg")
    if codes:
        return made
    value = blockwise.decode(local(made["exp_avg"]), local(made["exp_avg_scale"]))
    wide = torch.empty_like(param, dtype=moment_dtype(param, state_dtype), memory_format=torch.preserve_format)
    local(wide.detach()).copy_(value)
    return {"exp_avg": wide.detach()}


def _restored_variances(param: Tensor, entries: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Saved running means of g² as the group has them: codes as they are if they are codes, else converted once."""
    made = _zero_variances(param, group)
    for name in variance_shapes(param, group["diagonal"]):
        saved = entries[name].detach()
        if saved.dtype != blockwise.DTYPE:
            if f"{name}_scale" in made:
                store_variance(param, made, name, saved)
            else:  # saturated, as in a step: other dtypes hold larger numbers
                _filled(made[name], saved).clamp_(max=torch.finfo(made[name].dtype).max)
            continue
        codes = _restored_codes(param, entries, name)
        if f"{name}_scale" in made:
            return codes
        local(made[name]).copy_(blockwise.decode_squares(*(local(part) for part in codes.values())))
    return made


def _restored_codes(param: Tensor, entries: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """A saved entry in 8 bits and its scales, as they are."""
    made = _zero_codes(param, name)
    local(made[name]).view(torch.uint8).copy_(_part(param, entries[name].detach(), name).view(torch.uint8))
    scale = f"{name}_scale"
    local(made[scale]).copy_(_part(param, entries[scale].detach(), scale))
    return made


def _part(param: Tensor, saved: Tensor, name: str) -> Tensor:
    """What this rank needs of a saved tensor."""
    if is_sharded(saved):
        dims = {0: 0} if name.endswith("_scale") else {d: d for d in range(param.dim())}
        placements = placements_like(param, dims)
        saved = saved.redistribute(placements=placements)  # type: ignore[attr-defined]
    return local(saved)


def _own(value: Any, device: torch.device) -> Any:
    """A copy of an entry that a user added to a parameter's state, with its tensors on the parameter's device.

    Optimizer.load_state_dict would cast its tensors to the parameter's dtype, and replace a string by the text
    "<generator object ...>".
    """
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if type(value) is dict:
        return {key: _own(part, device) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_own(part, device) for part in value)
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied, such as a lock, is the user's own affair
        return value


def _like(param: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    return _filled(torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format), value)


def _filled(made: Tensor, value: Tensor) -> Tensor:
    made.copy_(value.detach())  # not returned: it may be of the saved tensor's class
    return made


def moment_dtype(param: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a parameter's first moment: ``state_dtype``, or else float32; float64 or complex if w is.

    Where ``state_dtype`` is that of codes, and the parameter's shape does not suit these, it is float32.
    """
    if state_dtype == blockwise.DTYPE and not blockwise.suits(param.shape):
        return torch.float32
    if state_dtype is not None:
        return state_dtype
    return torch.promote_types(param.dtype, torch.float32)


def for_state_dict(known: Any, flattened: bool) -> Any:
    """A parameter's state as state dicts have it: its rest has a dtype that ranks can send each other.

    ``flattened``: the parameters are those of FullyShardedDataParallel, which flattens no integers; a rest of 8 bits
    becomes one of 16 bits there, a copy.
    """
    rest = known.get("master_bits") if isinstance(known, dict) else None
    if not isinstance(rest, Tensor) or rest.layout != torch.strided:
        return known
    if flattened and rest.dtype in checks.RESTS.values():
        rest = converted(rest, REST)
    return {**known, "master_bits": viewed_as(rest, SENT_AS)} if rest.dtype == REST else known


def _is_sent(rest: Any) -> bool:
    return isinstance(rest, Tensor) and rest.dtype == SENT_AS and rest.layout == torch.strided


def _lost(param: Tensor, group: Mapping[str, Any], known: Mapping[str, Tensor]) -> Tensor | None:
    name = checks.lost_bits(param, group)
    return None if name is None else local(known[name])


def in_8_bits(param: Tensor, state_dtype: torch.dtype | None) -> bool:
    """Whether a parameter's first moment is stored as codes of 8 bits."""
    return state_dtype == blockwise.DTYPE and blockwise.suits(param.shape)


def codes_of(param: Tensor, group: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a parameter's first moment is stored as codes of 8 bits, and whether the second moment is."""
    codes = in_8_bits(param, group.get("state_dtype"))
    return codes, codes and group.get("diagonal") == "element"


def by_device(entries: Sequence[Entry]) -> Iterator[tuple[torch.device, list[Entry]]]:
    """Entries split by device, in the order in which devices first appear."""
    devices: dict[torch.device, list[Entry]] = {}
    for entry in entries:
        devices.setdefault(entry.param.device, []).append(entry)
    yield from devices.items()


def lay_out(
    device: torch.device, entries: Sequence[Entry], groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any]
) -> StepTensors:
    """The tensors of one device as the passes take them: real views of complex tensors, local tensors of ``DTensor``.

    Nothing is copied, except gradients whose conjugation or negation is lazy.
    """
    states = [state[entry.param] for entry in entries]
    return StepTensors(
        device=device,
        params=[_real(local(entry.param)) for entry in entries],
        grads=[_real(local(entry.grad).resolve_conj().resolve_neg()) for entry in entries],
        exp_avgs=[_real(local(known["exp_avg"])) for known in states],
        lost_bits=[
            _lost(entry.param, groups[entry.group], known) for entry, known in zip(entries, states, strict=True)
        ],
        steps=[known["step"] for known in states],
        ordinals=[entry.ordinal for entry in entries],
        variances=[
            _variance(entry.param, known)
            for entry, known in zip(entries, states, strict=True)
            if groups[entry.group]["diagonal"] != "identity"
        ],
        exp_avg_scales=[
            local(known["exp_avg_scale"]) if in_8_bits(entry.param, groups[entry.group]["state_dtype"]) else None
            for entry, known in zip(entries, states, strict=True)
        ],
    )


def _variance(param: Tensor, known: Mapping[str, Tensor]) -> Variance:
    row_var, col_var, variance = (
        local(known[name]) if name in known else None for name in ("row_var", "col_var", "variance")
    )
    numel = param.numel() * (2 if param.is_complex() else 1)
    shape = (1, numel) if row_var is None else (param.shape[0], numel // max(param.shape[0], 1))
    codes = variance is not None and variance.dtype == blockwise.DTYPE
    return Variance(row_var, col_var, variance, shape, local(known["variance_scale"]) if codes else None)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x
