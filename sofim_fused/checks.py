"""Every refusal in one place: arguments, parameters, gradients and state dicts that SOFIM cannot take.

Each check raises before anything is changed, and its message says which argument, group or tensor, its value, and
what to do instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sofim_fused import blockwise
from sofim_fused.dtensor import is_sharded, local, on_one_mesh

NUMERATORS = ("moment", "gradient", "nesterov")
FISHERS = ("model", "group", "parameter")
DIAGONALS = ("identity", "tensor", "row", "factored", "element")
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)

NARROW_DTYPES = (torch.bfloat16, torch.float16)
RESTS = {32: torch.int16, 24: torch.int8}  # the dtype of master_bits, by master_weight_bits
# In state dicts int16 is float16, the same bits: NCCL and gloo send no int16.
REST = RESTS[32]
SENT_AS = torch.float16
SMALLEST_RHO = 1e-30  # keeps ‖m̂‖²/ρ far below float64's overflow
SMALLEST_EPS = 1e-18  # above the root of what is lost below float32's range, so that s bounds the step there too
LARGEST_EPS = 1e18  # far below float32's range: s has to stay finite

# Options that each parameter group may set, and options that have one value for the whole optimizer.
PER_GROUP = (
    "lr",
    "momentum",
    "rho",
    "weight_decay",
    "decoupled_weight_decay",
    "maximize",
    "state_dtype",
    "kahan",
    "master_weight_bits",
    "diagonal",
    "beta2",
    "eps",
)
WHOLE = ("numerator", "fisher", "max_grad_norm", "skip_nonfinite")
STATE_DTYPES = {  # by their names in state dicts
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": blockwise.DTYPE,
}

VARIANCES = ("row_var", "col_var", "variance")  # running means of g², of a diagonal that adapts
LOST_BITS = ("kahan", "master_bits")  # what 16-bit weights could not hold; see lost_bits()
STATE = (
    "exp_avg",
    "exp_avg_scale",
    "step",
    *LOST_BITS,
    *VARIANCES,
    "variance_scale",
)  # what SOFIM keeps for a parameter; other entries are a user's own
CONSTRUCTOR_ONLY = (
    "backend",
    "capturable",
    "in_backward",
    "release_grads",
    "foreach",
    "fused",
    "amp_fused",
    "differentiable",
)


def flag(name: str, value: Any) -> bool:
    """A constructor's flag; ``None`` counts as ``False``.

    Raises:
        TypeError: it is not a flag.
    """
    if not (value is None or isinstance(value, bool)):
        raise TypeError(f"{name}={value!r}: pass True or False")
    return bool(value)


def not_differentiable(value: Any) -> None:
    """Refuse ``differentiable``."""
    if flag("differentiable", value):
        raise ValueError(
            "differentiable=True is impossible: the update is made in place; unroll it in plain PyTorch instead"
        )


def scaling(name: str, value: Any) -> None:
    """Check ``grad_scale`` or ``found_inf``, attributes that ``torch.amp.GradScaler`` gives an optimizer for one step.

    Raises:
        TypeError, ValueError: it is neither a number nor a real tensor of one element.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"{name} is a tensor ({described(value)}): set a real one with one element, or delete it")
    elif not (value is None or isinstance(value, Real)):
        raise TypeError(f"{name}={value!r}: set a number or a one-element tensor, or delete it")


def group(values: Mapping[str, Any], index: int | None = None, saved: bool = False) -> None:
    """Check the hyperparameters of one parameter group (``index``), or the constructor's (``None``).

    Args:
        values: the group.
        index: its index.
        saved: whether it comes from a state dict. Then what schedulers write may be out of range: after its last step
            a linear OneCycleLR leaves a negative learning rate. The next step checks it.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a value is out of its range.
    """
    where = "" if index is None else f"parameter group {index}: "
    missing = lacking(values)
    if missing:
        raise ValueError(f"{where}{', '.join(missing)} is missing: set it, or make the optimizer anew")
    if saved:
        _number(where, "lr", values["lr"], tensor=True)
        _number(where, "momentum", values["momentum"])
    else:
        _number(where, "lr", values["lr"], low=0.0, tensor=True)
        _number(where, "momentum", values["momentum"], low=0.0, below=1.0)
    _one_of(where, "diagonal", values["diagonal"], DIAGONALS)
    _rho(where, values["rho"], values["diagonal"])
    _number(where, "beta2", values["beta2"], low=0.0, below=1.0)
    _number(where, "eps", values["eps"], low=SMALLEST_EPS, below=LARGEST_EPS)
    _number(where, "weight_decay", values["weight_decay"], low=0.0)
    for name in ("decoupled_weight_decay", "maximize", "skip_nonfinite"):
        if not isinstance(values[name], bool):
            raise TypeError(f"{where}{name}={values[name]!r}: pass True or False")
    if not (values["kahan"] is None or isinstance(values["kahan"], bool)):
        raise TypeError(f"{where}kahan={values['kahan']!r}: pass True, False or None (on for 16-bit parameters)")
    _master_weight_bits(where, values["master_weight_bits"], values["kahan"])
    dtype = values["state_dtype"]
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype in STATE_DTYPES.values())):
        known = ", ".join(map(str, STATE_DTYPES.values()))
        raise ValueError(f"{where}state_dtype={dtype!r}: pass {known} or None (by parameter)")
    _one_of(where, "numerator", values["numerator"], NUMERATORS)
    _one_of(where, "fisher", values["fisher"], FISHERS)
    limit = values["max_grad_norm"]
    if limit is not None:
        _number(where, "max_grad_norm", limit, low=0.0, open_low=True, infinite=True)
    if values["diagonal"] != "identity" and not values["decoupled_weight_decay"] and values["weight_decay"]:
        raise ValueError(
            f"{where}decoupled_weight_decay=False with diagonal={values['diagonal']!r}: the diagonal would divide the "
            "decay by the size of the gradients, so that it no longer shrinks weights: take decoupled_weight_decay=True"
        )


def _master_weight_bits(where: str, bits: Any, kahan: bool | None) -> None:
    if bits is None or (isinstance(bits, str) and bits == "auto"):
        return
    if type(bits) is not int or bits not in RESTS:
        raise ValueError(
            f"{where}master_weight_bits={bits!r}: pass 32, 24, None (what kahan says) or 'auto' (32, unless kahan is "
            "set)"
        )
    if kahan:
        raise ValueError(
            f"{where}kahan=True with master_weight_bits={bits}: a weight has one kind of lost bits: leave out kahan, "
            "or pass master_weight_bits=None"
        )


def lost_bits(param: Tensor, values: Mapping[str, Any]) -> str | None:
    """The name of the state with the bits that a parameter lost, by the values of its group; ``None``: it has none.

    ``"master_bits"``: more bits of float32 weights; ``"kahan"``: Kahan's compensation.
    """
    bits, kahan = values["master_weight_bits"], values["kahan"]
    if param.dtype == torch.bfloat16 and (kahan is None if bits == "auto" else bits is not None):
        return "master_bits"
    return "kahan" if param.dtype in NARROW_DTYPES and kahan is not False else None


def lost_bits_dtype(param: Tensor, values: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the bits that a 16-bit parameter lost, if :func:`lost_bits` are kept."""
    return rest_dtype(values) if lost_bits(param, values) == "master_bits" else param.dtype


def rest_dtype(values: Mapping[str, Any]) -> torch.dtype:
    """The dtype of ``master_bits`` in a group with these values."""
    return RESTS[24] if values["master_weight_bits"] == 24 else REST


def _rho(where: str, rho: Any, diagonal: str) -> None:
    if diagonal == "identity":
        if rho is None:
            raise ValueError(
                f"{where}rho=None leaves out the term of rank one, and with diagonal='identity' nothing would be left: "
                "pass a number, or a diagonal that adapts, as diagonal='factored'"
            )
    elif rho is None:
        return
    elif isinstance(rho, Real) and rho == math.inf:
        raise ValueError(f"{where}rho={rho!r}: pass None, which leaves out the term of rank one and its sums")
    _number(where, "rho", rho, low=SMALLEST_RHO, tensor=True)


def lacking(values: Mapping[str, Any]) -> list[str]:
    """The hyperparameters that a group does not have."""
    return [name for name in PER_GROUP + WHOLE if name not in values]


def betas(where: str, value: Any) -> tuple[float, float]:
    """Check ``betas``, as Adam and its variants call ``momentum`` and ``beta2``, and return the two.

    Raises:
        TypeError: these are not two numbers.
        ValueError: one is out of its range.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{where}betas={value!r}: pass two numbers, as (0.9, 0.99)")
    for place, beta in enumerate(value):
        _number(where, f"betas[{place}]", beta, low=0.0, below=1.0)
    return value[0], value[1]


def adapts(diagonal: Any) -> None:
    """Check the ``diagonal`` of a class that has only diagonals that adapt."""
    if isinstance(diagonal, str) and diagonal == "identity":
        raise ValueError(
            "diagonal='identity' does not adapt, and AdaSOFIM's other defaults are not made for it: take SOFIM"
        )


def without_variances(where: str, diagonal: Any) -> None:
    """Check the ``diagonal`` that is to go on from an optimizer without running means of g²."""
    if not (isinstance(diagonal, str) and diagonal == "identity"):
        raise ValueError(
            f"{where}diagonal={diagonal!r} needs running means of g², which SGD does not have (with its moments but "
            "without them, the first steps would be ten times too long): leave it out, or make a new "
            "AdaSOFIM(model.parameters())"
        )


def dtype_named(value: Any) -> Any:
    """A ``state_dtype`` given by its name as a ``torch.dtype``; anything else as it is."""
    return STATE_DTYPES.get(value, value) if isinstance(value, str) else value


def groups(params: Any) -> list[Any]:
    """The constructor's ``params`` as a list: of parameters, of (name, parameter) pairs, or of group dicts."""
    if isinstance(params, Tensor):
        raise TypeError(f"params is a tensor ({described(params)}): pass an iterable of tensors, [tensor]")
    if isinstance(params, (str, bytes, Mapping)) or not isinstance(params, Iterable):
        raise TypeError(f"params is of type {type(params).__name__}: pass model.parameters(), or a list of group dicts")
    return list(params)


def some_parameter(groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that there is at least one parameter in all groups together."""
    if not any(group["params"] for group in groups):
        raise ValueError(
            "params is empty: pass model.parameters(), or group dicts with at least one parameter; if other ranks "
            "hold all of them, pass the process group of these ranks as shard_group="
        )


def in_backward(groups: Sequence[Mapping[str, Any]]) -> None:
    """Check the options of groups whose gradients are taken in the backward pass."""
    for name in ("max_grad_norm", "skip_nonfinite"):
        value = groups[0].get(name) if groups else None
        if value is not None and value is not False:
            raise ValueError(
                f"in_backward=True with {name}={value!r} is impossible: the norm of all gradients is known only after "
                "the first of them have entered their moments. Leave out one of them"
            )
    for index, values in enumerate(groups):
        if values.get("diagonal", "identity") != "identity" and values["rho"] is not None:
            raise ValueError(
                f"parameter group {index}: in_backward=True with diagonal={values['diagonal']!r} and "
                f"rho={values['rho']!r} is impossible: the term of rank one needs all gradients before any weight "
                "changes. Pass rho=None, or leave out in_backward"
            )


def adaptive_in_backward_over_ranks(diagonal: str) -> ValueError:
    """The error for a diagonal that adapts, of sharded parameters whose gradients are taken in the backward pass."""
    return ValueError(
        f"in_backward=True with diagonal={diagonal!r} and sharded parameters is impossible: the sums over rows and "
        "columns need other ranks. Leave out in_backward, or take diagonal='identity'"
    )


def reads_gradient(numerator: str) -> bool:
    """Whether the update has a term in the gradient, which then is a part of what F⁻¹ is applied to."""
    return numerator != "moment"


def in_backward_parameter(param: Tensor, where: str, values: Mapping[str, Any]) -> None:
    """Check a parameter whose gradients are taken in the backward pass, beside its group's values."""
    numerator = values["numerator"]
    if values.get("diagonal", "identity") != "identity":  # the hook takes the whole step, and rounds it once
        return
    whole = lost_bits(param, values) == "master_bits" and rest_dtype(values) == REST
    if reads_gradient(numerator) and param.dtype in NARROW_DTYPES and not whole:
        raise ValueError(
            f"{where} ({described(param)}): in_backward=True with numerator={numerator!r} would round it twice in a "
            "step, between two large terms: take numerator='moment', leave out in_backward, or keep the weights in "
            "float32, or in bfloat16 with master_weight_bits=32"
        )


def shard_group(group: Any, in_backward: bool) -> None:
    """Check the constructor's ``shard_group``.

    Raises:
        TypeError: it is no process group.
        ValueError: gradients are to be taken in the backward pass.
    """
    if group is None:
        return
    if not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(
            f"shard_group={group!r}: pass a process group, torch.distributed.group.WORLD or what new_group() returned"
        )
    if in_backward:
        raise ValueError(
            "in_backward=True with a shard_group is impossible: where whole parameters lie on different ranks, a "
            "gradient is averaged over the ranks only after its hook has run. Leave out in_backward, or shard the "
            "parameters with fully_shard(), whose hooks see averaged gradients"
        )


def unscaled(optimizer: Any) -> None:
    """Check that no GradScaler calls ``step()`` of an optimizer whose gradients were taken in the backward pass."""
    if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
        raise ValueError(
            "in_backward=True under a GradScaler is impossible: gradients entered their moments with the loss's scale, "
            "before infinities could be looked for. Leave out one of them (bfloat16 needs no scaling)"
        )


def not_flattened(diagonal: str, ordinal: int) -> None:
    """Refuse a diagonal by rows, columns or tensors of a parameter of which a rank has a flat part."""
    if diagonal != "element":
        raise ValueError(
            f"parameter {ordinal} is a part of a flat parameter of FullyShardedDataParallel, which has no rows: with "
            f"diagonal={diagonal!r} shard the model with fully_shard(), or take diagonal='element'"
        )


def one_device(params: Sequence[Tensor]) -> None:
    """Check that parameters which are sharded over ranks are on one device of this rank."""
    devices = sorted({str(param.device) for param in params})
    if len(devices) > 1:
        raise ValueError(
            f"parameters that are spread over ranks lie on {', '.join(devices)}: put those of a rank on one device"
        )


def group_dict(values: Any, index: int) -> Mapping[str, Any]:
    """Check that a parameter group is a dict with ``params`` and sets no option that only the constructor can."""
    if not isinstance(values, dict):
        raise TypeError(f"parameter group {index} is of type {type(values).__name__}: pass a dict with 'params'")
    if "params" not in values:
        raise ValueError(f"parameter group {index} has no 'params': add the list of its parameters")
    for name in CONSTRUCTOR_ONLY:
        if values.get(name):  # groups of torch's optimizers carry some of these, switched off
            raise ValueError(f"parameter group {index} sets {name}: pass it to the constructor")
    return values


def shared_with_sam(values: Mapping[str, Any], index: int) -> str:
    """The warning for a group of a SAM wrapper, whose ``rho`` has another meaning; for other groups an empty string."""
    if "rho" not in values or "adaptive" not in values:
        return ""
    return (
        f"parameter group {index} has rho={values['rho']!r} beside 'adaptive', as the groups of SAM (sharpness-aware "
        "minimization) have: SOFIM would use SAM's radius as its rho. docs/from_sgd.md ('Under SAM') shows the remedy"
    )


def agreement(groups: Sequence[Mapping[str, Any]], start: int = 1) -> None:
    """Check that the options of the optimizer as a whole have one value in all groups.

    ``start``: the index of the second group, for the message.
    """
    for index, values in enumerate(groups[1:], start=start):
        for name in WHOLE:
            if values[name] != groups[0][name]:
                raise ValueError(
                    f"parameter group {index}: {name}={values[name]!r}, but group 0 has {groups[0][name]!r}: "
                    f"{name} holds for the whole optimizer; set it in the constructor"
                )
        if (values["diagonal"] == "identity") != (groups[0]["diagonal"] == "identity"):
            raise ValueError(
                f"parameter group {index}: diagonal={values['diagonal']!r}, but group 0 has {groups[0]['diagonal']!r}: "
                "the diagonals of one optimizer all adapt, or none does; make two optimizers"
            )
        if groups[0]["fisher"] == "model" and (values["rho"] is None) != (groups[0]["rho"] is None):
            raise ValueError(
                f"parameter group {index}: rho={values['rho']!r}, but group 0 has {groups[0]['rho']!r}: the term of "
                "rank one spans the whole model; take fisher='group', or None in all groups"
            )


def parameters(params: Any, index: int, taken: Mapping[Tensor, int], state_dtype: Any) -> list[Any]:
    """Check the parameters of group ``index`` and return them as a list, (name, tensor) pairs included.

    Args:
        params: what the user gave: a tensor or an iterable of tensors or of (name, tensor) pairs.
        index: the group's.
        taken: the parameters of the groups before, with their group's index.
        state_dtype: the group's, which excludes some dtypes of parameters.
    """
    if isinstance(params, (set, frozenset)):
        raise TypeError(f"parameter group {index}: params is a set, which has no fixed order: pass a list")
    if isinstance(params, (str, bytes, Mapping)):
        raise TypeError(f"parameter group {index}: params is of type {type(params).__name__}: pass a list of tensors")
    try:
        entries = [params] if isinstance(params, Tensor) else list(params)
    except TypeError:
        raise TypeError(
            f"parameter group {index}: params is of type {type(params).__name__}: pass an iterable of tensors"
        ) from None
    seen: dict[Tensor, int] = {}
    for place, entry in enumerate(entries):
        named = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
        param = entry[1] if named else entry
        where = f"parameter {place} of group {index}"
        if not isinstance(param, Tensor):
            raise TypeError(f"{where} is of type {type(param).__name__}: pass tensors, or (name, tensor) pairs")
        where += f" ({described(param)})"
        parameter(param, where, state_dtype)
        if param in seen:
            raise ValueError(f"{where} is parameter {seen[param]} again: pass each parameter once")
        if param in taken:
            raise ValueError(f"{where} is already in group {taken[param]}: pass each parameter once")
        seen[param] = place
    return entries


def parameter(param: Tensor, where: str, state_dtype: Any) -> None:
    """Check a parameter passed to the optimizer; of a frozen one, which gets no gradient, little is required."""
    if is_lazy(param):
        raise ValueError(f"{where} is not initialised yet: run one forward pass before making the optimizer")
    if is_sharded(param):
        _placements(param, where)
    if param.requires_grad:
        optimizable(param, where, state_dtype)


def optimizable(param: Tensor, where: str | _Named, state_dtype: Any) -> None:
    """Check that a parameter that has a gradient, or may get one, can be updated."""
    if param.is_nested:
        raise ValueError(f"{where} is a nested tensor: pass its parts")
    if not is_sharded(param) and is_traceable_wrapper_subclass(param):
        raise ValueError(
            f"{where} is of type {type(param).__name__}, which holds other tensors (quantized, say): "
            f"SOFIM updates plain tensors and DTensors; {_FREEZE}"
        )
    if param.layout != torch.strided:
        raise ValueError(f"{where} has the layout {param.layout}: pass a dense tensor (to_dense())")
    if param.dtype not in DTYPES:
        raise ValueError(f"{where}: only {', '.join(map(short, DTYPES))} can be optimized: {_FREEZE}")
    if not param.is_leaf:
        raise ValueError(f"{where} is the result of an operation, not a leaf: pass the tensor it was computed from")
    if param.is_conj() or param.is_neg():
        raise ValueError(f"{where} is a lazily conjugated or negated view: pass resolve_conj().resolve_neg() of it")
    if _may_overlap(param):
        raise _sharing(param, where, "pass a contiguous copy (.clone())")
    state_dtype_suits(param, where, state_dtype)


_FREEZE = "leave it out, or freeze it (requires_grad_(False)) and clear its gradient"


def first_gradient(param: Tensor, ordinal: int, state_dtype: Any) -> None:
    """Check a parameter at its first gradient: when the optimizer was made, it may have been frozen, or another one."""
    if torch.compiler.is_compiling():  # checks of the kind of tensor cannot be traced
        state_dtype_suits(param, f"parameter {ordinal}", state_dtype)
    else:
        optimizable(param, _Named(param, ordinal), state_dtype)


class _Named:
    """A parameter's name in messages, formatted only when needed: torch.compile cannot trace formatting a shape."""

    def __init__(self, param: Tensor, ordinal: int) -> None:
        self.param = param
        self.ordinal = ordinal

    def __str__(self) -> str:
        return f"parameter {self.ordinal} ({described(self.param)})"


def apart(param: Tensor, ordinal: int) -> None:
    """Check that a parameter's elements still have memory of their own: it may have been replaced since."""
    if _may_overlap(param):
        raise _sharing(param, f"parameter {ordinal}", "give it memory of its own (.clone())")


def shared_in_backward(one: int, other: int) -> ValueError:
    """The error for two parameters (ordinals) that share memory, which their gradients entered one by one."""
    return ValueError(
        f"parameters {one} and {other} share memory (weights, or one exp_avg for both): with in_backward=True their "
        "gradients enter it in the order in which they arrive, which is not that of a plain step. Give each memory of "
        "its own (tie weights by using one Parameter in both places), or leave out in_backward; load_state_dict() goes "
        "back"
    )


def _sharing(x: Tensor, where: str | _Named, advice: str) -> ValueError:
    return ValueError(
        f"{where} has strides {tuple(x.stride())}, with which elements may share memory (as after expand()): {advice}"
    )


def _placements(param: Any, where: str) -> None:
    """Check the placements of a ``DTensor`` on its mesh."""
    if param.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{where} lies on {param.device_mesh}, which this rank is not part of: leave it out here; with"
            " shard_group, sums are taken over ranks that hold other parameters"
        )
    if any(place.is_partial() for place in param.placements):
        raise ValueError(
            f"{where} has the placements {param.placements}: of a sum that was not taken yet each rank holds a part; "
            "redistribute() it to Shard or Replicate"
        )


def state_dtype_suits(param: Tensor, where: str | _Named, state_dtype: torch.dtype | None) -> None:
    """Check that a group's ``state_dtype`` suits a parameter."""
    if state_dtype is not None and torch.promote_types(param.dtype, torch.float32) != torch.float32:
        raise ValueError(
            f"{where}: state_dtype={state_dtype} is for float32 and 16-bit parameters: "
            "put this one into a group with state_dtype=None"
        )
    if state_dtype == blockwise.DTYPE and is_sharded(param) and blockwise.suits(param.shape):
        placements: Any = param.placements  # type: ignore[attr-defined]
        if any(place.is_shard() and place.dim != 0 for place in placements):
            raise ValueError(
                f"{where}: state_dtype={state_dtype} keeps a scale for each 128 elements of a row, and with the "
                f"placements {placements} ranks have parts of rows: shard it along dimension 0, or put it into a group "
                "with state_dtype=torch.bfloat16"
            )


def gradient(param: Tensor, grad: Tensor, index: int, place: int) -> None:
    """Check the gradient of parameter ``place`` of group ``index`` before a step."""
    fits = grad.dtype == param.dtype or (grad.dtype == torch.float32 and param.dtype in NARROW_DTYPES)
    fits = fits and grad.shape == param.shape and grad.device == param.device and grad.layout == torch.strided
    if fits and on_one_mesh(param, grad):
        return
    optimizable(param, f"parameter {place} of group {index} ({described(param)})", None)
    where = f"gradient of parameter {place} of group {index} ({described(param)})"
    if grad.layout != torch.strided:
        raise ValueError(
            f"{where} has the layout {grad.layout}: "
            "SOFIM takes dense gradients (nn.Embedding(sparse=False), to_dense())"
        )
    if grad.shape != param.shape:
        raise ValueError(f"{where} has the shape {tuple(grad.shape)}: call zero_grad() and backward() again")
    if grad.device != param.device:
        raise ValueError(f"{where} is on {grad.device}: move it there, or call zero_grad() and backward() again")
    if fits:
        raise other_mesh(param, grad, where, "redistribute the one that is wrong, or call zero_grad() and backward()")
    raise ValueError(
        f"{where} is {short(grad.dtype)}: it must be {short(param.dtype)}"
        + (" or float32" if param.dtype in NARROW_DTYPES else "")
        + "; "
        + (_CAST if getattr(param, "grad_dtype", param.dtype) == param.dtype else _CAST_UNSET)
    )


_CAST = "cast it (param.grad = param.grad.to(param.dtype)), or call zero_grad() and backward() again"
# As long as grad_dtype is not changed, a parameter does not accept the cast gradient.
_CAST_UNSET = (
    "set param.grad_dtype = param.dtype before backward(), or cast the gradient after it "
    "(param.grad_dtype = None, then param.grad = param.grad.to(param.dtype))"
)


def other_mesh(param: Any, value: Any, where: str, advice: str) -> ValueError:
    """The error for a tensor on another mesh than its parameter."""
    found, expected = (f"a DTensor on {x.device_mesh}" if is_sharded(x) else "a plain tensor" for x in (value, param))
    return ValueError(f"{where} is {found}, the parameter {expected}: {advice}")


def _placed_alike(param: Any, value: Any, ordinal: int, name: str) -> None:
    """Check that a parameter's state has the mesh and the placements of the parameter."""
    if not on_one_mesh(param, value):
        raise other_mesh(param, value, f"{_state(param, ordinal)}: {name}", _SPREAD)
    if is_sharded(param) and param.placements != value.placements:
        raise ValueError(
            f"{_state(param, ordinal)}: {name} has the placements {value.placements}, the parameter "
            f"{param.placements}: redistribute() it"
        )


def state_of_parameter(
    param: Tensor, known: Mapping[str, Tensor], dtype: torch.dtype, ordinal: int, lost: str | None
) -> None:
    """Check that a parameter's state still fits it: either may have been replaced, moved, cast or resized since.

    Args:
        param: the owner of the state.
        known: its state.
        dtype: that of its moment.
        ordinal: the parameter's place among all.
        lost: the name of its lost bits, if it has any; others, of an earlier setting, are not used, and more or fewer
            ``master_bits`` are converted.
    """
    for name, expected in (("exp_avg", dtype), ("kahan", param.dtype), ("master_bits", REST)):
        if name not in known or (name != "exp_avg" and name != lost):
            continue
        value = known[name]
        _state_tensor(param, ordinal, name, value)
        dtypes = RESTS.values() if name == "master_bits" else (expected,)
        if value.dtype in dtypes and value.shape == param.shape and value.device == param.device:
            _placed_alike(param, value, ordinal, name)
            if _may_overlap(value):
                raise _sharing(value, f"{_state(param, ordinal)}: {name}", _REPLACE)
            continue
        raise ValueError(
            f"{_state(param, ordinal)}: {name} is {described(value)}, expected "
            f"shape {tuple(param.shape)}, {short(expected)}, {param.device}: after its first step the parameter was "
            + (_MOVED if _convertible(value, param) else _RESIZED)
        )
    count = known["step"]
    _state_tensor(param, ordinal, "step", count)
    if count.dtype != torch.int64 or count.dim() or count.device != param.device:
        raise ValueError(
            f"{_state(param, ordinal)}: step is {described(count)}, expected a 0-dimensional int64 tensor on "
            f"{param.device}: {_REPLACE}"
        )


def scales_of(
    name: str, param: Any, known: Mapping[str, Any], ordinal: int, placements: tuple[Any, ...] | None
) -> None:
    """Check the scales of an entry of a parameter's state, which is stored in 8 bits.

    Args:
        name: ``"exp_avg"`` or ``"variance"``.
        param: the owner of the state.
        known: its state.
        ordinal: the parameter's place among all.
        placements: that the scales of a ``DTensor`` need; ``None``: the parameter is a plain tensor.
    """
    scale = f"{name}_scale"
    if scale not in known:
        raise ValueError(
            f"{_state(param, ordinal)} has {name} in 8 bits and lacks {scale}: put it back, or delete the "
            "parameter's state to start it anew"
        )
    value, shape = known[scale], blockwise.scale_shape(param.shape)
    _state_tensor(param, ordinal, scale, value)
    if value.dtype != torch.float32 or tuple(value.shape) != shape or value.device != param.device:
        raise ValueError(
            f"{_state(param, ordinal)}: {scale} is {described(value)}, expected shape {shape}, float32, "
            f"{param.device}: {_REPLACE}"
        )
    if _may_overlap(value):
        raise _sharing(value, f"{_state(param, ordinal)}: {scale}", _REPLACE)
    if placements is not None:
        placed(param, value, placements, ordinal, scale)
    elif is_sharded(value):
        raise other_mesh(param, value, f"{_state(param, ordinal)}: {scale}", _SPREAD)


def variances(
    param: Tensor,
    known: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    ordinal: int,
    diagonal: str,
) -> None:
    """Check that a parameter has the running means of g² that its group's diagonal needs, and no others.

    Args:
        param: the owner of the state.
        known: its state.
        shapes: the means that are needed, by name.
        dtype: theirs.
        ordinal: the parameter's place among all.
        diagonal: the group's.
    """
    if diagonal == "identity":  # those of an earlier diagonal are not used
        return
    has = {name for name in VARIANCES if name in known}
    if has != {*shapes}:
        found = f"has {' and '.join(sorted(has))}" if has else "has no running means of g²"
        raise ValueError(
            f"{_state(param, ordinal)} {found}, but diagonal={diagonal!r} needs "
            f"{' and '.join(shapes)}: set the diagonal that it was made with, or delete the parameter's "
            "state to start it anew (del optimizer.state[param])"
        )
    for name, shape in shapes.items():
        value = known[name]
        _state_tensor(param, ordinal, name, value)
        if value.dtype != dtype or tuple(value.shape) != shape or value.device != param.device:
            casts = tuple(value.shape) == shape and blockwise.DTYPE in (value.dtype, dtype)
            raise ValueError(
                f"{_state(param, ordinal)}: {name} is {described(value)}, expected shape {shape}, {short(dtype)}, "
                f"{param.device} for diagonal={diagonal!r}: {_RECAST if casts else _REPLACE}"
            )
        if _may_overlap(value):
            raise _sharing(value, f"{_state(param, ordinal)}: {name}", _REPLACE)


def placed(param: Any, value: Any, placements: tuple[Any, ...], ordinal: int, name: str) -> None:
    """Check that an entry of the state of a ``DTensor``, of another shape, is on its mesh with these placements."""
    if not on_one_mesh(param, value):
        raise other_mesh(param, value, f"{_state(param, ordinal)}: {name}", _SPREAD)
    if tuple(value.placements) != placements:
        raise ValueError(
            f"{_state(param, ordinal)}: {name} has the placements {value.placements}, expected {placements}: "
            "redistribute() it"
        )


def _convertible(value: Tensor, param: Tensor) -> bool:
    """Whether :meth:`SOFIM.load_state_dict` takes this entry of a state for a parameter, and converts it."""
    fits = value.shape == param.shape and value.is_complex() == param.is_complex()
    fits = fits and (value.dtype in DTYPES or value.dtype == blockwise.DTYPE)
    return fits and value.is_meta == param.is_meta and on_one_mesh(param, value)


_MOVED = (
    "moved or cast, or its group's state_dtype changed; optimizer.load_state_dict(optimizer.state_dict()) moves and "
    "casts the state to match"
)
_RECAST = "optimizer.load_state_dict(optimizer.state_dict()) casts it to match"
_RESIZED = (
    "resized, or made complex or real, or its state was replaced: delete the parameter's state to start it anew "
    "(del optimizer.state[param])"
)
_SPREAD = (
    "shard a model before making its optimizer, or load a state dict with torch.distributed.checkpoint.state_dict."
    "set_optimizer_state_dict(), which spreads it"
)
_REPLACE = "put a tensor like it in its place, or delete the parameter's state to start it anew"


def shared(param: Tensor, ordinal: int, name: str, other: int, other_name: str) -> ValueError:
    """The error for an entry of a parameter's state that shares memory with another tensor that the step writes.

    Args:
        param: the owner of the state.
        ordinal: its place among all parameters.
        name: of the entry.
        other: the place of the other tensor's parameter.
        other_name: of its entry, or ``"w"`` for the parameter.
    """
    owner = f"parameter {other}" if other != ordinal else "the parameter"
    where = owner if other_name == "w" else f"{other_name} of {owner}"
    return ValueError(f"{_state(param, ordinal)}: {name} shares memory with {where}: {_REPLACE}")


def state_entries(param: Tensor, known: Any, ordinal: int) -> None:
    """Check that a parameter's entry in the optimizer's state is a dict, with all of SOFIM's entries or none."""
    if not isinstance(known, Mapping):
        raise TypeError(
            f"{_state(param, ordinal)} is of type {type(known).__name__}, not a dict: delete it to start the "
            "parameter anew"
        )
    has = [name for name in STATE if name in known]
    if has and not ("exp_avg" in has and "step" in has):
        lost = "step" if "exp_avg" in has else "exp_avg"
        raise ValueError(
            f"{_state(param, ordinal)} has {' and '.join(has)} and lacks {lost}: put it back, or delete the "
            "parameter's state to start it anew"
        )


def _state(param: Tensor, ordinal: int) -> str:
    return f"state of parameter {ordinal} ({described(param)})"


def _state_tensor(param: Tensor, ordinal: int, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_state(param, ordinal)}: {name} is of type {type(value).__name__}, not a tensor: {_REPLACE}")
    if value.layout != torch.strided:
        raise ValueError(f"{_state(param, ordinal)}: {name} has the layout {value.layout}: {_REPLACE}")


def _number(
    where: str,
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    open_low: bool = False,
    below: float | None = None,
    infinite: bool = False,
    tensor: bool = False,
) -> None:
    """Check that ``value`` is a real number in the range. A tensor's value is read only if that needs no waiting.

    Without ``low`` and ``below`` it only has to be finite.
    """
    if tensor and isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{where}{name} is a tensor ({described(value)}): pass a real one with one element")
        if value.device.type != "cpu":
            return
        number = float(value.detach())
    elif isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number, infinite = math.inf, False
    else:
        kinds = "a float or a one-element tensor" if tensor else "a float"
        raise TypeError(f"{where}{name}={value!r}: pass {kinds}")
    # Only comparisons, which torch.compile can trace for a number that it does not know; NaN fails the first one.
    good = number > low if open_low or low == -math.inf else number >= low
    if not good or (number == math.inf and not infinite) or (below is not None and number >= below):
        if low == -math.inf:
            raise ValueError(f"{where}{name}={number!r}: it must be finite")
        bound = f"greater than {low:g}" if open_low else f"at least {low:g}"
        limit = f" and less than {below:g}" if below is not None else "" if infinite else " and finite"
        raise ValueError(f"{where}{name}={number!r}: it must be {bound}{limit}")


def _one_of(where: str, name: str, value: Any, known: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{where}{name}={value!r}: take one of {', '.join(map(repr, known))}")


def _may_overlap(x: Tensor) -> bool:
    """Whether two elements may share memory: strides that are not those of nested, disjoint blocks."""
    if is_sharded(x):
        x = local(x.detach())
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride <= reach:
            return x.numel() > 0
        reach += stride * (size - 1)
    return False


def described(x: Tensor) -> str:
    """A tensor's shape, dtype and device, for a message."""
    if is_lazy(x) or x.is_nested:
        return "uninitialised" if is_lazy(x) else "nested"
    return f"shape {tuple(x.shape)}, {short(x.dtype)}, {x.device}"


def short(dtype: torch.dtype) -> str:
    """A dtype's name without ``torch.``."""
    return str(dtype).removeprefix("torch.")
