"""Tells the memory that training takes, before any of it is allocated: ``python -m sofim_fused.memory gpt2-small``.

What is counted is what each optimizer makes for parameters on PyTorch's meta device, whose tensors have shapes and
dtypes but no memory: for SOFIM by the functions that make the state in a step, for other optimizers by a step. So there
is no second set of rules, and any optimizer can be counted that is written in PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from sofim_fused import checks
from sofim_fused.adasofim import AdaSOFIM
from sofim_fused.dtensor import is_sharded
from sofim_fused.optimizer import SOFIM
from sofim_fused.shapes import MODELS, elements
from sofim_fused.step import gather

META = torch.device("meta")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_8_BITS = torch.float8_e4m3fn
_RELEASED: dict[str, Any] = {"in_backward": True, "release_grads": True}


class Choice(NamedTuple):
    """An optimizer and its arguments."""

    kind: Callable[..., Optimizer]
    arguments: Mapping[str, Any]


# What is shown if no argument of SOFIM is given.
OTHERS = {
    "SGD(momentum=0.9)": Choice(SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": Choice(AdamW, {"lr": 1e-3}),
}
OURS = {
    "SOFIM": Choice(SOFIM, {}),
    "SOFIM, bfloat16 moment": Choice(SOFIM, {"state_dtype": torch.bfloat16}),
    "SOFIM, 8-bit moment": Choice(SOFIM, {"state_dtype": _8_BITS}),
    "AdaSOFIM": Choice(AdaSOFIM, {}),
    "AdaSOFIM, 8-bit moment": Choice(AdaSOFIM, {"state_dtype": _8_BITS}),
    "AdaSOFIM, element, 8-bit moments": Choice(AdaSOFIM, {"diagonal": "element", "state_dtype": _8_BITS}),
}


class Use(NamedTuple):
    """The memory that weights, gradients and the state of an optimizer take, in bytes.

    Not in it: activations, buffers of modules, temporary memory, and what an allocator rounds sizes up by.

    Attributes:
        parameters: how many elements the parameters have.
        weights: of all parameters, frozen ones too.
        gradients: of all parameters that are trained, each in its parameter's dtype.
        largest: the largest one of these.
        state: all tensors of the optimizer's state.
        entries: the state by the names of its entries.
        releases: whether the optimizer frees each gradient as soon as it has used it (``release_grads=True``).
    """

    parameters: int
    weights: int
    gradients: int
    largest: int
    state: int
    entries: Mapping[str, int]
    releases: bool

    @property
    def peak(self) -> int:
        """Weights, state, and the gradients that there are at once: all of them, or the largest if they are released.

        A weight that a model uses twice, such as an embedding that is also the last layer, has two gradients for a
        moment, until autograd has added them: that is one more of them than is counted here.
        """
        return self.weights + self.state + (self.largest if self.releases else self.gradients)


def count(optimizer: Optimizer) -> Use:
    """Count the memory of training with an optimizer.

    Args:
        optimizer: made for parameters on the meta device. It is not changed: a copy of it makes its state.

    Raises:
        TypeError, ValueError: a parameter is not on the meta device, or is a ``DTensor``; or the optimizer itself
            refuses a parameter.

    Example:
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(1024, 1024, dtype=torch.bfloat16)
        >>> use = count(SOFIM(model.parameters(), state_dtype=torch.float8_e4m3fn))
        >>> use.peak / use.parameters  # bytes per parameter
        7.03...
    """
    for index, group in enumerate(optimizer.param_groups):
        for place, param in enumerate(group["params"]):
            where = f"parameter {place} of group {index}"
            if is_sharded(param):
                raise ValueError(f"{where} is a DTensor: count the memory of the model before it is sharded")
            if param.device != META:
                raise ValueError(
                    f"{where} is on {param.device}, and what is counted must have no memory: make the model under "
                    "torch.device('meta')"
                )
    twin = copy.deepcopy(optimizer)
    params = [param for group in twin.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.empty_like(param) if param.requires_grad else None
    grads = [param.nbytes for param in params if param.requires_grad]
    if isinstance(twin, SOFIM):  # thousands of operators of a step on this device would take minutes
        for entry in gather.with_gradients(twin.param_groups):
            gather.check_state(entry, twin.param_groups[entry.group], twin.state)
            gather.ensure_state(entry, twin.param_groups[entry.group], twin.state)
    else:
        twin.step()
    entries: dict[str, int] = {}
    for state in twin.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                entries[name] = entries.get(name, 0) + value.nbytes
    return Use(
        parameters=sum(param.numel() for param in params),
        weights=sum(param.nbytes for param in params),
        gradients=sum(grads),
        largest=max(grads, default=0),
        state=sum(entries.values()),
        entries=entries,
        releases=bool(getattr(optimizer, "_release_grads", False)),
    )


def parameters(shapes: Iterable[Sequence[int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters of these shapes on the meta device, to make an optimizer for."""
    return [nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device=META)) for shape in shapes]


# The command


class _Model(NamedTuple):
    """What the command line names: shapes, and which of the parameters are trained."""

    shapes: Sequence[tuple[int, ...]]
    trained: Sequence[bool]

    def parameters(self, dtype: torch.dtype) -> list[Tensor]:
        made = parameters(self.shapes, dtype)
        return [param.requires_grad_(trained) for param, trained in zip(made, self.trained, strict=True)]


def _model(text: str) -> _Model:
    """A model from its name, ``package.module:callable``, or shapes such as ``12*2048x2048,2048``.

    Raises:
        ValueError: it is none of these, or what the callable returns is not a module with parameters.
    """
    if text in MODELS:
        shapes: list[tuple[int, ...]] = MODELS[text]()
        return _Model(shapes, [True] * len(shapes))
    if ":" in text:
        return _from_module(text)
    shapes = []
    for part in text.split(","):
        read = re.fullmatch(r"\s*(?:(\d+)\*)?(\d+(?:x\d+)*)\s*", part)
        if read is None:
            raise ValueError(
                f"{part!r} in MODEL is no shape: take {', '.join(MODELS)}, package.module:callable, or shapes such as "
                "12*2048x2048,2048"
            )
        shapes += [tuple(map(int, read[2].split("x")))] * int(read[1] or 1)
    return _Model(shapes, [True] * len(shapes))


def _from_module(text: str) -> _Model:
    name, _, attribute = text.partition(":")
    try:
        new_model = getattr(importlib.import_module(name), attribute)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"MODEL {text!r} cannot be imported: {error}") from None
    try:
        with torch.device(META):  # its tensors are made there, unless the callable names another device
            model = new_model()
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"MODEL: {text}() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"MODEL: {text}() returned {type(model).__name__}: it has to return a torch.nn.Module")
    params = list(model.parameters())
    return _Model([tuple(param.shape) for param in params], [param.requires_grad for param in params])


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"{', '.join(MODELS)}; or package.module:callable, which returns a torch.nn.Module; or shapes, such as "
        "12*2048x2048,2048",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"], help="of the weights"
    )
    arguments = parser.add_argument_group("arguments of SOFIM that the memory depends on (with any of them, only it)")
    arguments.add_argument("--diagonal", choices=checks.DIAGONALS)
    arguments.add_argument("--state-dtype", choices=["float32", "bfloat16", "float8_e4m3fn"])
    arguments.add_argument("--master-weight-bits", choices=["32", "24", "none"])
    arguments.add_argument("--kahan", choices=["true", "false"])
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, for each dtype and optimizer")


def run(options: argparse.Namespace) -> Iterator[str]:
    """What the command prints.

    Raises:
        ValueError: an argument is refused.
    """
    model = _model(options.model)
    if not elements(model.shapes):
        raise ValueError(f"MODEL {options.model!r} has no parameters")
    choices = _choices(options)
    rows = [_row(name, choice, dtype, model) for dtype in options.dtype for name, choice in choices.items()]
    if options.json:
        yield json.dumps({"model": options.model, "rows": rows}, indent=1)
    else:
        yield from _table(options.model, model, rows)


def _choices(options: argparse.Namespace) -> dict[str, Choice]:
    given: dict[str, Any] = {}
    if options.diagonal is not None:
        given["diagonal"] = options.diagonal
    if options.state_dtype is not None:
        given["state_dtype"] = options.state_dtype
    if options.master_weight_bits is not None:
        bits = options.master_weight_bits
        given["master_weight_bits"] = None if bits == "none" else int(bits)
    if options.kahan is not None:
        given["kahan"] = options.kahan == "true"
    if not given:
        return {**OTHERS, **OURS}
    return {**OTHERS, f"SOFIM({', '.join(f'{key}={value!r}' for key, value in given.items())})": Choice(SOFIM, given)}


def _row(name: str, choice: Choice, dtype: str, model: _Model) -> dict[str, Any]:
    params = model.parameters(DTYPES[dtype])
    new_optimizer: Callable[..., Optimizer] = choice.kind
    use, released = count(new_optimizer(params, **choice.arguments)), None
    if new_optimizer in (SOFIM, AdaSOFIM):
        with contextlib.suppress(ValueError):  # not all arguments allow it
            released = count(new_optimizer(params, **choice.arguments, **_RELEASED)).peak
    return {
        "dtype": dtype,
        "optimizer": name,
        "parameters": use.parameters,
        "weights": use.weights,
        "gradients": use.gradients,
        "largest_gradient": use.largest,
        "state": use.state,
        "entries": dict(use.entries),
        "peak": use.peak,
        "peak_release_grads": released,
    }


def _table(name: str, model: _Model, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    size, largest = rows[0]["parameters"], max(map(math.prod, model.shapes))
    yield f"{name}: {size:,} parameters in {len(model.shapes)} tensors, the largest of {largest:,}"
    yield "Bytes per parameter, and GB (1e9 bytes) in all, without activations, buffers and temporary memory."
    yield "Released: with in_backward=True and release_grads=True, which free each gradient once it has been used."
    width = max(30, *(len(row["optimizer"]) for row in rows))
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        yield ""
        yield f"{f'{dtype} weights':<{width}} weights gradients  state   peak     GB released     GB"
        for row in rows:
            if row["dtype"] != dtype:
                continue
            cells = [f"{row[key] / size:{width_of}.2f}" for key, width_of in (("weights", 7), ("gradients", 9))]
            cells += [f"{row['state'] / size:6.2f}"]
            for key, width_of in (("peak", 6), ("peak_release_grads", 8)):
                if row[key] is not None:
                    cells += [f"{row[key] / size:{width_of}.2f}", f"{_gigabytes(row[key]):>6}"]
            yield f"{row['optimizer']:<{width}} {' '.join(cells)}"
    kept = [row["optimizer"] for row in rows if "master_bits" in row["entries"]]
    if kept:
        cut = any("master_weight_bits=24" in name for name in kept)
        bits = "1 byte, with which they have 24 bits" if cut else "2 bytes that make float32 weights of them"
        yield ""
        yield f"SOFIM's state of bfloat16 weights includes {bits}."


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m sofim_fused.memory", description=__doc__.splitlines()[0])
    configure(parser)
    options = parser.parse_args(arguments)
    try:
        print("\n".join(run(options)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
