"""Bad input as one table: what is wrong, how to produce it, and the error that SOFIM has to raise."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM

NAN, INF = float("nan"), float("inf")
BOTH = ("cpu", "reference")


class Case(NamedTuple):
    """A row of the table, ready to be tried.

    Attributes:
        attempt: the call that has to raise the error.
        params: parameters that must not change, besides those of the optimizer.
        optimizer: the optimizer, which must not change; ``None``: there is none yet.
    """

    attempt: Callable[[], object]
    params: Sequence[Any] = ()
    optimizer: SOFIM | None = None


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        what: what is wrong, in Markdown.
        make: makes the case, for a backend.
        error: the type of the error.
        text: the message, which names what is wrong and says what to do; "…" stands for any text.
        backends: the backends with which the row is tried.
    """

    what: str
    make: Callable[[str], Case]
    error: type[Exception]
    text: str
    backends: tuple[str, ...] = ("auto",)

    @property
    def pattern(self) -> str:
        """``text`` as a regular expression."""
        return "(?s)" + ".*".join(re.escape(part.strip()) for part in self.text.split("…"))


def one() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 3))]


def two() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 3))]


def give_ones(params: Sequence[Tensor]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


# Arguments of the constructor


class Argument(NamedTuple):
    """Arguments that the constructor refuses: in a group too, where a group can have them."""

    values: dict[str, Any]
    error: type[Exception]
    text: str
    what: str = ""

    def row(self) -> Row:
        return Row(self.what or f"`{_written(self.values)}`", self._case, self.error, self.text)

    def _case(self, _: str) -> Case:
        params = one()
        return Case(lambda: SOFIM(params, **self.values), params)


def _written(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


NOT_NEGATIVE = "it must be at least 0 and finite"
A_NUMBER = "pass a float or a one-element tensor"
ONE_ELEMENT = "pass a real one with one element"
A_MOMENTUM = "it must be at least 0 and less than 1"
A_RHO = "it must be at least 1e-30 and finite"
AN_EPS = "it must be at least 1e-18 and less than 1e+18"
DIAGONALS = "take one of 'identity', 'tensor', 'row', 'factored', 'element'"
NOTHING_LEFT = "leaves out the term of rank one, and with diagonal='identity' nothing would be left: pass a number"
A_FLAG = "pass True or False"
MASTER_BITS = "pass 32, 24, None (what kahan says) or 'auto' (32, unless kahan is set)"
MOMENT_TYPES = "pass torch.float32, torch.bfloat16, torch.float8_e4m3fn or None (by parameter)"
FISHERS = "take one of 'model', 'group', 'parameter'"
NO_NORM = "is impossible: the norm of all gradients is known only after … Leave out one of them"

ARGUMENTS = [
    Argument({"lr": -0.1}, ValueError, f"lr=-0.1: {NOT_NEGATIVE}"),
    Argument({"lr": NAN}, ValueError, f"lr=nan: {NOT_NEGATIVE}"),
    Argument({"lr": INF}, ValueError, f"lr=inf: {NOT_NEGATIVE}"),
    Argument({"lr": "0.1"}, TypeError, f"lr='0.1': {A_NUMBER}"),
    Argument({"lr": True}, TypeError, f"lr=True: {A_NUMBER}"),
    Argument({"lr": 10**400}, ValueError, f"lr=inf: {NOT_NEGATIVE}", "`lr=10**400`, which no float holds"),
    Argument({"lr": torch.ones(2)}, ValueError, f"lr is a tensor (shape (2,), float32, cpu): {ONE_ELEMENT}"),
    Argument({"lr": torch.tensor(-1.0)}, ValueError, f"lr=-1.0: {NOT_NEGATIVE}"),
    Argument({"lr": torch.tensor(1j)}, ValueError, f"lr is a tensor (shape (), complex64, cpu): {ONE_ELEMENT}"),
    Argument({"lr": torch.tensor(True)}, ValueError, f"lr is a tensor (shape (), bool, cpu): {ONE_ELEMENT}"),
    Argument({"momentum": 1.0}, ValueError, f"momentum=1.0: {A_MOMENTUM}"),
    Argument({"momentum": -0.1}, ValueError, f"momentum=-0.1: {A_MOMENTUM}"),
    Argument({"momentum": NAN}, ValueError, f"momentum=nan: {A_MOMENTUM}"),
    Argument({"momentum": torch.tensor(0.9)}, TypeError, "momentum=tensor(0.9 … : pass a float"),
    Argument({"rho": 0.0}, ValueError, f"rho=0.0: {A_RHO}"),
    Argument({"rho": 1e-40}, ValueError, f"rho=1e-40: {A_RHO}"),
    Argument({"rho": -1}, ValueError, f"rho=-1.0: {A_RHO}"),
    Argument({"rho": NAN}, ValueError, f"rho=nan: {A_RHO}"),
    Argument({"rho": INF}, ValueError, f"rho=inf: {A_RHO}"),
    Argument({"rho": torch.tensor(0.0)}, ValueError, f"rho=0.0: {A_RHO}"),
    Argument({"rho": torch.zeros(0)}, ValueError, f"rho is a tensor (shape (0,), float32, cpu): {ONE_ELEMENT}"),
    Argument(
        {"rho": torch.empty(3, device="meta")},
        ValueError,
        f"rho is a tensor (shape (3,), float32, meta): {ONE_ELEMENT}",
        "`rho` is three numbers on a device whose memory is not looked at",
    ),
    Argument({"rho": None}, ValueError, f"rho=None {NOTHING_LEFT}"),
    Argument({"diagonal": "rows"}, ValueError, f"diagonal='rows': {DIAGONALS}"),
    Argument({"diagonal": None}, ValueError, f"diagonal=None: {DIAGONALS}"),
    Argument(
        {"diagonal": np.array(["row", "tensor"])}, ValueError, f"diagonal=array … {DIAGONALS}", "`diagonal` is an array"
    ),
    Argument({"diagonal": "factored", "rho": INF}, ValueError, "rho=inf: pass None, which leaves out the term of rank"),
    Argument({"diagonal": "row", "rho": 0.0}, ValueError, f"rho=0.0: {A_RHO}"),
    Argument(
        {"diagonal": "row", "decoupled_weight_decay": False, "weight_decay": 0.1},
        ValueError,
        "decoupled_weight_decay=False with diagonal='row': the diagonal would divide the decay by the size of the "
        "gradients, … take decoupled_weight_decay=True",
    ),
    Argument({"beta2": 1.0}, ValueError, f"beta2=1.0: {A_MOMENTUM}"),
    Argument({"beta2": NAN}, ValueError, f"beta2=nan: {A_MOMENTUM}"),
    Argument({"beta2": torch.tensor(0.9)}, TypeError, "beta2=tensor(0.9 … : pass a float"),
    Argument({"eps": 0.0}, ValueError, f"eps=0.0: {AN_EPS}"),
    Argument({"eps": -1e-8}, ValueError, f"eps=-1e-08: {AN_EPS}"),
    Argument({"eps": INF}, ValueError, f"eps=inf: {AN_EPS}"),
    Argument({"eps": 1e300}, ValueError, f"eps=1e+300: {AN_EPS}"),
    Argument({"eps": "1e-8"}, TypeError, "eps='1e-8': pass a float"),
    Argument({"weight_decay": -1e-4}, ValueError, f"weight_decay=-0.0001: {NOT_NEGATIVE}"),
    Argument({"weight_decay": NAN}, ValueError, f"weight_decay=nan: {NOT_NEGATIVE}"),
    Argument({"weight_decay": "no"}, TypeError, "weight_decay='no': pass a float"),
    Argument({"decoupled_weight_decay": 1}, TypeError, f"decoupled_weight_decay=1: {A_FLAG}"),
    Argument({"maximize": "yes"}, TypeError, f"maximize='yes': {A_FLAG}"),
    Argument({"skip_nonfinite": None}, TypeError, f"skip_nonfinite=None: {A_FLAG}"),
    Argument(
        {"numerator": "momentum"}, ValueError, "numerator='momentum': take one of 'moment', 'gradient', 'nesterov'"
    ),
    Argument({"fisher": "layer"}, ValueError, f"fisher='layer': {FISHERS}"),
    Argument({"fisher": None}, ValueError, f"fisher=None: {FISHERS}"),
    Argument({"fisher": np.array(["model", "group"])}, ValueError, f"fisher=array … {FISHERS}", "`fisher` is an array"),
    Argument({"state_dtype": torch.float16}, ValueError, f"state_dtype=torch.float16: {MOMENT_TYPES}"),
    Argument({"state_dtype": "float16"}, ValueError, f"state_dtype='float16': {MOMENT_TYPES}"),
    Argument(
        {"state_dtype": np.array([1, 2])},
        ValueError,
        f"state_dtype=array([1, 2]): {MOMENT_TYPES}",
        "`state_dtype` is an array",
    ),
    Argument({"kahan": "on"}, TypeError, "kahan='on': pass True, False or None (on for 16-bit parameters)"),
    Argument({"kahan": 0}, TypeError, "kahan=0: pass True, False or None (on for 16-bit parameters)"),
    Argument({"master_weight_bits": 16}, ValueError, f"master_weight_bits=16: {MASTER_BITS}"),
    Argument({"master_weight_bits": True}, ValueError, f"master_weight_bits=True: {MASTER_BITS}"),
    Argument({"master_weight_bits": "32"}, ValueError, f"master_weight_bits='32': {MASTER_BITS}"),
    Argument(
        {"kahan": True, "master_weight_bits": 32},
        ValueError,
        "kahan=True with master_weight_bits=32: a weight has one kind of lost bits: leave out kahan, or pass "
        "master_weight_bits=None",
    ),
    Argument({"max_grad_norm": 0.0}, ValueError, "max_grad_norm=0.0: it must be greater than 0"),
    Argument({"max_grad_norm": -1.0}, ValueError, "max_grad_norm=-1.0: it must be greater than 0"),
    Argument({"max_grad_norm": NAN}, ValueError, "max_grad_norm=nan: it must be greater than 0"),
    Argument({"max_grad_norm": "1"}, TypeError, "max_grad_norm='1': pass a float"),
    Argument({"capturable": torch.ones(2)}, TypeError, f"capturable=tensor … {A_FLAG}"),
    Argument({"amp_fused": 1}, TypeError, f"amp_fused=1: {A_FLAG}"),
    Argument(
        {"backend": "cublas"},
        ValueError,
        "backend='cublas' is unknown: take one of 'auto', 'cpu', 'cuda', 'triton', 'reference'",
    ),
    Argument({"backend": None}, ValueError, "backend=None is unknown: take one of 'auto', 'cpu'"),
    Argument({"backend": "triton"}, RuntimeError, "backend='triton' cannot run on cpu … take backend='auto'"),
    Argument({"foreach": 1}, TypeError, "foreach=1: pass True, False or None"),
    Argument(
        {"foreach": True, "fused": True},
        ValueError,
        "fused=True asks for a native backend, foreach=True for pure PyTorch: leave one of them out",
    ),
    Argument(
        {"backend": "reference", "fused": True},
        ValueError,
        "fused=True asks for a native backend, backend='reference' for pure PyTorch: leave one of them out",
    ),
    Argument({"in_backward": 1}, TypeError, f"in_backward=1: {A_FLAG}"),
    Argument({"release_grads": 1}, TypeError, f"release_grads=1: {A_FLAG}"),
    Argument(
        {"release_grads": True},
        ValueError,
        "release_grads=True without in_backward=True: gradients are needed until step(); set both",
    ),
    Argument(
        {"in_backward": True, "max_grad_norm": 1.0}, ValueError, f"in_backward=True with max_grad_norm=1.0 {NO_NORM}"
    ),
    Argument(
        {"in_backward": True, "skip_nonfinite": True},
        ValueError,
        f"in_backward=True with skip_nonfinite=True {NO_NORM}",
    ),
    Argument(
        {"in_backward": True, "diagonal": "row", "rho": 0.5},
        ValueError,
        "in_backward=True with diagonal='row' and rho=0.5 is impossible: the term of rank one needs all gradients … "
        "Pass rho=None, or leave out in_backward",
    ),
    Argument(
        {"differentiable": True},
        ValueError,
        "differentiable=True is impossible: the update is made in place; unroll it in plain PyTorch instead",
    ),
]


# Parameters


def _given(
    what: str, make: Callable[[], Any], error: type[Exception], text: str, params: Callable[[Any], Any] = list
) -> Row:
    """A wrong ``params`` argument of the constructor; ``params``: the parameters that are in it."""

    def case(_: str) -> Case:
        given = make()
        return Case(lambda: SOFIM(given), params(given) if isinstance(given, list) else ())

    return Row(what, case, error, text)


def _of_groups(groups: list[Any]) -> list[Any]:
    return [p for group in groups for p in (group["params"] if isinstance(group, dict) else group)]


def _nothing(_: Any) -> list[Any]:
    return []


def _expanded() -> Tensor:
    return torch.ones(3, 1).expand(3, 4).requires_grad_()


def _windows() -> Tensor:
    return torch.ones(6).as_strided((3, 2), (1, 1)).requires_grad_()


def _twice() -> list[Tensor]:
    p = nn.Parameter(torch.ones(2))
    return [p, nn.Parameter(torch.ones(3)), p]


def _across_groups() -> list[dict[str, Any]]:
    p = nn.Parameter(torch.ones(2))
    return [{"params": [p]}, {"params": [nn.Parameter(torch.ones(3)), p]}]


class _Wrapper(Tensor):
    """A tensor that holds another one, as sharded and quantized tensors do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Wrapper:
        made: _Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    inner: Tensor

    def __repr__(self, **_: Any) -> str:
        return "_Wrapper()"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> _Wrapper:
        return _Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


A_MODEL = "pass model.parameters(), or a list of group dicts"
EMPTY = "params is empty: pass model.parameters(), or group dicts with at least one parameter"
FREEZE = "leave it out, or freeze it (requires_grad_(False)) and clear its gradient"
TYPES = f"only float32, float64, bfloat16, float16, complex64, complex128 can be optimized: {FREEZE}"
SHARED = "with which elements may share memory (as after expand()): pass a contiguous copy (.clone())"
WIDE = "is for float32 and 16-bit parameters: put this one into a group with state_dtype=None"

PARAMETERS = [
    _given("a number for parameters", lambda: 3, TypeError, f"params is of type int: {A_MODEL}"),
    _given("nothing at all: `None`", lambda: None, TypeError, f"params is of type NoneType: {A_MODEL}"),
    _given("a model", lambda: nn.Linear(2, 2), TypeError, f"params is of type Linear: {A_MODEL}"),
    _given("a dict", lambda: {"params": one()}, TypeError, f"params is of type dict: {A_MODEL}"),
    _given("a string", lambda: "weights", TypeError, f"params is of type str: {A_MODEL}"),
    _given(
        "one tensor",
        lambda: one()[0],
        TypeError,
        "params is a tensor (shape (2, 3), float32, cpu): pass an iterable of tensors, [tensor]",
    ),
    _given("an empty list", list, ValueError, EMPTY),
    _given("a generator that is used up", lambda: iter([]), ValueError, EMPTY),
    _given("empty groups", lambda: [{"params": []}, {"params": []}], ValueError, EMPTY, _of_groups),
    _given("a group of an iterator that is used up", lambda: [{"params": iter([])}], ValueError, EMPTY, _nothing),
    _given(
        "a group without parameters",
        lambda: [{"lr": 0.1}],
        ValueError,
        "parameter group 0 has no 'params': add the list of its parameters",
        _nothing,
    ),
    _given(
        "a list of parameters for a group",
        lambda: [{"params": one()}, one()],
        TypeError,
        "parameter group 1 is of type list: pass a dict with 'params'",
        _of_groups,
    ),
    _given(
        "a set",
        lambda: [{"params": set(one())}],
        TypeError,
        "parameter group 0: params is a set, which has no fixed order: pass a list",
        _of_groups,
    ),
    _given(
        "a number in a group",
        lambda: [{"params": 3}],
        TypeError,
        "parameter group 0: params is of type int: pass an iterable of tensors",
        _nothing,
    ),
    _given(
        "a name in a group",
        lambda: [{"params": "w"}],
        TypeError,
        "parameter group 0: params is of type str: pass a list of tensors",
        _nothing,
    ),
    _given(
        "a number among parameters",
        lambda: [*one(), 1.0],
        TypeError,
        "parameter 1 of group 0 is of type float: pass tensors, or (name, tensor) pairs",
    ),
    _given(
        "`None` among parameters",
        lambda: [*one(), None],
        TypeError,
        "parameter 1 of group 0 is of type NoneType: pass tensors, or (name, tensor) pairs",
    ),
    _given(
        "a parameter twice",
        _twice,
        ValueError,
        "parameter 2 of group 0 (shape (2,), float32, cpu) is parameter 0 again: pass each parameter once",
    ),
    _given(
        "a parameter in two groups",
        _across_groups,
        ValueError,
        "parameter 1 of group 1 (shape (2,), float32, cpu) is already in group 0: pass each parameter once",
        _of_groups,
    ),
    _given(
        "a parameter of float8",
        lambda: [torch.ones(2).to(torch.float8_e4m3fn).requires_grad_()],
        ValueError,
        f"parameter 0 of group 0 (shape (2,), float8_e4m3fn, cpu): {TYPES}",
    ),
    _given(
        "a sparse parameter",
        lambda: [torch.ones(2).to_sparse().requires_grad_()],
        ValueError,
        "parameter 0 of group 0 … has the layout torch.sparse_coo: pass a dense tensor (to_dense())",
    ),
    _given(
        "a parameter that is the result of an operation",
        lambda: [one()[0] * 2],
        ValueError,
        "parameter 0 of group 0 … is the result of an operation, not a leaf: pass the tensor it was computed from",
    ),
    _given(
        "an expanded parameter",
        lambda: [_expanded()],
        ValueError,
        f"parameter 0 of group 0 … has strides (1, 0), {SHARED}",
    ),
    _given(
        "a parameter of windows that overlap",
        lambda: [_windows()],
        ValueError,
        f"parameter 0 of group 0 … has strides (1, 1), {SHARED}",
    ),
    _given(
        "a nested parameter",
        lambda: [torch.nested.nested_tensor([torch.ones(2)], requires_grad=True)],
        ValueError,
        "parameter 0 of group 0 (nested) is a nested tensor: pass its parts",
        _nothing,
    ),
    _given(
        "a parameter whose conjugation was put off",
        lambda: [torch.ones(2, dtype=torch.complex64).conj().requires_grad_()],
        ValueError,
        "parameter 0 of group 0 … is a lazily conjugated or negated view: pass resolve_conj().resolve_neg() of it",
    ),
    _given(
        "a parameter that waits for its shape",
        lambda: list(nn.LazyLinear(3).parameters()),
        ValueError,
        "parameter 0 of group 0 (uninitialised) is not initialised yet: run one forward pass before making",
        _nothing,
    ),
    _given(
        "a parameter that holds other tensors",
        lambda: [_Wrapper(torch.ones(2)).requires_grad_()],
        ValueError,
        "parameter 0 of group 0 … is of type _Wrapper, which holds other tensors (quantized, say): "
        f"SOFIM updates plain tensors and DTensors; {FREEZE}",
        _nothing,
    ),
    _given(
        "names for some parameters",
        lambda: [("a", one()[0]), one()[0]],
        ValueError,
        "all optimizer params should be with/without names. Some param names are missing",
        _nothing,
    ),
    _given(
        "a group with a `backend`",
        lambda: [{"params": one(), "backend": "reference"}],
        ValueError,
        "parameter group 0 sets backend: pass it to the constructor",
        _of_groups,
    ),
    _given(
        "a group with `fused`",
        lambda: [{"params": one(), "fused": True}],
        ValueError,
        "parameter group 0 sets fused: pass it to the constructor",
        _of_groups,
    ),
    _given(
        "a group with a `numerator` of its own",
        lambda: [{"params": one()}, {"params": one(), "numerator": "gradient"}],
        ValueError,
        "parameter group 1: numerator='gradient', but group 0 has 'moment': numerator holds for the whole optimizer; "
        "set it in the constructor",
        _of_groups,
    ),
    _given(
        "a group whose `diagonal` adapts beside one whose `diagonal` does not",
        lambda: [{"params": one()}, {"params": one(), "diagonal": "factored"}],
        ValueError,
        "parameter group 1: diagonal='factored', but group 0 has 'identity': the diagonals of one optimizer all adapt, "
        "or none does; make two optimizers",
        _of_groups,
    ),
    _given(
        "`rho=None` in one of two groups that share a Fisher matrix",
        lambda: [{"params": one(), "diagonal": "row", "rho": 1.0}, {"params": one(), "diagonal": "row"}],
        ValueError,
        "parameter group 1: rho=None, but group 0 has 1.0: the term of rank one spans the whole model; take "
        "fisher='group', or None in all groups",
        _of_groups,
    ),
    _given(
        "a bfloat16 moment for a float64 parameter",
        lambda: [{"params": _double(), "state_dtype": torch.bfloat16}],
        ValueError,
        f"parameter 0 of group 0 (shape (2,), float64, cpu): state_dtype=torch.bfloat16 {WIDE}",
        _of_groups,
    ),
    _given(
        "a real moment for a complex parameter",
        lambda: [{"params": [torch.ones(2, dtype=torch.complex64).requires_grad_()], "state_dtype": torch.float32}],
        ValueError,
        f"parameter 0 of group 0 (shape (2,), complex64, cpu): state_dtype=torch.float32 {WIDE}",
        _of_groups,
    ),
]


# A group that is added


def _added(what: str, make: Callable[[SOFIM], Any], error: type[Exception], text: str, **options: Any) -> Row:
    def case(_: str) -> Case:
        optimizer = SOFIM(two(), **options)
        group = make(optimizer)
        params = group["params"] if isinstance(group, dict) else group
        return Case(lambda: optimizer.add_param_group(group), params, optimizer)

    return Row(f"`add_param_group()` {what}", case, error, text)


ADDED = [
    _added(
        "of a parameter that is there",
        lambda optimizer: {"params": [*one(), optimizer.param_groups[0]["params"][1]]},
        ValueError,
        "parameter 1 of group 1 (shape (2, 3), float32, cpu) is already in group 0: pass each parameter once",
    ),
    _added("of a list", lambda _: one(), TypeError, "parameter group 1 is of type list: pass a dict with 'params'"),
    _added(
        "with a `max_grad_norm` of its own",
        lambda _: {"params": one(), "max_grad_norm": 1.0},
        ValueError,
        "parameter group 1: max_grad_norm=1.0, but group 0 has None: max_grad_norm holds for the whole optimizer; "
        "set it in the constructor",
    ),
    _added(
        "of a parameter on a device that the backend does not serve",
        lambda _: {"params": [torch.empty(2, device="meta")]},
        RuntimeError,
        "backend='cpu' cannot run on meta (cpu: it runs on the CPU, not on meta): take backend='auto'",
        backend="cpu",
    ),
    _added(
        "of 16-bit parameters, with `in_backward=True` and the gradient form",
        lambda _: {"params": [torch.ones(2, dtype=torch.bfloat16).requires_grad_()]},
        ValueError,
        "parameter 0 of group 1 (shape (2,), bfloat16, cpu): in_backward=True with numerator='gradient' would round "
        "it twice … take numerator='moment', leave out in_backward, or keep the weights in float32, or in bfloat16 "
        "with master_weight_bits=32",
        in_backward=True,
        kahan=True,
        numerator="gradient",
    ),
    _added(
        "of bfloat16 parameters with `master_weight_bits=24`, `in_backward=True` and the gradient form",
        lambda _: {"params": [torch.ones(2, dtype=torch.bfloat16).requires_grad_()]},
        ValueError,
        "parameter 0 of group 1 (shape (2,), bfloat16, cpu): in_backward=True with numerator='gradient' would round "
        "it twice … with master_weight_bits=32",
        in_backward=True,
        master_weight_bits=24,
        numerator="gradient",
    ),
    _added(
        "of 16-bit parameters, with `in_backward=True` and the look-ahead",
        lambda _: {"params": [torch.ones(2, dtype=torch.float16).requires_grad_()]},
        ValueError,
        "parameter 0 of group 1 (shape (2,), float16, cpu): in_backward=True with numerator='nesterov' would round it "
        "twice … take numerator='moment', leave out in_backward, or keep the weights in float32",
        in_backward=True,
        numerator="nesterov",
    ),
]


# What a step finds: gradients, and parameters, state and groups that have changed since they were checked


def _met(
    what: str,
    spoil: Callable[[SOFIM, list[nn.Parameter]], object],
    error: type[Exception],
    text: str,
    *,
    steps: int = 1,
    make: Callable[[], list[Any]] = two,
    **options: Any,
) -> Row:
    """Something that is spoiled after a number of steps, before the next one."""

    def case(backend: str) -> Case:
        params = make()
        optimizer = SOFIM(params, backend=backend, **options)
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        give_ones(flat)
        for _ in range(steps):
            optimizer.step()
        spoil(optimizer, flat)
        return Case(optimizer.step, optimizer=optimizer)

    return Row(what, case, error, text, BOTH)


def _data(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[SOFIM, list[nn.Parameter]], None]:
    """Replaces the second parameter's memory by one of another shape and dtype; its gradient stays."""

    def spoil(_: SOFIM, params: list[nn.Parameter]) -> None:
        params[1].data = torch.ones(*shape, dtype=dtype)

    return spoil


def _made_to_share(_: SOFIM, params: list[nn.Parameter]) -> None:
    params[1].data = torch.ones(2, 1).expand(2, 3)


def _data_and_gradient(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[SOFIM, list[nn.Parameter]], None]:
    def spoil(_: SOFIM, params: list[nn.Parameter]) -> None:
        params[1].grad = None
        params[1].data = torch.ones(*shape, dtype=dtype)
        params[1].grad = torch.ones(*shape, dtype=dtype)

    return spoil


def _gradient(make: Callable[[], Tensor]) -> Callable[[SOFIM, list[nn.Parameter]], None]:
    def spoil(_: SOFIM, params: list[nn.Parameter]) -> None:
        grad = make()
        if grad.dtype != params[1].dtype:
            params[1].grad_dtype = None
        params[1].grad = grad

    return spoil


def _a_gradient_for(
    make: Callable[[], Tensor], dtype: torch.dtype | None = None
) -> Callable[[SOFIM, list[nn.Parameter]], None]:
    """A frozen parameter, of which the optimizer accepts any kind, gets a gradient."""

    def spoil(optimizer: SOFIM, _: list[nn.Parameter]) -> None:
        frozen = make()
        optimizer.add_param_group({"params": [frozen]})
        if dtype is not None:
            frozen.grad_dtype = None
        frozen.grad = torch.ones(frozen.shape, dtype=dtype or frozen.dtype)

    return spoil


def _lost(name: str) -> Callable[[SOFIM, list[nn.Parameter]], None]:
    """Deletes an entry of the second parameter's state."""
    return lambda optimizer, params: optimizer.state[params[1]].__delitem__(name)


def _entry(name: str, value: Any) -> Callable[[SOFIM, list[nn.Parameter]], None]:
    """Replaces an entry of the second parameter's state."""
    return lambda optimizer, params: optimizer.state[params[1]].__setitem__(name, value)


def _set(**values: Any) -> Callable[[SOFIM, list[nn.Parameter]], None]:
    """Writes values into the last group, as schedulers and users do."""
    return lambda optimizer, _: optimizer.param_groups[-1].update(values)


def _scaling(name: str, value: Any) -> Callable[[SOFIM, list[nn.Parameter]], None]:
    return lambda optimizer, _: setattr(optimizer, name, value)


def _without_rho(optimizer: SOFIM, _: list[nn.Parameter]) -> None:
    del optimizer.param_groups[0]["rho"]


def _a_late_first(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
    """The first parameter has no state yet, and would get it before the second one's is checked."""
    del optimizer.state[params[0]]
    optimizer.param_groups[0]["state_dtype"] = torch.bfloat16


def _groups_of_two() -> list[Any]:
    return [{"params": one()}, {"params": one()}]


def _narrow() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]


def _double() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, dtype=torch.float64))]


GRADIENT = "gradient of parameter 1 of group 0"
ANEW = "call zero_grad() and backward() again"
CAST = f"cast it (param.grad = param.grad.to(param.dtype)), or {ANEW}"
CAST_UNSET = (
    "set param.grad_dtype = param.dtype before backward(), or cast the gradient after it (param.grad_dtype = None, "
    "then param.grad = param.grad.to(param.dtype))"
)
STATE = "state of parameter 1"
SINCE = "after its first step the parameter was"
MOVED = (
    f"{SINCE} moved or cast, or its group's state_dtype changed; optimizer.load_state_dict(optimizer.state_dict()) "
    "moves and casts the state to match"
)
RESIZED = f"{SINCE} resized, … delete the parameter's state to start it anew (del optimizer.state[param])"
DENSE = "SOFIM takes dense gradients (nn.Embedding(sparse=False), to_dense())"
REPLACED = "put a tensor like it in its place, or delete the parameter's state to start it anew"
SET_IT = "set a number or a one-element tensor, or delete it"
SET_ONE = "set a real one with one element, or delete it"

MET = [
    _met(
        "a gradient of another shape: the parameter was resized",
        _data(5),
        ValueError,
        f"{GRADIENT} (shape (5,), float32, cpu) has the shape (2, 3): {ANEW}",
    ),
    _met(
        "a gradient of another dtype: the parameter was cast",
        _data(2, 3, dtype=torch.float64),
        ValueError,
        f"{GRADIENT} (shape (2, 3), float64, cpu) is float32: it must be float64; {CAST}",
    ),
    _met(
        "a sparse gradient",
        _gradient(lambda: torch.ones(2, 3).to_sparse()),
        ValueError,
        f"{GRADIENT} … has the layout torch.sparse_coo: {DENSE}",
    ),
    _met(
        "a sparse gradient in the first step",
        _gradient(lambda: torch.ones(2, 3).to_sparse()),
        ValueError,
        f"{GRADIENT} … has the layout torch.sparse_coo: {DENSE}",
        steps=0,
    ),
    _met(
        "a gradient of integers",
        _gradient(lambda: torch.ones(2, 3, dtype=torch.int64)),
        ValueError,
        f"{GRADIENT} … is int64: it must be float32; {CAST_UNSET}",
    ),
    _met(
        "a gradient in bfloat16, by `grad_dtype`",
        _gradient(lambda: torch.ones(2, 3, dtype=torch.bfloat16)),
        ValueError,
        f"{GRADIENT} … is bfloat16: it must be float32; {CAST_UNSET}",
    ),
    _met(
        "a gradient of a frozen parameter of integers",
        _a_gradient_for(lambda: torch.ones(2, dtype=torch.int64)),
        ValueError,
        f"parameter 2 (shape (2,), int64, cpu): {TYPES}",
    ),
    _met(
        "a gradient in float32 of a frozen parameter of integers",
        _a_gradient_for(lambda: torch.ones(2, dtype=torch.int8), torch.float32),
        ValueError,
        f"parameter 0 of group 1 (shape (2,), int8, cpu): {TYPES}",
    ),
    _met(
        "a parameter that was resized with its gradient",
        _data_and_gradient(5),
        ValueError,
        f"{STATE} (shape (5,), float32, cpu): exp_avg is shape (2, 3), float32, cpu, expected shape (5,), float32, "
        f"cpu: {RESIZED}",
    ),
    _met(
        "a parameter that was cast with its gradient",
        _data_and_gradient(2, 3, dtype=torch.float64),
        ValueError,
        f"{STATE} (shape (2, 3), float64, cpu): exp_avg is shape (2, 3), float32, cpu, expected shape (2, 3), "
        f"float64, cpu: {MOVED}",
    ),
    _met(
        "a moment of another shape",
        _entry("exp_avg", torch.ones(6)),
        ValueError,
        f"{STATE} … exp_avg is shape (6,), float32, cpu, expected shape (2, 3), float32, cpu: {RESIZED}",
    ),
    _met(
        "a moment on another device",
        _entry("exp_avg", torch.ones(2, 3, device="meta")),
        ValueError,
        f"{STATE} … exp_avg is shape (2, 3), float32, meta, expected shape (2, 3), float32, cpu: {RESIZED}",
    ),
    _met(
        "a moment that is a list",
        _entry("exp_avg", [[0.0] * 3] * 2),
        TypeError,
        f"{STATE} … exp_avg is of type list, not a tensor: {REPLACED}",
    ),
    _met(
        "a moment that is gone: `None`",
        _entry("exp_avg", None),
        TypeError,
        f"{STATE} … exp_avg is of type NoneType, not a tensor: {REPLACED}",
    ),
    _met(
        "a sparse moment",
        _entry("exp_avg", torch.ones(2, 3).to_sparse()),
        ValueError,
        f"{STATE} … exp_avg has the layout torch.sparse_coo: {REPLACED}",
    ),
    _met(
        "a moment whose elements share memory",
        _entry("exp_avg", torch.ones(2, 1).expand(2, 3)),
        ValueError,
        f"{STATE} … exp_avg has strides (1, 0), with which elements may share memory (as after expand()): {REPLACED}",
    ),
    _met(
        "a parameter whose elements share memory since it was replaced",
        _made_to_share,
        ValueError,
        "parameter 1 has strides (1, 0), with which elements may share memory (as after expand()): "
        "give it memory of its own (.clone())",
    ),
    _met(
        "the same before its first step",
        _made_to_share,
        ValueError,
        "parameter 1 has strides (1, 0), with which elements may share memory (as after expand()): "
        "give it memory of its own (.clone())",
        steps=0,
    ),
    _met(
        "a moment in its parameter's memory",
        lambda optimizer, params: optimizer.state[params[1]].__setitem__("exp_avg", params[1].data),
        ValueError,
        f"{STATE} … exp_avg shares memory with the parameter: {REPLACED}",
    ),
    _met(
        "one count for two parameters",
        lambda optimizer, params: optimizer.state[params[1]].__setitem__("step", optimizer.state[params[0]]["step"]),
        ValueError,
        f"{STATE} … step shares memory with step of parameter 0: {REPLACED}",
    ),
    _met(
        "a count that is a number of Python's",
        _entry("step", 3),
        TypeError,
        f"{STATE} … step is of type int, not a tensor: {REPLACED}",
    ),
    _met(
        "a count in float32",
        _entry("step", torch.tensor(1.0)),
        ValueError,
        f"{STATE} … step is shape (), float32, cpu, expected a 0-dimensional int64 tensor on cpu: {REPLACED}",
    ),
    _met(
        "two counts for one parameter",
        _entry("step", torch.ones(2, dtype=torch.int64)),
        ValueError,
        f"{STATE} … step is shape (2,), int64, cpu, expected a 0-dimensional int64 tensor on cpu: {REPLACED}",
    ),
    _met(
        "a state that lost its moment",
        _lost("exp_avg"),
        ValueError,
        f"{STATE} (shape (2, 3), float32, cpu) has step and lacks exp_avg: put it back, or delete the",
    ),
    _met(
        "a state that lost its count",
        _lost("step"),
        ValueError,
        f"{STATE} (shape (2, 3), float32, cpu) has exp_avg and lacks step: put it back, or delete the",
    ),
    _met(
        "the name of a `state_dtype`, written into a group",
        _set(state_dtype="bfloat16"),
        ValueError,
        f"parameter group 0: state_dtype='bfloat16': {MOMENT_TYPES}",
        steps=0,
    ),
    _met(
        "a parameter's state that is no dict",
        lambda optimizer, params: optimizer.state.__setitem__(params[1], [1]),
        TypeError,
        f"{STATE} … is of type list, not a dict: delete it to start the parameter anew",
    ),
    _met(
        "lost bits in float32",
        _entry("master_bits", torch.ones(3)),
        ValueError,
        f"{STATE} … master_bits is shape (3,), float32, cpu, expected shape (3,), int16, cpu: {MOVED}",
        make=_narrow,
    ),
    _met(
        "lost bits of another shape",
        _entry("master_bits", torch.ones(2).short()),
        ValueError,
        f"{STATE} … master_bits is shape (2,), int16, cpu, expected shape (3,), int16, cpu: {RESIZED}",
        make=_narrow,
    ),
    _met(
        "a group whose `state_dtype` changed after a first step",
        _a_late_first,
        ValueError,
        f"{STATE} … float32, cpu, expected shape (2, 3), bfloat16, cpu: … or its group's state_dtype changed",
    ),
    _met(
        "a `state_dtype` written into a group that it does not suit",
        _set(state_dtype=torch.bfloat16),
        ValueError,
        f"parameter 0 (shape (2,), float64, cpu): state_dtype=torch.bfloat16 {WIDE}",
        steps=0,
        make=_double,
    ),
    _met(
        "a `diagonal` that adapts, written into a group after a first step",
        _set(diagonal="factored", rho=None),
        ValueError,
        "state of parameter 0 (shape (4,), float32, cpu) has no running means of g², but diagonal='factored' needs "
        "variance: set the diagonal that it was made with, or delete the parameter's state to start it anew (del "
        "optimizer.state[param])",
    ),
    _met(
        "another `diagonal` that adapts, written into a group after a first step",
        _set(diagonal="row"),
        ValueError,
        f"state of parameter 0 … variance is shape (4,), float32, cpu, expected shape (), float32, cpu for "
        f"diagonal='row': {REPLACED}",
        diagonal="factored",
    ),
    _met(
        "means of rows that are gone",
        _lost("row_var"),
        ValueError,
        f"{STATE} … has col_var, but diagonal='factored' needs row_var and col_var: set the diagonal that it was made "
        "with, or delete the parameter's state",
        diagonal="factored",
    ),
    _met(
        "means of rows of another shape",
        _entry("row_var", torch.ones(3)),
        ValueError,
        f"{STATE} … row_var is shape (3,), float32, cpu, expected shape (2,), float32, cpu for diagonal='factored': "
        f"{REPLACED}",
        diagonal="factored",
    ),
    _met(
        "means of columns in float64",
        _entry("col_var", torch.ones(3).double()),
        ValueError,
        f"{STATE} … col_var is shape (3,), float64, cpu, expected shape (3,), float32, cpu for diagonal='factored': "
        f"{REPLACED}",
        diagonal="factored",
    ),
    _met(
        "means of columns that are a list",
        _entry("col_var", [1.0] * 3),
        TypeError,
        f"{STATE} … col_var is of type list, not a tensor: {REPLACED}",
        diagonal="factored",
    ),
    _met(
        "a mean of squares whose elements share memory",
        _entry("variance", torch.ones(1).expand(2, 3)),
        ValueError,
        f"{STATE} … variance has strides (0, 0), with which elements may share memory (as after expand()): {REPLACED}",
        diagonal="element",
    ),
    _met(
        "a mean of squares in its parameter's memory",
        lambda optimizer, params: optimizer.state[params[1]].__setitem__("variance", params[1].data),
        ValueError,
        f"{STATE} … variance shares memory with the parameter: {REPLACED}",
        diagonal="element",
    ),
    _met(
        "an infinite `rho`, written into a group whose `diagonal` adapts",
        _set(rho=INF),
        ValueError,
        "parameter group 0: rho=inf: pass None, which leaves out the term of rank one and its sums",
        diagonal="factored",
    ),
    _met(
        "a learning rate that a schedule made NaN",
        _set(lr=NAN),
        ValueError,
        f"parameter group 1: lr=nan: {NOT_NEGATIVE}",
        make=_groups_of_two,
    ),
    _met(
        "an unknown numerator, written into a group",
        _set(numerator="momentum"),
        ValueError,
        "parameter group 0: numerator='momentum': take one of 'moment', 'gradient', 'nesterov'",
    ),
    _met(
        "`skip_nonfinite`, written into one of two groups",
        _set(skip_nonfinite=True),
        ValueError,
        "parameter group 1: skip_nonfinite=True, but group 0 has False: skip_nonfinite holds for the whole optimizer; "
        "set it in the constructor",
        steps=0,
        make=_groups_of_two,
    ),
    _met(
        "a hyperparameter that was deleted",
        _without_rho,
        ValueError,
        "parameter group 0: rho is missing: set it, or make the optimizer anew",
    ),
    *(
        _met(f"{what}{when}", _scaling(name, value), error, f"{name}{text}", steps=steps)
        for when, steps in (("", 1), (", in the first step", 0))
        for what, name, value, error, text in (
            (
                "`grad_scale` is two numbers",
                "grad_scale",
                torch.ones(2),
                ValueError,
                f" is a tensor (shape (2,), float32, cpu): {SET_ONE}",
            ),
            (
                "`grad_scale` is complex",
                "grad_scale",
                torch.ones((), dtype=torch.complex64),
                ValueError,
                f" is a tensor (shape (), complex64, cpu): {SET_ONE}",
            ),
            ("`grad_scale` is a string", "grad_scale", "8", TypeError, f"='8': {SET_IT}"),
            (
                "`found_inf` is empty",
                "found_inf",
                torch.ones(0),
                ValueError,
                f" is a tensor (shape (0,), float32, cpu): {SET_ONE}",
            ),
            ("`found_inf` is a list", "found_inf", [0.0], TypeError, f"=[0.0]: {SET_IT}"),
        )
    ),
]


# State dicts: good ones, of which one thing is spoiled

Spoil = Callable[[dict[str, Any]], Any]


def _loaded(what: str, spoil: Spoil, error: type[Exception], text: str, **options: Any) -> Row:
    def case(_: str) -> Case:
        params = two()
        optimizer = SOFIM([{"params": params[0]}, {"params": params[1], "lr": 0.1}], **options)
        give_ones(params)
        optimizer.step()
        spoiled = copy.deepcopy(optimizer.state_dict())
        spoiled = spoil(spoiled) or spoiled
        return Case(lambda: optimizer.load_state_dict(spoiled), optimizer=optimizer)

    return Row(f"`load_state_dict()` {what}", case, error, text)


def _another(optimizer: type[torch.optim.Optimizer], **arguments: Any) -> Spoil:
    def other(_: dict[str, Any]) -> Any:
        params = two()
        made = optimizer([{"params": params[0]}, {"params": params[1]}], **arguments)
        give_ones(params)
        made.step()
        return made.state_dict()

    return other


def _without(*path: Any) -> Spoil:
    def spoil(state_dict: dict[str, Any]) -> None:
        inner: Any = state_dict
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return spoil


def _with(*path_and_value: Any) -> Spoil:
    *path, key, value = path_and_value

    def spoil(state_dict: dict[str, Any]) -> None:
        inner: Any = state_dict
        for step in path:
            inner = inner[step]
        inner[key] = value

    return spoil


def _adapting(state_dict: dict[str, Any]) -> None:
    for group in state_dict["param_groups"]:
        group.update(diagonal="factored", rho=None)


def _one_group(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"].pop()


def _for_float64(_: str) -> Case:
    """The loaded group's state_dtype must suit this optimizer's parameters."""
    narrow = SOFIM([nn.Parameter(torch.ones(2))], state_dtype=torch.bfloat16)
    wide = SOFIM(_double())
    return Case(lambda: wide.load_state_dict(narrow.state_dict()), optimizer=wide)


def _codes(
    what: str,
    error: type[Exception],
    text: str,
    *,
    loaded: Any = None,
    held: Any = None,
    lost: bool = False,
    name: str = "exp_avg_scale",
) -> Row:
    """An entry for a moment in 8 bits that is spoiled in a state dict (``loaded``), or before a step (``held``)."""
    diagonal: Any = "element" if name.startswith("variance") else "identity"

    def case(backend: str) -> Case:
        param = nn.Parameter(torch.ones(32, 128))
        optimizer = SOFIM([param], backend=backend, state_dtype=torch.float8_e4m3fn, diagonal=diagonal)
        give_ones([param])
        optimizer.step()
        if held is not None:
            optimizer.state[param][name] = held
            return Case(optimizer.step, optimizer=optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        if lost:
            del saved["state"][0][name]
        else:
            saved["state"][0][name] = loaded
        return Case(lambda: optimizer.load_state_dict(saved), optimizer=optimizer)

    return Row(what, case, error, text, ("reference",))


OURS = "pass what SOFIM.state_dict() returned"
ANOTHERS = "it comes from another optimizer, or is damaged"
OTHER_MODEL = "it was saved for another model"
DAMAGED = "the state dict is damaged"
STATE_0 = "state_dict: state of parameter 0 (shape (4,), float32, cpu)"
STATE_1 = "state_dict: state of parameter 1 (shape (2, 3), float32, cpu)"
A_COUNT = f"expected a count of updates: {DAMAGED}"

STATE_DICTS = [
    _loaded(
        "of SGD's",
        _another(torch.optim.SGD, momentum=0.9),
        ValueError,
        "state_dict: parameter group 0 lacks rho: it comes from another optimizer (it has torch.optim.SGD's dampening "
        "and nesterov): load it into an SGD optimizer, and convert that with SOFIM.from_sgd()",
    ),
    _loaded(
        "of Adam's",
        _another(torch.optim.Adam),
        ValueError,
        "state_dict: parameter group 0 lacks momentum, rho: it comes from another optimizer (it has betas, as Adam and "
        "its variants): if it is of a torch.optim.AdamW or Adam, load it into one, and convert that with "
        "SOFIM.from_adamw(); else start SOFIM without it",
    ),
    _loaded("of a list", lambda _: [1], TypeError, f"state_dict is of type list: {OURS}"),
    _loaded("of a number", lambda _: 5, TypeError, f"state_dict is of type int: {OURS}"),
    _loaded("without state", _without("state"), ValueError, f"state_dict has no 'state': {OURS}"),
    _loaded("without groups", _without("param_groups"), ValueError, f"state_dict has no 'param_groups': {OURS}"),
    _loaded(
        "with a list of states",
        _with("state", [1]),
        TypeError,
        "state_dict['state'] is of type list: pass what state_dict() returned",
    ),
    _loaded(
        "with fewer groups",
        _one_group,
        ValueError,
        "state_dict has 1 parameter groups, the optimizer 2: make the optimizer with the groups that it was saved with",
    ),
    _loaded(
        "with a group that is a number",
        _with("param_groups", 0, 5),
        TypeError,
        "state_dict: parameter group 0 is not a dict with a list 'params': it is damaged",
    ),
    _loaded(
        "with a group that lacks `rho`",
        _without("param_groups", 1, "rho"),
        ValueError,
        f"state_dict: parameter group 1 lacks rho: {ANOTHERS}",
    ),
    _loaded(
        "with a negative `rho`",
        _with("param_groups", 1, "rho", -1.0),
        ValueError,
        f"parameter group 1: rho=-1.0: {A_RHO}",
    ),
    _loaded(
        "with `lr=10**400`",
        _with("param_groups", 0, "lr", 10**400),
        ValueError,
        "parameter group 0: lr=inf: it must be finite",
    ),
    _loaded(
        "with a momentum that is NaN",
        _with("param_groups", 0, "momentum", NAN),
        ValueError,
        "parameter group 0: momentum=nan: it must be finite",
    ),
    _loaded(
        "with an empty group that has settings of Adam's",
        _with("param_groups", 0, {"params": [], "lr": 0.1, "betas": (0.9, 0.999)}),
        ValueError,
        "state_dict: parameter group 0 lacks momentum, rho: it comes from another optimizer (it has betas",
    ),
    _loaded(
        "with a moment in float16",
        _with("param_groups", 0, "state_dtype", torch.float16),
        ValueError,
        f"parameter group 0: state_dtype=torch.float16: {MOMENT_TYPES}",
    ),
    _loaded(
        "with a moment in 8 bits where it is kept in float32",
        _with("state", 0, "exp_avg", torch.zeros(4).to(torch.float8_e4m3fn)),
        ValueError,
        f"{STATE_0}: exp_avg is float8_e4m3fn, in which no parameter of this shape keeps its moment: {OTHER_MODEL}, or "
        "is damaged",
    ),
    _codes(
        "`load_state_dict()` with a moment in 8 bits and without its scales",
        ValueError,
        "state_dict: state of parameter 0 (shape (32, 128), float32, cpu) has exp_avg in 8 bits and lacks "
        "exp_avg_scale: it is damaged",
        lost=True,
    ),
    _codes(
        "`load_state_dict()` with scales of a moment in 8 bits for another number of blocks",
        ValueError,
        "state_dict: state of parameter 0 (shape (32, 128), float32, cpu): exp_avg_scale has the shape (32, 2), "
        f"expected (32, 1): {OTHER_MODEL}",
        loaded=torch.zeros(32, 2),
    ),
    _codes(
        "`load_state_dict()` with negative scales of a moment in 8 bits",
        ValueError,
        "state_dict: state of parameter 0 (shape (32, 128), float32, cpu): exp_avg_scale has negative elements, which "
        "no scale is: it is damaged",
        loaded=-torch.ones(32, 1),
    ),
    _codes(
        "`load_state_dict()` with a second moment in 8 bits and without its scales",
        ValueError,
        "state_dict: state of parameter 0 (shape (32, 128), float32, cpu) has variance in 8 bits and lacks "
        "variance_scale: it is damaged",
        lost=True,
        name="variance_scale",
    ),
    _codes(
        "`load_state_dict()` with negative codes of a second moment in 8 bits",
        ValueError,
        "state_dict: state of parameter 0 (shape (32, 128), float32, cpu): variance has negative elements, which no "
        "mean of squares has: it is damaged",
        loaded=torch.full((32, 128), -1.0).to(torch.float8_e4m3fn),
        name="variance",
    ),
    _loaded(
        "with more parameters",
        _with("param_groups", 0, "params", [0, 2]),
        ValueError,
        "state_dict: parameter group 0 has 2 parameters, the optimizer's 1: make the optimizer with the parameters "
        "that it was saved with",
    ),
    _loaded(
        "with a parameter twice",
        _with("param_groups", 1, "params", [0]),
        ValueError,
        f"state_dict: parameter 0 stands twice in its groups: {DAMAGED}",
    ),
    _loaded(
        "with groups that disagree",
        _with("param_groups", 1, "fisher", "group"),
        ValueError,
        "parameter group 1: fisher='group', but group 0 has 'model': fisher holds for the whole optimizer",
    ),
    _loaded(
        "with a state of no parameter",
        _with("state", 7, {}),
        ValueError,
        "state_dict has a state for parameter 7, which is in none of its groups: it is damaged",
    ),
    _loaded(
        "with a state that is a number",
        _with("state", 0, 3),
        TypeError,
        f"{STATE_0} is of type int, not a dict: {DAMAGED}",
    ),
    _loaded(
        "with Adam's state in SOFIM's groups",
        _with("state", 0, {"step": torch.tensor(1.0), "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}),
        ValueError,
        f"{STATE_0} has exp_avg_sq, as Adam and its variants: it comes from another optimizer",
    ),
    _loaded(
        "with SGD's state in SOFIM's groups",
        _with("state", 0, {"momentum_buffer": torch.ones(4)}),
        ValueError,
        f"{STATE_0} has momentum_buffer, as SGD: it comes from another optimizer",
    ),
    _loaded(
        "without a moment",
        _without("state", 0, "exp_avg"),
        ValueError,
        f"{STATE_0} has the entries ['step'] and lacks exp_avg: {ANOTHERS}",
    ),
    _loaded(
        "without a count",
        _without("state", 1, "step"),
        ValueError,
        f"{STATE_1} has the entries ['exp_avg'] and lacks step: {ANOTHERS}",
    ),
    _loaded(
        "of the paper's form, with a `diagonal` that adapts",
        _adapting,
        ValueError,
        f"{STATE_0} lacks variance, which diagonal='factored' needs (without them, its first steps would be ten times "
        "too long): set the group's diagonal to the one that it was saved with",
    ),
    _loaded(
        "without means of rows",
        _without("state", 1, "row_var"),
        ValueError,
        f"{STATE_1} lacks row_var, which diagonal='factored' needs",
        diagonal="factored",
    ),
    _loaded(
        "with means of rows for another model",
        _with("state", 1, "row_var", torch.ones(3)),
        ValueError,
        f"{STATE_1}: row_var has the shape (3,), expected (2,): {OTHER_MODEL}, or with another diagonal than "
        "'factored'",
        diagonal="factored",
    ),
    _loaded(
        "with means of squares that are negative",
        _with("state", 1, "row_var", torch.tensor([1.0, -1.0])),
        ValueError,
        f"{STATE_1}: row_var has negative elements, which no mean of squares has: it is damaged",
        diagonal="factored",
    ),
    _loaded(
        "with means of columns that are complex",
        _with("state", 1, "col_var", torch.ones(3) * 1j),
        ValueError,
        f"{STATE_1}: col_var is complex64: {OTHER_MODEL}",
        diagonal="factored",
    ),
    _loaded(
        "with a moment that is a list",
        _with("state", 0, "exp_avg", [0.0] * 4),
        TypeError,
        f"{STATE_0}: exp_avg is of type list, not a tensor: it is damaged",
    ),
    _loaded(
        "with a moment of another shape",
        _with("state", 1, "exp_avg", torch.ones(3, 2)),
        ValueError,
        f"{STATE_1}: exp_avg has the shape (3, 2), expected (2, 3): {OTHER_MODEL}",
    ),
    _loaded(
        "with a moment of integers",
        _with("state", 0, "exp_avg", torch.ones(4).int()),
        ValueError,
        f"{STATE_0}: exp_avg is int32, torch.strided: {DAMAGED}",
    ),
    _loaded(
        "with a moment of complex numbers",
        _with("state", 0, "exp_avg", torch.ones(4) * 1j),
        ValueError,
        f"{STATE_0}: exp_avg is complex64: {OTHER_MODEL}",
    ),
    _loaded(
        "with a moment without values",
        _with("state", 0, "exp_avg", torch.ones(4, device="meta")),
        ValueError,
        f"{STATE_0}: exp_avg is on the meta device and has no values: load it with its values",
    ),
    _loaded(
        "with two counts for a parameter",
        _with("state", 0, "step", torch.ones(2)),
        ValueError,
        f"{STATE_0}: step has the shape (2,), expected (): {OTHER_MODEL}",
    ),
    _loaded(
        "with a negative count",
        _with("state", 0, "step", torch.tensor(-1)),
        ValueError,
        f"{STATE_0}: step is -1, {A_COUNT}",
    ),
    _loaded(
        "with a count of Python's that is no whole number",
        _with("state", 0, "step", 2.5),
        ValueError,
        f"{STATE_0}: step is 2.5, {A_COUNT}",
    ),
    _loaded(
        "with a count that is NaN",
        _with("state", 0, "step", torch.tensor(NAN)),
        ValueError,
        f"{STATE_0}: step is nan, {A_COUNT}",
    ),
    _loaded(
        "with a count that is infinite",
        _with("state", 0, "step", torch.tensor(INF)),
        ValueError,
        f"{STATE_0}: step is inf, {A_COUNT}",
    ),
    _loaded(
        "with a count that the next step would carry over",
        _with("state", 0, "step", torch.tensor(2**63 - 1)),
        ValueError,
        f"{STATE_0}: step is 9223372036854775807, {A_COUNT}",
    ),
    _loaded(
        "with an entry of yours that has no values",
        _with("state", 0, "mine", torch.ones(2, device="meta")),
        ValueError,
        f"{STATE_0}: 'mine' is on the meta device and has no values: load it with its values",
    ),
    _loaded(
        "with a learning rate that has no value",
        _with("param_groups", 0, "lr", torch.tensor(0.1, device="meta")),
        ValueError,
        "parameter group 0: lr is on the meta device and has no values: load it with its values",
    ),
    _loaded(
        "with a flag that is neither true nor false",
        _with("param_groups", 1, "fused", torch.ones(2)),
        TypeError,
        "parameter group 1: fused=tensor([1., 1.]): pass True or False",
    ),
    _loaded(
        "with a number for a key that is no parameter's",
        _with("state", 7.0, {}),
        ValueError,
        "state_dict has a state for parameter 7.0, which is in none of its groups: it is damaged",
    ),
    _loaded(
        "with a tensor among the parameters' numbers",
        _with("param_groups", 0, "params", [torch.ones(2)]),
        TypeError,
        "state_dict: 'params' of group 0 has a tensor",
    ),
    _loaded(
        "with lost bits of another shape",
        _with("state", 0, "kahan", torch.ones(3)),
        ValueError,
        f"{STATE_0}: kahan has the shape (3,), expected (4,): {OTHER_MODEL}",
    ),
    _loaded(
        "with the lower halves of weights in float32",
        _with("state", 0, "master_bits", torch.ones(4)),
        ValueError,
        f"{STATE_0}: master_bits is float32, torch.strided: the state dict is damaged",
    ),
    Row(
        "`load_state_dict()` with bfloat16 moments, for float64 parameters",
        _for_float64,
        ValueError,
        f"parameter 0 of group 0 (shape (2,), float64, cpu): state_dtype=torch.bfloat16 {WIDE}",
    ),
]

# What happens between the backward pass and the step with ``in_backward=True``


def _too_late(
    what: str,
    spoil: Callable[[SOFIM, list[nn.Parameter]], object],
    error: type[Exception],
    text: str,
    *,
    taken: bool = True,
    release: bool = False,
) -> Row:
    """Something done between ``backward()``, or gradients that are set by hand (``taken=False``), and ``step()``."""

    def case(backend: str) -> Case:
        params = two()
        optimizer = SOFIM(params, backend=backend, in_backward=True, release_grads=release)
        if taken:
            torch.stack([p.sum() for p in params]).sum().backward()
        else:
            give_ones(params)
        spoil(optimizer, params)
        return Case(optimizer.step, optimizer=optimizer)

    return Row(f"with `in_backward=True`, between `backward()` and `step()`: {what}", case, error, text, BOTH)


def _in_two_places(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": params[:1]})


TOO_LATE = [
    _too_late(
        "`clip_grad_norm_()`, whether it clips or not",
        lambda _, params: nn.utils.clip_grad_norm_(params, 1e9),
        RuntimeError,
        "the gradient of parameter 0 of group 0 (shape (4,)) was replaced or changed between backward() and step(): "
        "… To clip, leave out in_backward and pass max_grad_norm= to SOFIM … call step() again to use the gradients "
        "of the backward pass, or load_state_dict() to return to a saved state",
    ),
    _too_late(
        "`zero_grad()`",
        lambda optimizer, _: optimizer.zero_grad(),
        RuntimeError,
        "the gradient of parameter 0 of group 0 (shape (4,)) was removed between backward() and step(): … to call "
        "zero_grad() before step(), leave out in_backward",
    ),
    _too_late(
        "a new gradient, with `release_grads=True`",
        lambda _, params: setattr(params[1], "grad", torch.ones(2, 3)),
        RuntimeError,
        "the gradient of parameter 1 of group 0 (shape (2, 3)) was set again between backward() and step(): …",
        release=True,
    ),
    _too_late(
        "a parameter taken out of its group",
        lambda optimizer, _: optimizer.param_groups[0]["params"].pop(),
        RuntimeError,
        "param_groups were edited between backward() and step(): … Restore the groups and call step() before "
        "editing them, or return to a saved state with load_state_dict()",
    ),
    _too_late(
        "a group's `max_grad_norm` set",
        lambda optimizer, _: optimizer.param_groups[0].update(max_grad_norm=1.0),
        ValueError,
        "in_backward=True with max_grad_norm=1.0 is impossible: the norm of all gradients is known only after",
    ),
    _too_late(
        "`state.clear()`",
        lambda optimizer, _: optimizer.state.clear(),
        RuntimeError,
        "the state of parameter 0 of group 0 was deleted between backward() and step(): … delete state before "
        "backward() or after step()",
    ),
    _too_late(
        "the model cast to float64, with `release_grads=True`",
        lambda _, params: [setattr(p, "data", p.data.double()) for p in params],
        ValueError,
        "state of parameter 0 (shape (4,), float64, cpu): exp_avg is shape (4,), float32, cpu, expected shape (4,), "
        "float64, cpu: … With in_backward=True this has to wait while a step is under way: undo it, call step(), and "
        "do it after that",
        release=True,
    ),
    _too_late(
        "a parameter in two groups, put there by hand",
        _in_two_places,
        ValueError,
        "parameter 0 of group 1 is also parameter 0 of group 0: list each parameter once",
        taken=False,
    ),
]

CODES = [
    _codes(
        "scales of a moment in 8 bits in float64",
        ValueError,
        "state of parameter 0 (shape (32, 128), float32, cpu): exp_avg_scale is shape (32, 1), float64, cpu, expected "
        f"shape (32, 1), float32, cpu: {REPLACED}",
        held=torch.ones(32, 1, dtype=torch.float64),
    ),
    _codes(
        "scales of a moment in 8 bits that are no tensor",
        TypeError,
        "state of parameter 0 (shape (32, 128), float32, cpu): exp_avg_scale is of type float, not a tensor: "
        f"{REPLACED}",
        held=1.0,
    ),
    _codes(
        "scales of a second moment in 8 bits in float64",
        ValueError,
        "state of parameter 0 (shape (32, 128), float32, cpu): variance_scale is shape (32, 1), float64, cpu, expected "
        f"shape (32, 1), float32, cpu: {REPLACED}",
        held=torch.ones(32, 1, dtype=torch.float64),
        name="variance_scale",
    ),
    _codes(
        "a second moment in float32 where it is kept in 8 bits",
        ValueError,
        "state of parameter 0 (shape (32, 128), float32, cpu): variance is shape (32, 128), float32, cpu, expected "
        "shape (32, 128), float8_e4m3fn, cpu for diagonal='element': "
        "optimizer.load_state_dict(optimizer.state_dict()) casts it to match",
        held=torch.ones(32, 128),
        name="variance",
    ),
]

ROWS: list[Row] = [
    *(argument.row() for argument in ARGUMENTS),
    *PARAMETERS,
    *ADDED,
    *MET,
    *CODES,
    *TOO_LATE,
    *STATE_DICTS,
]


def markdown() -> str:
    """The table in Markdown, as docs/reliability.md has it."""
    lines = ["| what | error |", "|---|---|"]
    for row in ROWS:
        lines.append(f"| {row.what} | {row.error.__name__}: `{row.text}` |")
    return "\n".join(lines)
