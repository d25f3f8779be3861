"""The CUDA kernels of a diagonal that adapts, beside the reference: shapes, layouts and storage that other tests lack.

With ``SOFIM_EMULATED=1`` they run on the CPU (``make emulated``); on a GPU they run as they are. Steps beside the
oracle are in tests/step/test_matrix.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from sofim_fused import SOFIM, backends
from sofim_fused.backends import StepTensors, Variance, operators
from tests.backends.support import Watching, adaptive_operator_samples, launches
from tests.step.support import full_weight
from tests.support.covering import chosen
from tests.support.problems import GUARDED, same_bits, snapshot
from tests.support.runs import EMULATED, INTERPRETED

pytestmark = [] if EMULATED else [pytest.mark.gpu]
DEVICE = torch.device("cpu" if EMULATED or INTERPRETED or not torch.cuda.is_available() else "cuda")

# Rows and columns: one of them, or none; several tiles side by side (512 columns) and above each other (64 rows, or
# more if they are short); 33 tiles above each other, which are added up in two parts; odd lengths and even ones.
MATRICES = [(1, 1), (3, 0), (0, 4), (1, 1300), (700, 1), (65, 25), (70, 520), (5, 1025), (300, 16), (2113, 132)]
SHAPES = [(), (17,), (5000,), (7, 5), (70, 520), (3, 4, 3, 3), (1, 9), (700, 1), (0, 5), (3, 0), (33, 264), (9, 1100)]
TOLERANCES = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def normal(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def offset(x: Tensor) -> Tensor:
    """The same tensor one element after the begin of its storage: its address is no multiple of 16."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_sums_of_squares(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    grads = [normal(shape, dtype, generator) for shape in MATRICES]
    grads += [offset(grads[6]), normal((520, 70), dtype, generator).t(), normal((40_001,), dtype, generator)]
    grads.append(normal((9, 6, 3, 5), dtype, generator).to(memory_format=torch.channels_last))
    by_row = [g.shape[:1] for g in grads]
    for columns in (False, True):
        variances = [
            Variance(torch.empty(rows), torch.empty(g.shape[1:]) if columns else None, None, (1, 1))
            if g.dim() > 1
            else Variance(None, None, torch.empty(()), (1, 1))
            for g, rows in zip(grads, by_row, strict=True)
        ]
        tensors = StepTensors(DEVICE, [], grads, [], [], [], [], variances)
        mine = backends.choose("cuda", DEVICE).squares(tensors)
        theirs = backends.choose("reference", DEVICE).squares(tensors)
        for name in ("total", "rows", "cols"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-13, atol=0)
        again = backends.choose("cuda", DEVICE).squares(tensors)
        assert same_bits(mine[:3], again[:3])  # whatever the order of blocks


def optimizers(dtype: torch.dtype, shapes: Sequence[Any] = SHAPES, **options: Any) -> list[SOFIM]:
    """The same parameters twice, with this backend and with the reference; every second one is not aligned."""
    made = []
    for backend in ("cuda", "reference"):
        generator = torch.Generator().manual_seed(2)
        values = [normal(shape, dtype, generator) for shape in shapes]
        values = [offset(x) if i % 2 else x for i, x in enumerate(values)]
        if len(shapes) > 9:
            values.append(normal((5, 4, 3, 2), dtype, generator).to(memory_format=torch.channels_last))
            values.append(normal((12, 9), dtype, generator).t())
        params = [torch.nn.Parameter(x) for x in values]
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-3, "maximize": True, "beta2": 0.9}]
        made.append(SOFIM(groups, lr=1e-2, weight_decay=0.01, backend=backend, **options))
    return made


def step(optimizer: SOFIM, seed: int, spoil: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = (normal(p.shape, p.dtype, generator) * 10.0 ** (seed % 3 - 1)).contiguous()
    if spoil:
        optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
    optimizer.step()


def assert_alike(mine: SOFIM, theirs: SOFIM, dtype: torch.dtype) -> None:
    for left, right in zip(mine.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(left["params"], right["params"], strict=True):
            a, b = mine.state[p], theirs.state[q]
            assert a.keys() == b.keys()
            bound = TOLERANCES[torch.float64 if dtype == torch.float64 else torch.float32]
            whole = [full_weight(mine, p), full_weight(theirs, q)]
            torch.testing.assert_close(*whole, rtol=bound, atol=max(bound, TOLERANCES[dtype] ** 2), equal_nan=True)
            for name in a.keys() - {"kahan", "master_bits"}:
                # A moment that is rounded at random differs by its last bit where it was nearly the same before.
                loose = 1e-2 if a[name].dtype == torch.bfloat16 else 10 * bound
                torch.testing.assert_close(a[name], b[name], rtol=loose, atol=bound)
    if theirs.signal is None:
        assert mine.signal is None
    else:
        assert mine.signal is not None
        torch.testing.assert_close(mine.signal, theirs.signal, rtol=1e-4, atol=1e-7)


# As many of them as it takes for any two values to meet.
CASES = list(
    product(
        ["tensor", "row", "factored", "element"],
        ["moment", "gradient", "nesterov"],
        [None, 0.3],
        ["plain", "clip", "skip"],
        TOLERANCES,
        [False, True],
    )
)
SCHEDULES: dict[str, dict[str, Any]] = {"plain": {}, "clip": {"max_grad_norm": 0.5}, "skip": {"skip_nonfinite": True}}


@pytest.mark.parametrize(
    ("diagonal", "numerator", "rho", "schedule", "dtype", "rounded"), [CASES[i] for i in chosen(CASES, 2)], ids=str
)
def test_steps_are_those_of_the_reference(
    diagonal: str, numerator: str, rho: float | None, schedule: str, dtype: torch.dtype, rounded: bool
) -> None:
    options: dict[str, Any] = {"diagonal": diagonal, "numerator": numerator, "rho": rho, **SCHEDULES[schedule]}
    if rounded and dtype != torch.float64:
        options["state_dtype"] = torch.bfloat16
    mine, theirs = optimizers(dtype, **options)
    for seed in range(4):
        for optimizer in (mine, theirs):
            step(optimizer, seed, spoil=seed == 2 and schedule == "skip")
    assert_alike(mine, theirs, dtype)
    assert int(mine.skipped_steps) == int(theirs.skipped_steps) == (schedule == "skip")


@pytest.mark.skipif(not EMULATED, reason="the emulator counts launches")
def test_launches_of_a_step() -> None:
    """None waits for the host; where each element has its own variance, nothing has to be known before."""
    for options, expected in (
        ({"diagonal": "factored", "rho": None}, 3),
        ({"diagonal": "factored", "rho": None, **GUARDED}, 3),
        ({"diagonal": "row", "rho": 0.3, "numerator": "nesterov"}, 5),
        ({"diagonal": "element", "rho": None}, 2),
        ({"diagonal": "element", "rho": 0.3, **GUARDED}, 5),
    ):
        optimizer, _ = optimizers(torch.float32, [(7, 5), (33,)], **options)
        step(optimizer, 0)
        assert launches(lambda: step(optimizer, 1)) == expected  # noqa: B023


@pytest.mark.parametrize("options", [{}, {"rho": 0.3, "numerator": "nesterov"}], ids=str)
@pytest.mark.parametrize("diagonal", ["tensor", "row", "factored", "element"])
def test_a_step_in_one_call_has_the_bits_of_passes(diagonal: str, options: dict[str, Any]) -> None:
    results = []
    for watched in (False, True):
        optimizer, _ = optimizers(torch.float32, diagonal=diagonal, **{"rho": None, **options})
        with Watching() if watched else nullcontext():  # a dispatch mode: whole steps would escape it
            for seed in range(3):
                step(optimizer, seed)
        results.append([*snapshot(optimizer), *([] if optimizer.signal is None else [optimizer.signal])])
    assert same_bits(*results)


def test_more_tensors_than_arguments_take() -> None:
    """Then the tables of all launches are in the device's memory."""
    mine, theirs = optimizers(torch.float32, [(3, 5)] * 360, diagonal="factored", numerator="nesterov", rho=0.3)
    for seed in range(2):
        for optimizer in (mine, theirs):
            step(optimizer, seed)
    assert_alike(mine, theirs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_variances_saturate(dtype: torch.dtype) -> None:
    """From infinity they could never decay."""
    for diagonal in ("tensor", "row", "factored", "element"):
        for optimizer in optimizers(dtype, [(4, 3)] * 2, diagonal=diagonal, rho=None):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.full_like(p, torch.finfo(dtype).max / 16)
            optimizer.step()
            largest = torch.finfo(dtype).max
            for state in optimizer.state.values():
                for name in state.keys() & {"row_var", "col_var", "variance"}:
                    assert (state[name] == largest).all()
            assert all(x.isfinite().all() for x in snapshot(optimizer) if x.is_floating_point())


def namespace() -> Any:
    backends.choose("cuda", DEVICE)  # registers the fake implementations
    return torch.ops.sofim_fused_emulated if EMULATED else torch.ops.sofim_fused


def test_the_operators_are_what_their_schemas_say() -> None:
    for name, arguments in adaptive_operator_samples(DEVICE):
        # adapt and solve_scaled compute on steps and running means, which calls one after the other would change.
        checks = ("test_schema", "test_faketensor") if name in ("adapt", "solve_scaled") else None
        operator = getattr(namespace(), name).default
        torch.library.opcheck(operator, arguments, **({} if checks is None else {"test_utils": checks}))
    assert {name for name, _ in adaptive_operator_samples(DEVICE)} == set(operators.ADAPTIVE)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("squares", 1, [1], "the lists differ in length; grads has 4"),
        ("squares", 1, [0] * 4, "kinds: 1 to 4 are needed, this is 0"),
        ("squares", 0, [torch.ones(2, 2, dtype=torch.int32)] * 4, "gradient 0: float32, float64"),
        ("adapt", 2, [1, 1], "sizes: they add up to 2"),
        ("adapt", 6, [torch.ones(4).half()] * 4, "tensor 1: row_var: 4 float32 or float64"),
        ("adapt", 10, torch.ones(8), "rows: 8 contiguous float64"),
        ("accumulate_scaled", 4, [torch.ones(6)] * 4, "tensor 3: variance:"),
        ("accumulate_scaled", 10, torch.ones(3).double(), "rows: 9 contiguous float64"),
        ("apply_scaled", 9, torch.ones(3).double(), "moment: 4 contiguous float64"),
        ("solve_scaled", 1, torch.zeros(2, dtype=torch.bool), "skip: one bool"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_operators_refuse_what_does_not_fit(name: str, place: int, value: Any, message: str) -> None:
    arguments = list(next(each for other, each in adaptive_operator_samples(DEVICE) if other == name))
    arguments[place] = (
        [x.to(DEVICE) for x in value] if isinstance(value, list) and isinstance(value[0], Tensor) else value
    )
    if isinstance(value, Tensor):
        arguments[place] = value.to(DEVICE)
    before = [x.clone() for x in arguments[0]] if isinstance(arguments[0], list) else []
    with pytest.raises(RuntimeError, match=message):
        getattr(namespace(), name)(*arguments)
    assert same_bits(before, arguments[0] if before else [])
