"""Whole native steps on the CPU with a diagonal that adapts, beside the reference's passes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, backends, native
from sofim_fused.backends import operators
from tests.backends.support import adaptive_operator_samples
from tests.support.problems import give, give_state, same_bits, snapshot

MODULE = native.cpu()
pytestmark = pytest.mark.skipif(isinstance(MODULE, str), reason=f"{MODULE}")

DIAGONALS = ("tensor", "row", "factored", "element")
# Of weights and moments, the tolerance of weights, and that of sums of squares.
DTYPES: dict[str, tuple[torch.dtype, dict[str, Any], float]] = {
    "float64": (torch.float64, {}, 1e-12),
    "float32": (torch.float32, {}, 1e-5),
    "float32, bfloat16 moment": (torch.float32, {"state_dtype": torch.bfloat16}, 1e-5),
    "bfloat16": (torch.bfloat16, {}, 1e-2),
    "float16, bfloat16 moment": (torch.float16, {"state_dtype": torch.bfloat16, "kahan": False}, 1e-2),
}
TILE = 32_768  # kTile in csrc/gather/tiling.h
SQUARES = 131_072  # kSquares in csrc/cpu/adaptive.cpp


def made_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Every order of memory, and sizes around those of vectors and tiles."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    whole = normal(12, 10)
    values = [
        normal(),
        normal(33),
        normal(5, 7),
        normal(1, 40),
        normal(40, 1),
        normal(0, 3),
        normal(3, 0),
        normal(0),
        normal(70, 65),
        normal(8, 3, 3, 3).to(memory_format=torch.channels_last),
        normal(9, 6).t(),
        normal(4, 9, 5).permute(1, 0, 2),
        whole[:, ::2],  # with gaps
        normal(64).view(-1)[1:57].view(7, 8),  # not aligned
        normal(2, TILE // 2 + 17),
        normal(SQUARES // 300, 310),
        normal(30, SQUARES // 29),
        normal(601, 400).t(),
    ]
    if dtype in (torch.float32, torch.float64):
        values += [torch.view_as_complex(normal(*shape, 2)) for shape in ((4, 5), (7,))]
        values.append(torch.view_as_complex(normal(4, 5, 2)).t())
    return [nn.Parameter(value) for value in values]


def gradients(params: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=_wide(p)).to(p.dtype) for p in params]


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


CASES = list(itertools.product(("moment", "gradient", "nesterov"), (None, 0.5), (False, True)))


def take_step(
    optimizer: SOFIM, params: list[nn.Parameter], seed: int, numerator: str, rho: float | None, guarded: bool
) -> None:
    """A step with other gradients and settings than the last one's."""
    give(params, gradients(params, seed=seed))
    for group in optimizer.param_groups:
        group.update(numerator=numerator, rho=rho, max_grad_norm=1.0 if guarded else None)
    optimizer.grad_scale = torch.tensor(4.0) if guarded else None  # type: ignore[attr-defined]
    optimizer.step()


def native_answers(optimizer: SOFIM) -> list[Any]:
    """What the native step answers from now on, call by call."""
    answers: list[Any] = []
    take = optimizer._native_step()

    def noted(*args: Any) -> Any:
        answers.append(take(*args))
        return answers[-1]

    optimizer._step_in_one_call = noted
    return answers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_steps_are_the_reference_s(diagonal: str, dtype: str) -> None:
    """Each numerator, with and without the term of rank one, plain or clipped and unscaled: step after step."""
    torch_dtype, options, tolerance = DTYPES[dtype]
    optimizers, params = [], []
    for backend in ("cpu", "reference"):
        mine = made_parameters(torch_dtype)
        if "state_dtype" in options:  # complex ones have no other moment
            mine = [p for p in mine if not p.is_complex()]
        params.append(mine)
        groups = [{"params": mine[::2]}, {"params": mine[1::2], "weight_decay": 0.1, "maximize": True, "beta2": 0.9}]
        optimizers.append(SOFIM(groups, backend=backend, diagonal=diagonal, lr=0.01, **options))
    answers = native_answers(optimizers[0])
    for number, (numerator, rho, guarded) in enumerate([("moment", None, False), *CASES]):
        for mine, optimizer in zip(params, optimizers, strict=True):
            take_step(optimizer, mine, number, numerator, rho, guarded)
        for p, q in zip(*params, strict=True):
            ours, theirs = (
                {"w": x.detach(), **optimizer.state[x]} for x, optimizer in zip((p, q), optimizers, strict=True)
            )
            for name, value in ours.items():
                if name in ("kahan", "master_bits"):  # what is lost of w; the next steps show that it is kept
                    continue
                precise = {"rtol": min(tolerance, 1e-5), "atol": 1e-30}
                coarse = {"rtol": tolerance, "atol": tolerance / 10}
                if value.dtype == torch.bfloat16:
                    coarse = {"rtol": 1e-2, "atol": 1e-5}  # another last bit of m may round the other way
                expected = precise if "var" in name else coarse
                torch.testing.assert_close(value, theirs[name], **expected)
                value.copy_(theirs[name]) if name != "w" else p.data.copy_(q.data)
            for name in ours.keys() & {"kahan", "master_bits"}:
                ours[name].copy_(theirs[name])
        if rho is not None:
            torch.testing.assert_close(optimizers[0].signal, optimizers[1].signal, rtol=1e-5, atol=0)
        if guarded:
            torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm)
    # A first step is taken once there is state.
    assert [answer is None for answer in answers] == [True] + [False] * 13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_a_step_by_passes_has_the_bits_of_one_in_one_call(diagonal: str, dtype: str) -> None:
    """Weights, state, norm and signal, whatever the order of memory: a third of all cases for each dtype."""
    torch_dtype, options, _ = DTYPES[dtype]
    optimizers, params = [], []
    for _ in range(2):
        mine = made_parameters(torch_dtype)
        if "state_dtype" in options:
            mine = [p for p in mine if not p.is_complex()]
        groups = [{"params": mine[::2]}, {"params": mine[1::2], "weight_decay": 0.1, "maximize": True, "beta2": 0.9}]
        params.append(mine)
        optimizers.append(SOFIM(groups, backend="cpu", diagonal=diagonal, lr=0.01, fisher="group", **options))
        give_state(optimizers[-1])
    answers = native_answers(optimizers[0])
    optimizers[1]._step_in_one_call = lambda *_: None
    first = list(DTYPES).index(dtype) + DIAGONALS.index(diagonal)
    for number, (numerator, rho, guarded) in enumerate(CASES[first % 3 :: 3]):
        for mine, optimizer in zip(params, optimizers, strict=True):
            take_step(optimizer, mine, number, numerator, rho, guarded)
        whole, by_passes = (
            [
                *snapshot(optimizer),
                *(
                    x
                    for x in (optimizer.signal if rho else None, optimizer.grad_norm if guarded else None)
                    if x is not None
                ),
            ]
            for optimizer in optimizers
        )
        assert same_bits(whole, by_passes), (numerator, rho, guarded)
    assert None not in answers


def test_operators_are_what_their_schemas_say() -> None:
    backends.choose("cpu", torch.device("cpu"))  # registers the fake implementations
    samples = adaptive_operator_samples(torch.device("cpu"))
    for name, arguments in samples:
        # adapt and solve_scaled compute on steps and running means, which calls one after the other would change.
        checks = {"test_utils": ("test_schema", "test_faketensor")} if name in ("adapt", "solve_scaled") else {}
        torch.library.opcheck(getattr(torch.ops.sofim_fused, name).default, arguments, **checks)
    assert {name for name, _ in samples} == set(operators.ADAPTIVE)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("squares", 1, [1], "the lists differ in length; grads has 4"),
        ("squares", 1, [0] * 4, "kinds: 1 to 4 are needed, this is 0"),
        ("squares", 1, [3] * 4, "gradient 3: it has no rows"),
        ("squares", 0, [torch.ones(2, 2, dtype=torch.int32)] * 4, "gradient 0: float32, float64"),
        ("adapt", 2, [1, 1], "the lists differ in length; steps has 4"),
        ("adapt", 4, [1, 4, 5, 1], "tensor 2: heights and widths"),
        ("adapt", 6, [torch.ones(4).half()] * 4, "tensor 1: row_var: 4 float32"),
        ("adapt", 10, torch.ones(8), "rows: 8 float64"),
        ("accumulate_scaled", 4, [torch.ones(6)] * 4, "tensor 3: not the running means"),
        ("accumulate_scaled", 10, torch.ones(3).double(), "rows: more factors are needed"),
        ("accumulate_scaled", 10, torch.ones(10).double(), "rows and cols: 9 and 3 factors"),
        ("apply_scaled", 9, torch.ones(3).double(), "moment: a float64 vector of 4"),
        ("commit_scaled", 5, [torch.zeros(0)], "the lists differ in length; params has 4"),
        ("solve_scaled", 1, torch.zeros(2, dtype=torch.bool), "skip: Bool"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_operators_refuse_what_does_not_fit(name: str, place: int, value: Any, message: str) -> None:
    samples = adaptive_operator_samples(torch.device("cpu"))
    arguments = list(next(each for other, each in samples if other == name))
    arguments[place] = value
    before = [x.clone() for x in arguments[0]] if isinstance(arguments[0], list) else []
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.sofim_fused, name)(*arguments)
    assert same_bits(before, arguments[0] if before else [])


@pytest.mark.parametrize("options", [{}, {"rho": 0.5, "fisher": "group"}, {"max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_the_number_of_threads_does_not_change_a_bit(diagonal: str, options: dict[str, Any]) -> None:
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = made_parameters(torch.float32)
            optimizer = SOFIM(params, backend="cpu", diagonal=diagonal, numerator="nesterov", **options)
            for step in range(3):
                if step == 1:
                    answers = native_answers(optimizer)
                give(params, gradients(params, seed=step))
                optimizer.step()
            assert None not in answers
            results.append(snapshot(optimizer))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def adaptive(**options: Any) -> tuple[SOFIM, nn.Parameter]:
    """An optimizer of one parameter that has taken a step, with a gradient for the next one."""
    p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimizer = SOFIM([p], backend="cpu", **{"diagonal": "factored", **options})
    p.grad = torch.linspace(0.5, 2, 12).view(3, 4)
    optimizer.step()
    return optimizer, p


def test_a_skipped_step_changes_nothing_and_has_no_signal() -> None:
    optimizer, p = adaptive(rho=1.0, skip_nonfinite=True)
    answers = native_answers(optimizer)
    optimizer.step()
    before, signal, version = snapshot(optimizer), optimizer.signal, optimizer.state[p]["row_var"]._version
    assert p.grad is not None
    p.grad[1, 1] = torch.inf
    optimizer.step()
    assert same_bits(before, snapshot(optimizer))
    assert optimizer.signal is signal
    assert version == optimizer.state[p]["row_var"]._version
    assert answers[0][2] is signal
    assert answers[1][1:] == (True, None)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_running_means_saturate_and_keep_nan(diagonal: str) -> None:
    """From infinity they could never decay. A NaN has to be seen."""
    optimizer, p = adaptive(diagonal=diagonal)
    answers = native_answers(optimizer)
    names = [name for name in optimizer.state[p] if "var" in name]
    for value in (3e38, torch.nan):
        p.grad = torch.full((3, 4), value)
        optimizer.step()
        for name in names:
            largest = torch.finfo(torch.float32).max
            mean = optimizer.state[p][name]
            assert mean.isnan().all() if value != value else (mean == largest).all()
        if value == value:
            assert p.isfinite().all()
    assert answers == [True, True]


def test_version_counters_of_running_means_are_raised() -> None:
    for diagonal in DIAGONALS:
        optimizer, p = adaptive(diagonal=diagonal)
        before = {name: value._version for name, value in optimizer.state[p].items()}
        answers = native_answers(optimizer)
        optimizer.step()
        assert answers == [True]
        assert all(value._version > before[name] for name, value in optimizer.state[p].items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("row_var", None),
        ("row_var", torch.zeros(4)),
        ("col_var", torch.zeros(4, dtype=torch.float64)),
        ("col_var", torch.zeros(1).expand(4)),
        ("variance", torch.zeros(())),
        ("beta2", 1.0),
        ("eps", 1e-19),
        ("eps", 1e18),
        ("rho", float("inf")),
        ("diagonal", "row"),
        ("weight_decay", -1.0),
    ],
    ids=str,
)
def test_what_is_wrong_is_left_to_python_to_refuse(name: str, value: Any) -> None:
    optimizer, p = adaptive()
    state, (group,) = optimizer.state[p], optimizer.param_groups
    if value is None:
        del state[name]
    else:
        (group if name in group else state)[name] = value
    before = snapshot(optimizer)
    assert not isinstance(MODULE, str)
    assert MODULE.Step()(optimizer.param_groups, optimizer.state) is None
    with pytest.raises((ValueError, TypeError)):
        optimizer.step()
    assert same_bits(before, snapshot(optimizer))


def test_shared_running_means_are_left_to_python() -> None:
    params = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = SOFIM(params, backend="cpu", diagonal="factored")
    give(params, [torch.ones(3, 4)] * 2)
    optimizer.step()
    assert not isinstance(MODULE, str)
    step = MODULE.Step()
    assert step(optimizer.param_groups, optimizer.state) is True
    optimizer.state[params[1]]["col_var"] = optimizer.state[params[0]]["col_var"]
    assert step(optimizer.param_groups, optimizer.state) is None
