"""Every refusal of a state dict that SOFIM cannot load, before anything is changed (:mod:`sofim_fused.checks`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from sofim_fused import blockwise
from sofim_fused.checks import (
    DTYPES,
    PER_GROUP,
    RESTS,
    SENT_AS,
    STATE,
    VARIANCES,
    WHOLE,
    agreement,
    described,
    dtype_named,
    flag,
    group,
    lacking,
    lost_bits,
    optimizable,
    other_mesh,
    parameter,
    short,
)
from sofim_fused.dtensor import local, on_one_mesh

MOST_STEPS = 2**63 - 2**32  # leaves room in an int64 for the steps that follow
IDENTITY = ("lr", "momentum", "rho")  # in the groups of every version; a group that lacks one is another optimizer's
ADDED_LATER = tuple(name for name in PER_GROUP + WHOLE if name not in IDENTITY)  # what older versions may lack
# Entries that other optimizers keep for a parameter, and the names of these optimizers.
OTHER_STATES = {
    ("momentum_buffer",): "SGD",
    ("exp_avg_sq",): "Adam and its variants",
    ("square_avg",): "RMSprop and Adadelta",
    ("step", "sum"): "Adagrad",
}


Shapes = Callable[[Tensor, str], dict[str, tuple[int, ...]]]


def check(
    saved: Any, groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any], variance_shapes: Shapes
) -> dict[str, Any]:
    """Check a state dict against the optimizer's own groups.

    Args:
        saved: the state dict, which is left as it is.
        groups: the optimizer's.
        defaults: the constructor's, for options that were added after the version that saved it.
        variance_shapes: the running means of g² that a parameter needs with a diagonal, by name.

    Returns:
        A copy with complete groups, and with dtypes instead of their names.

    Raises:
        TypeError: it, or one of its parts, is of the wrong type.
        ValueError: something is missing, or its groups, parameters or shapes differ from the optimizer's.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(f"state_dict is of type {type(saved).__name__}: pass what SOFIM.state_dict() returned")
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if key not in saved:
            raise ValueError(f"state_dict has no {key!r}: pass what SOFIM.state_dict() returned")
        if not isinstance(saved[key], kind):
            raise TypeError(
                f"state_dict[{key!r}] is of type {type(saved[key]).__name__}: pass what state_dict() returned"
            )
    if len(saved["param_groups"]) != len(groups):
        raise ValueError(
            f"state_dict has {len(saved['param_groups'])} parameter groups, the optimizer {len(groups)}: "
            "make the optimizer with the groups that it was saved with"
        )
    complete: dict[str, Any] = dict(saved)
    pairs = list(zip(saved["param_groups"], groups, strict=True))
    complete["param_groups"] = [_completed(theirs, ours, saved["param_groups"], defaults) for theirs, ours in pairs]
    ordinals: dict[Any, Tensor] = {}
    group_of: dict[Any, Mapping[str, Any]] = {}
    for index, (theirs, ours) in enumerate(zip(complete["param_groups"], groups, strict=True)):
        _saved_group(theirs, ours, index)
        for key, param in zip(theirs["params"], ours["params"], strict=True):
            if isinstance(key, Tensor):
                raise TypeError(f"state_dict: 'params' of group {index} has a tensor: pass what state_dict() returned")
            if key in ordinals:
                raise ValueError(f"state_dict: parameter {key!r} stands twice in its groups: the state dict is damaged")
            ordinals[key] = param
            group_of[key] = theirs
    agreement(complete["param_groups"])
    for key, known in saved["state"].items():
        if key in ordinals:
            _saved_state(known, ordinals[key], key, group_of[key], variance_shapes)
        elif isinstance(key, Tensor):
            raise ValueError("state_dict has a tensor for a key of its state: pass what state_dict() returned")
        elif isinstance(key, Real):  # other keys are a user's own
            raise ValueError(
                f"state_dict has a state for parameter {key!r}, which is in none of its groups: it is damaged"
            )
    return complete


def _completed(theirs: Any, ours: Mapping[str, Any], groups: Sequence[Any], defaults: Mapping[str, Any]) -> Any:
    """A copy of a saved group, with missing options filled in where possible; what is not a dict is returned as it is.

    An option that it lacks was added in a later version, and gets the value of ``defaults``, which is how the older
    version behaved. torch.distributed.checkpoint leaves out all settings of an empty group; such a group gets this
    optimizer's settings for it, except those of the whole optimizer.
    """
    if not isinstance(theirs, dict):
        return theirs
    group = dict(theirs)
    if not group.keys() - {"params", "param_names"} and isinstance(group.get("params"), list) and not group["params"]:
        settings = {name: value for name, value in ours.items() if name not in ("params", "param_names")}
        whole = next((other for other in groups if isinstance(other, dict) and other.keys() >= set(IDENTITY)), None)
        if whole is not None:
            settings.update({name: whole.get(name, defaults[name]) for name in WHOLE})
        group.update(settings)
    for name in ADDED_LATER:
        group.setdefault(name, defaults[name])
    group["state_dtype"] = dtype_named(group["state_dtype"])
    return group


def _saved_group(theirs: Any, ours: Mapping[str, Any], index: int) -> None:
    if not isinstance(theirs, dict) or not isinstance(theirs.get("params"), Sequence):
        raise TypeError(f"state_dict: parameter group {index} is not a dict with a list 'params': it is damaged")
    missing = lacking(theirs)
    if missing:
        raise ValueError(f"state_dict: parameter group {index} lacks {', '.join(missing)}: {_whose(theirs)}")
    if len(theirs["params"]) != len(ours["params"]):
        raise ValueError(
            f"state_dict: parameter group {index} has {len(theirs['params'])} parameters, the optimizer's "
            f"{len(ours['params'])}: make the optimizer with the parameters that it was saved with"
        )
    for name in ("lr", "rho"):
        for param in ours["params"][:1]:
            if isinstance(theirs[name], Tensor):
                _readable(theirs[name], param, f"state_dict: parameter group {index}: {name}")
    group(theirs, index, saved=True)
    for name in ("capturable", "fused"):  # torch asks a saved group for these
        if name in theirs:
            flag(f"state_dict: parameter group {index}: {name}", theirs[name])
    try:
        copy.deepcopy(theirs)  # as torch does
    except Exception as error:
        raise TypeError(f"state_dict: parameter group {index} cannot be copied: {error}") from error
    if theirs["state_dtype"] is not None:
        for place, param in enumerate(ours["params"]):
            parameter(param, f"parameter {place} of group {index} ({described(param)})", theirs["state_dtype"])


def _whose(group: Mapping[str, Any]) -> str:
    """The part of an error about a group that is not SOFIM's: where it comes from, and what to do."""
    if "dampening" in group and "nesterov" in group:
        return (
            "it comes from another optimizer (it has torch.optim.SGD's dampening and nesterov): load it into an SGD "
            "optimizer, and convert that with SOFIM.from_sgd()"
        )
    if "betas" in group:
        return (
            "it comes from another optimizer (it has betas, as Adam and its variants): if it is of a torch.optim.AdamW "
            "or Adam, load it into one, and convert that with SOFIM.from_adamw(); else start SOFIM without it"
        )
    return "it comes from another optimizer, or is damaged"


def saved_entries(known: Mapping[str, Any]) -> dict[str, Any]:
    """SOFIM's entries of a parameter's saved state; an empty dict if it has none yet.

    torch.distributed.checkpoint puts an empty dict in place of an entry that a flattened state dict lacks.
    """
    return {name: known[name] for name in STATE if name in known and not _empty(known[name])}


def _empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def _others_state(known: Mapping[str, Any], entries: Mapping[str, Any]) -> str:
    """A phrase: which entries of a saved state belong to another optimizer, and to which. Empty if there are none."""
    step = entries.get("step")
    counted = isinstance(step, Tensor) and not step.is_floating_point()  # others count in float32
    if "exp_avg" in entries and counted:
        return ""
    for names, whose in OTHER_STATES.items():
        if all(name in known for name in names) and not ("exp_avg" in entries and names == ("momentum_buffer",)):
            return f"has {' and '.join(names)}, as {whose}: it comes from another optimizer"
    return ""


def _saved_state(known: Any, param: Tensor, key: Any, values: Mapping[str, Any], variance_shapes: Shapes) -> None:
    diagonal = values["diagonal"]
    where = f"state_dict: state of parameter {key!r} ({described(param)})"
    if not isinstance(known, dict):  # torch takes any other mapping for a list of its keys
        raise TypeError(f"{where} is of type {type(known).__name__}, not a dict: the state dict is damaged")
    entries = saved_entries(known)
    another = _others_state(known, entries)
    if another:
        raise ValueError(f"{where} {another}")
    for name, value in known.items():
        if name not in STATE:
            _own_entry(value, param, f"{where}: {name!r}")
    if not entries:
        return
    for name in ("exp_avg", "step"):
        if name not in entries:
            raise ValueError(
                f"{where} has the entries {sorted(map(str, known))} and lacks {name}: "
                "it comes from another optimizer, or is damaged"
            )
    optimizable(param, where, None)
    shapes = variance_shapes(param, diagonal)
    lost = [name for name in shapes if name not in entries]
    if lost:
        raise ValueError(
            f"{where} lacks {' and '.join(lost)}, which diagonal={diagonal!r} needs (without them, its first steps "
            "would be ten times too long): set the group's diagonal to the one that it was saved with"
        )
    kept = lost_bits(param, values)
    other = "kahan" if kept == "master_bits" else "master_bits"
    if kept is not None and kept not in entries and _empty(known.get(other)):
        raise ValueError(
            f"{where} lacks {kept}: a flattened state dict is read by the entries that this optimizer has, and it has "
            f"{other}: make it with kahan={values['kahan']!r} and master_weight_bits={values['master_weight_bits']!r}, "
            "as the one that was saved"
        )
    for name in ("exp_avg", "variance") if "variance" in shapes else ("exp_avg",):
        _saved_codes(name, entries, param, where)
    for name, value in entries.items():
        if name in VARIANCES and name not in shapes:
            continue  # of another diagonal: it is not restored
        if name.endswith("_scale") and not _in_codes(entries, name.removesuffix("_scale")):
            continue  # what is not in 8 bits has none: it is not restored
        if name == "variance_scale" and "variance" not in shapes:
            continue
        if name == "step" and isinstance(value, Real) and not isinstance(value, bool):
            continue  # other optimizers and converted checkpoints have such counts
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: {name} is of type {type(value).__name__}, not a tensor: it is damaged")
        _readable(value, param, f"{where}: {name}")
        shape = () if name == "step" else shapes.get(name, tuple(param.shape))
        if name.endswith("_scale"):
            shape = blockwise.scale_shape(param.shape)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{where}: {name} has the shape {tuple(value.shape)}, expected {shape}: it was saved for another model"
                + (f", or with another diagonal than {diagonal!r}" if name in VARIANCES else "")
            )
        dtypes = (*RESTS.values(), SENT_AS) if name == "master_bits" else DTYPES
        known_dtype = value.dtype in dtypes or name == "step"
        known_dtype |= name in ("exp_avg", "variance") and value.dtype == blockwise.DTYPE
        if value.layout != torch.strided or not known_dtype:
            raise ValueError(f"{where}: {name} is {short(value.dtype)}, {value.layout}: the state dict is damaged")
        complex_here = param.is_complex() and name not in (*VARIANCES, "master_bits") and not name.endswith("_scale")
        if name != "step" and value.is_complex() != complex_here:
            raise ValueError(f"{where}: {name} is {short(value.dtype)}: it was saved for another model")
        if name != "step" and not on_one_mesh(param, value):
            way = "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict(), which spreads it"
            raise other_mesh(param, value, f"{where}: {name}", way)
        if name in VARIANCES and not value.is_meta and _has_negative(local(value.detach())):
            raise ValueError(f"{where}: {name} has negative elements, which no mean of squares has: it is damaged")
        if name.endswith("_scale") and not value.is_meta and _has_negative(local(value.detach())):
            raise ValueError(f"{where}: {name} has negative elements, which no scale is: it is damaged")
    step = entries["step"]
    if not (isinstance(step, Tensor) and step.is_meta):
        count = step.item() if isinstance(step, Tensor) else step
        if not isinstance(count, Real) or not is_count(count):
            raise ValueError(f"{where}: step is {count!r}, expected a count of updates: the state dict is damaged")


def _in_codes(entries: Mapping[str, Any], name: str) -> bool:
    """Whether a saved entry is in 8 bits."""
    return isinstance(entries.get(name), Tensor) and entries[name].dtype == blockwise.DTYPE


def _saved_codes(name: str, entries: Mapping[str, Any], param: Tensor, where: str) -> None:
    """Check that a saved entry in 8 bits has scales, and is of a parameter of which it may be in 8 bits."""
    if not _in_codes(entries, name):
        return
    if not blockwise.suits(param.shape) or param.is_complex():
        what = "moment" if name == "exp_avg" else "second moment"
        raise ValueError(
            f"{where}: {name} is {short(blockwise.DTYPE)}, in which no parameter of this shape keeps its {what}: it "
            "was saved for another model, or is damaged"
        )
    if f"{name}_scale" not in entries:
        raise ValueError(f"{where} has {name} in 8 bits and lacks {name}_scale: it is damaged")


def _has_negative(x: Tensor) -> bool:
    """Whether any number is below zero; a code of -0 counts."""
    return bool((x.contiguous().view(torch.int8) if x.dtype == blockwise.DTYPE else x).lt(0).any())


def is_count(value: Any) -> bool:
    """Whether a real number is a possible step count: whole, not negative, and not too large (NaN is none)."""
    return bool(0 <= value < MOST_STEPS and value == int(value))


def _own_entry(value: Any, param: Tensor, where: str) -> None:
    """Check the tensors in what a user added to a parameter's state: torch copies them to its dtype and device."""
    if isinstance(value, Tensor):
        _readable(value, param, where)
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            _own_entry(part, param, where)


def _readable(value: Tensor, param: Tensor, where: str) -> None:
    """Check that a saved tensor has values that can be copied to its parameter's device."""
    if value.is_nested or is_lazy(value) or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else "not initialised"
        raise ValueError(f"{where} is {kind}: save a plain tensor in its place")
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{where} is on the meta device and has no values: load it with its values")
