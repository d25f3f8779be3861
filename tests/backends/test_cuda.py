"""The CUDA backend: launches, arguments, tables and refusals; its numbers are in tests/step/test_matrix.py.

With ``SOFIM_EMULATED=1`` its kernels run on the CPU, in the emulator (``make emulated``); what only a GPU can show is
in tests/backends/test_gpu.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, backends, native
from sofim_fused.backends import cpu, cuda, reference, triton
from tests.backends.support import launches, module
from tests.support.problems import (
    GUARDED,
    NUMERATORS,
    OPTIONS,
    give,
    mixed_problem,
    ready_problem,
    same_bits,
    snapshot,
)
from tests.support.runs import EMULATED

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
made = partial(ready_problem, "cuda")
emulated = pytest.mark.skipif(not EMULATED, reason="runs with SOFIM_EMULATED=1 (make emulated)")


NONE = torch.empty(0)  # no bits are kept


# Launches


@emulated
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_is_one_launch_or_two(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, _ = made([3, 5000, 1, 40, 4096] + [7] * 20, **options)
    optimizer.step()
    for single, expected in ((True, 1), (False, 2), (None, 1)):
        monkeypatch.setattr(cuda, "SINGLE_LAUNCH", single)
        assert launches(optimizer.step) == expected


@emulated
def test_a_large_model_takes_two_launches_by_itself() -> None:
    tile = module().TILE
    for tiles, expected in ((256, 1), (257, 2)):
        optimizer, _ = made([tile * tiles])
        optimizer.step()
        assert launches(optimizer.step) == expected


@emulated
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16, torch.float16], 1),
        ([torch.float32, torch.bfloat16], 2),
        ([torch.float64], 2),
    ],
    ids=str,
)
def test_a_step_of_several_dtypes(dtypes: list[torch.dtype], expected: int) -> None:
    params = [nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in dtypes]
    optimizer = SOFIM(params, backend="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert launches(optimizer.step) == expected


@emulated
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_launch_and_two_give_the_same_bits(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of blocks and threads, which the emulator changes from wait to wait."""
    results = []
    for single in (True, False, True, False):
        monkeypatch.setattr(cuda, "SINGLE_LAUNCH", single)
        optimizer, _ = made([3, 40_001, 9, 4096, 0, 12_289] + [5] * 40, **options)
        for _ in range(4):
            optimizer.step()
        results.append(snapshot(optimizer))
    assert all(same_bits(results[0], other) for other in results[1:])


@emulated
def test_a_refused_launch_becomes_two(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for refused in (True, False):
        optimizer, _ = made([3, 9000])
        optimizer.step()
        if refused:
            monkeypatch.setenv("SOFIM_EMULATED_REFUSES", "1")
            with pytest.warns(UserWarning, match="one launch was refused .* from now on it takes two"):
                optimizer.step()
            monkeypatch.delenv("SOFIM_EMULATED_REFUSES")
            assert launches(optimizer.step) == 2
        else:
            optimizer.step()
            assert launches(optimizer.step) == 1
        results.append(snapshot(optimizer))
    assert same_bits(*results)


# Arguments and tables


@emulated
def test_tiles() -> None:
    tiles_of, tile = module().tiles_of, module().TILE
    assert [tiles_of(n) for n in (0, 1, tile, tile + 1, 3 * tile, 2**40)] == [1, 1, 1, 2, 3, 2**40 // tile]


@emulated
def test_what_fits_into_arguments() -> None:
    """CUDA takes 32,764 bytes of arguments: ResNet-50's tensors need no table, LeNet-5's fit the small ones."""
    fit, small, large = module().fit, module().SMALL_ARGUMENTS, module().ARGUMENTS
    assert (small, large) == (4096, 32764)
    assert fit(small, 10, 1)
    assert fit(large, 161, 2)
    assert not fit(small, 161, 2)
    assert not fit(large, 512, 1)  # 64 bytes each, and what the task takes
    most = max(n for n in range(600) if fit(large, n, 1))
    assert most >= 490


def _most(size: int) -> int:
    return max(n for n in range(600) if module().fit(size, n, 1))


@emulated
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("beyond", [-1, 0, 1])
@pytest.mark.parametrize("size", ["SMALL_ARGUMENTS", "ARGUMENTS"])
def test_as_many_tensors_as_fit_and_one_more(size: str, beyond: int, options: dict[str, Any]) -> None:
    """The same bits as on the CPU, whose code is another one."""
    count = _most(getattr(module(), size)) + beyond
    results = []
    for backend in ("cuda", "cpu"):
        optimizer, _ = ready_problem(backend, [1 + i % 5 for i in range(count)], **options)
        for _ in range(3):
            optimizer.step()
        results.append(snapshot(optimizer))
    assert len(results[0]) >= 3 * count
    _close(*results)


@emulated
@pytest.mark.parametrize("fisher", ["model", "group", "parameter"])
def test_more_groups_than_fit(fisher: str) -> None:
    results = []
    for backend in ("cuda", "cpu"):
        generator = torch.Generator().manual_seed(2)
        params = [nn.Parameter(torch.randn(2, generator=generator)) for _ in range(700)]
        groups: list[dict[str, Any]] = [
            {"params": params[i : i + 2], "lr": 0.01 * (1 + i)} for i in range(0, len(params), 2)
        ]
        groups.append({"params": [nn.Parameter(torch.ones(2))]})  # no gradient: an empty block
        optimizer = SOFIM(groups, fisher=fisher, backend=backend, **GUARDED)
        for p in params:
            p.grad = torch.randn(2, generator=generator)
        for _ in range(3):
            optimizer.step()
        results.append(snapshot(optimizer))
    _close(*results)


def _close(some: list[Any], others: list[Any]) -> None:
    """Equal but for the last digits: logarithms and the order of sums may differ."""
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


@emulated
def test_a_table_is_filled_only_when_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "SINGLE_LAUNCH", True)
    optimizer, params = made([2] * 1000)
    optimizer.step()
    assert launches(optimizer.step) == 1 + 2  # 64,000 bytes, the arguments of two launches
    assert launches(optimizer.step) == 1
    params[7].grad = params[7].grad.clone()  # type: ignore[union-attr]
    assert launches(optimizer.step) == 1 + 2
    optimizer.param_groups[0]["lr"] *= 0.5
    assert launches(optimizer.step) == 1 + 2
    assert launches(optimizer.step) == 1


@emulated
def test_nothing_stale_is_used() -> None:
    """Data, gradients and state that a user replaces are found again in the next step."""
    results = []
    for backend in ("cuda", "cpu"):
        optimizer, params = ready_problem(backend, [6, 5] + [3] * 600)
        for _ in range(2):
            optimizer.step()
        params[0].data = torch.full((6,), 2.0)
        params[1].grad = torch.full((5,), 0.25)
        optimizer.state[params[2]]["exp_avg"] = torch.full((3,), 0.5)
        params[3].grad = None
        for _ in range(2):
            optimizer.step()
        results.append(snapshot(optimizer))
    _close(*results)


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("name", ["lr", "rho"])
def test_hyperparameters_in_the_memory_of_the_device(name: str, dtype: torch.dtype) -> None:
    """Kernels read them; the host does not."""
    results = []
    for value in (torch.tensor(2, dtype=dtype), 2.0):
        optimizer, _ = made([3, 5000], **GUARDED)
        for scale in (1, 2):
            optimizer.param_groups[0][name] = value * scale
            optimizer.step()
            optimizer.step()
        results.append(snapshot(optimizer))
    assert same_bits(*results)


@emulated
def test_mixed_models_on_the_passes_and_in_one_call() -> None:
    """The first step of a tensor goes through the operators, later ones do not, and the bits are the same."""
    results = []
    for by_passes in (True, False):
        problem = mixed_problem((torch.float32, torch.bfloat16, torch.float64), "l2")
        optimizer = SOFIM(problem.groups, backend="cuda", **GUARDED)
        if by_passes:
            optimizer._step_in_one_call = lambda *_: None
        gradients = problem.gradients()
        for _ in range(6):
            give(problem.params, next(gradients))
            optimizer.step()
        results.append(snapshot(optimizer))
    assert same_bits(*results)


def one(w: Tensor) -> tuple[Any, ...]:
    """A list of one tensor for each of the first arguments of an operator."""
    return [w], [w], [w], [], [NONE], [torch.tensor(1)], [0]


@emulated
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops, w: ops.apply(*one(w), torch.ones(2).double(), None, None), "moment: a float64"),
        (lambda ops, w: ops.apply(*one(w), torch.ones(1), None, None), "moment: a float64 vector of 1"),
        (lambda ops, w: ops.accumulate([w], [w], [], [], [], [], [], [0.9], [0.1], None, False), "the lists differ in"),
        (lambda ops, w: ops.dots([w], [w[:1]], [w], [], [NONE], False), "tensor 0: gradient: of another shape"),
        (
            lambda ops, w: ops.commit(
                [w], [w], [w], [], [NONE], [torch.tensor(1)], [0], [0.9], [0.1], None, torch.ones(1).double(), None,
                None, torch.ones(()), None,
            ),
            "gain: one float64",
        ),
    ],
    ids=["too many", "float32", "lists", "shape", "gain"],
)  # fmt: skip
def test_operators_refuse_what_does_not_fit(call: Callable[[Any, Tensor], object], message: str) -> None:
    w = torch.ones(4)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(torch.ops.sofim_fused_emulated, w)
    assert torch.equal(w, torch.ones(4))


@emulated
def test_operators_pass_pytorchs_own_checks() -> None:
    ops = torch.ops.sofim_fused_emulated
    w, g, m = torch.randn(3, 5000).unbind()
    count = torch.zeros((), dtype=torch.int64)
    torch.library.opcheck(ops.dots.default, ([w], [g], [m], [], [NONE], True))
    torch.library.opcheck(ops.accumulate.default, ([w], [g], [m], [], [NONE], [count], [0], [0.9], [0.1], [0.01], True))
    case = Case.of([2, 1])
    method = case.method("group", "nesterov", True)
    sums = case.sums(True, True)
    torch.library.opcheck(ops.fold.default, (*sums, *method, None, 1))
    (blocks,), square = ops.fold(*sums, *method, None, 1)
    torch.library.opcheck(
        ops.solve.default, (blocks, square[0], *method, 1.0, None, None, True), test_utils="test_schema"
    )


# From sums to coefficients, as operators


class Case(NamedTuple):
    """Tensors of three elements each, in groups with settings of their own."""

    w: Tensor
    g: Tensor
    m: Tensor
    steps: list[Tensor]
    hyper: Tensor
    sizes: list[int]

    @staticmethod
    def of(sizes: list[int], l2: float = 0.0) -> Case:
        generator = torch.Generator().manual_seed(len(sizes))
        n = sum(sizes)
        w, g, m = torch.randn(3, n, 3, generator=generator, dtype=torch.float64)
        steps = [torch.tensor(i % 7) for i in range(n)]
        lr, rho = 0.1 + torch.rand(2, len(sizes), generator=generator, dtype=torch.float64)
        rows = [
            [float(lr[i]), 0.9 - 0.1 * i, float(rho[i]), 0.0 if l2 else 0.01, l2 * i, (-1.0) ** i]
            for i in range(len(sizes))
        ]
        return Case(w, g, m, steps, torch.tensor(rows, dtype=torch.float64).view(-1, 6), sizes)

    def per_tensor(self) -> Any:
        """lr, momentum, rho, weight decay, L2 decay and sign, ``[n, 1]`` each."""
        return self.hyper.repeat_interleave(torch.tensor(self.sizes), dim=0).T[:, :, None].unbind()

    def sums(self, l2: bool, guarded: bool) -> list[Tensor | None]:
        w, g, m = self.w, self.g, self.m
        pairs = [
            (m, m, True),
            (m, g, True),
            (m, w, l2),
            (g, g, guarded),
            (g, w, guarded and l2),
            (w, w, guarded and l2),
        ]
        return [(a * b).sum(1) if there else None for a, b, there in pairs]

    def method(self, fisher: str, numerator: str, guarded: bool) -> tuple[Any, ...]:
        which = ["model", "group", "parameter"].index(fisher)
        return (self.steps, self.hyper, self.sizes, which, NUMERATORS.index(numerator), guarded)

    def blocks_of(self, fisher: str) -> Tensor:
        """The Fisher block of each tensor."""
        n = sum(self.sizes)
        if fisher == "group":
            return torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        return torch.zeros(n, dtype=torch.int64) if fisher == "model" else torch.arange(n)

    def expected(self, fisher: str, numerator: str, gain: float, new_moment: Tensor) -> Tensor:
        """The weights after the step, from the vectors themselves."""
        lr, beta, rho, decay, l2, sign = self.per_tensor()
        v = sign * gain * self.g + l2 * self.w
        count = torch.stack(self.steps).double()[:, None] + 1
        unbiased = new_moment / (1 - beta**count)
        ahead = (beta * new_moment + (1 - beta) * v) / (1 - beta ** (count + 1))
        right = {"moment": unbiased, "gradient": v, "nesterov": ahead}[numerator]
        blocks = self.blocks_of(fisher)
        total = torch.zeros(2, max(len(self.sizes), sum(self.sizes), 1), dtype=torch.float64)
        total.index_add_(1, blocks, torch.stack([(unbiased * x / rho).sum(1) for x in (unbiased, right)]))
        s, p = total[:, blocks].unsqueeze(-1)
        direction = (right - unbiased * p / (1 + s)) / rho
        return self.w - lr * decay * self.w - lr * direction


SIZES = [[1], [0, 33, 2], [129, 70, 0, 71]]


@emulated
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("fisher", ["model", "group", "parameter"])
@pytest.mark.parametrize("guarded", [False, True], ids=["plain", "guarded"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_operators_from_sums_to_coefficients(sizes: list[int], guarded: bool, fisher: str, numerator: str) -> None:
    ops = torch.ops.sofim_fused_emulated
    case = Case.of(sizes, 0.0 if len(sizes) == 1 else 0.5)
    method = case.method(fisher, numerator, guarded)
    n, before = sum(sizes), [int(step) for step in case.steps]
    _, beta, _, _, l2, sign = case.per_tensor()
    sums = case.sums(bool(l2.any()), guarded)
    classes = torch.arange(n) % 3
    split, squares = ops.fold(*sums, *method, classes, 3)
    (blocks,), square = ops.fold(*sums, *method, None, 1)
    torch.testing.assert_close(split.sum(0), blocks, rtol=1e-12, atol=1e-12)
    assert not split[:, 0, case.blocks_of(fisher)][(classes + 1) % 3, torch.arange(n)].any() or fisher != "parameter"
    limits: list[Any] = [None, None, None, False]
    gain = 1.0
    if guarded:
        norm = float(case.g.norm())
        torch.testing.assert_close(squares.sum(), square[0], rtol=1e-12, atol=0.0)
        limits = [norm / 8, torch.tensor(2.0), torch.tensor(0.0), True]  # the gradients are twice too large
        gain = 0.25 * 0.5
    moment = beta * case.m + (1 - beta) * (sign * gain * case.g + l2 * case.w) if guarded else case.m
    expected = case.expected(fisher, numerator, gain, moment)
    coefficients, guard = ops.solve(blocks, square[0] if guarded else None, *method, *limits)
    by_weight, by_gradient, by_moment = coefficients.unsqueeze(-1)
    found = by_weight * case.w + by_gradient * gain * case.g + by_moment * moment
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(guard.tolist(), [norm / 2 if guarded else 0.0, gain, 0.0], rtol=1e-14, atol=0.0)
    assert [int(step) for step in case.steps] == [count + 1 for count in before]


@emulated
def test_operators_skip_a_step() -> None:
    ops = torch.ops.sofim_fused_emulated
    for found_inf, square in ((torch.tensor(1.0), 4.0), (None, float("inf"))):
        case = Case.of([2, 1])
        method = case.method("model", "moment", True)
        blocks, _ = ops.fold(*case.sums(False, True), *method, None, 1)
        before = [int(step) for step in case.steps]
        _, guard = ops.solve(blocks[0], torch.tensor(square).double(), *method, 1.0, None, found_inf, True)
        assert guard[2] == 1.0
        assert [int(step) for step in case.steps] == before


@emulated
def test_operators_without_tensors_give_zeros_and_the_norm() -> None:
    """As on a rank that holds nothing of a model."""
    ops = torch.ops.sofim_fused_emulated
    for fisher, count in (("model", 1), ("group", 2), ("parameter", 0)):
        case = Case.of([0, 0])
        method = case.method(fisher, "gradient", True)
        blocks, squares = ops.fold(*case.sums(True, True), *method, torch.zeros(0, dtype=torch.int64), 2)
        assert torch.equal(blocks, torch.zeros(2, 9, count, dtype=torch.float64))
        assert torch.equal(squares, torch.zeros(2, dtype=torch.float64))
        coefficients, guard = ops.solve(blocks[0], torch.tensor(16.0).double(), *method, 1.0, None, None, False)
        assert coefficients.shape == (3, 0)
        assert guard.tolist() == [4.0, 0.25, 0.0]


@emulated
def test_operators_with_more_tensors_than_arguments_hold() -> None:
    """One launch each up to some 4,000 tensors, then one more for each 32 KB of a table; the results are the same."""
    ops = torch.ops.sofim_fused_emulated
    few, many = Case.of([1, 1]), Case.of([1, 5000])
    for case, expected in ((few, 1), (many, 1 + 2)):
        method = case.method("parameter", "moment", False)
        sums = case.sums(False, False)
        before = module().launches()
        blocks, _ = ops.fold(*sums, *method, None, 1)
        coefficients, _ = ops.solve(blocks[0], None, *method, None, None, None, False)
        assert module().launches() - before == 2 * expected
        moment = coefficients[2, :, None] * case.m + coefficients[0, :, None] * case.w
        assert [int(step) for step in case.steps] == [i % 7 + 1 for i in range(sum(case.sizes))]
        torch._foreach_sub_(case.steps, 1)
        torch.testing.assert_close(moment, case.expected("parameter", "moment", 1.0, case.m), rtol=1e-12, atol=1e-12)


@emulated
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm": torch.zeros(3)}, "mm: float64 [3] on cpu is needed, this is Float [3] on cpu"),
        ({"gg": torch.zeros(2).double()}, "gg: float64 [3] on cpu is needed"),
        ({"mg": None}, "mg: this numerator needs it"),
        ({"hyper": torch.zeros(2, 5).double()}, "hyper: float64 [2, 6] on cpu is needed"),
        ({"sizes": [2, 2]}, "sizes: they add up to more than the 3 steps"),
        ({"sizes": [2]}, "sizes: they add up to 2, but there are 3 steps"),
        ({"steps": [torch.tensor(0.0)] * 3}, "steps: one int64 each on cpu is needed, tensor 0 is not"),
        ({"fisher": 3}, "fisher: 0, 1 or 2 is needed, this is 3"),
        ({"numerator": -1}, "numerator: 0, 1 or 2 is needed, this is -1"),
        ({"class_of": torch.zeros(3)}, "class_of: an int64 vector of 3 on cpu is needed"),
        ({"classes": 0}, "classes: 0, but one at least is needed"),
        ({"guarded": True, "gg": None}, "mg, gg: a guarded step needs both"),
    ],
    ids=str,
)
def test_fold_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    case = Case.of([2, 1])
    names = ("steps", "hyper", "sizes", "fisher", "numerator", "guarded")
    given = dict(zip(("mm", "mg", "mw", "gg", "gw", "ww"), case.sums(True, True), strict=True))
    given |= dict(zip(names, case.method("model", "gradient", False), strict=True)) | {"class_of": None, "classes": 1}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.sofim_fused_emulated.fold(**{**given, **change})


@emulated
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": torch.zeros(6, 2).double()}, "blocks: float64 [9, 1] on cpu is needed"),
        ({"square": None}, "square: a guarded step needs it"),
        ({"grad_scale": torch.ones(2)}, "grad_scale: one number is needed, this has 2"),
        ({"found_inf": torch.ones(0)}, "found_inf: one number is needed, this has 0"),
    ],
    ids=str,
)
def test_solve_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    case = Case.of([2, 1])
    names = ("steps", "hyper", "sizes", "fisher", "numerator", "guarded")
    given = dict(zip(names, case.method("model", "gradient", True), strict=True))
    given |= {"blocks": torch.ones(9, 1).double(), "square": torch.ones(()).double(), "max_norm": 1.0}
    given |= {"grad_scale": None, "found_inf": None, "skip_nonfinite": False}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.sofim_fused_emulated.solve(**{**given, **change})
    assert [int(step) for step in case.steps] == [0, 1, 2]  # not changed


# The choice


@emulated
def test_the_emulator_is_taken_by_name_alone() -> None:
    assert backends.choose("cuda", CPU).name == "cuda"
    assert backends.choose("auto", CPU).name != "cuda"
    assert backends.choose(backends.NATIVE, CPU).name != "cuda"
    assert cuda.passes_for(GPU) == "it was built to be emulated on the CPU"


@pytest.mark.parametrize("built", [True, False])
def test_a_gpu_gets_cuda_where_that_was_built_and_else_triton(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = dict(backends._REGISTRY)
    other: Any = type("Other", (reference.ReferencePasses,), {"name": "triton"})
    mine: Any = type("Mine", (reference.ReferencePasses,), {"name": "cuda"})
    monkeypatch.setitem(backends._REGISTRY, "cuda", lambda device: mine() if built else "it was not built")
    monkeypatch.setitem(backends._REGISTRY, "triton", lambda device: other())
    assert list(backends._REGISTRY) == list(registry)
    assert backends.choose("auto", GPU).name == ("cuda" if built else "triton")
    assert backends.choose("triton", GPU).name == "triton"


@pytest.mark.skipif(EMULATED, reason="it is emulated here")
def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda._passes_for.cache_clear()
    monkeypatch.setattr(native, "cuda", lambda: "the CUDA part was not built: there is no nvcc")
    try:
        assert cuda.passes_for(torch.device("meta")) == "it runs on NVIDIA's GPUs, not on meta"
        with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run on cuda:0 \(cuda: .* there is no nvcc\)"):
            backends.choose("cuda", GPU)
    finally:
        cuda._passes_for.cache_clear()


def test_both_backends_of_a_gpu_have_the_same_switch() -> None:
    assert cuda.SINGLE_LAUNCH is None
    assert triton.SINGLE_LAUNCH is None
    assert cpu.passes_for(GPU) == "it runs on the CPU, not on cuda"


# What follows the sums: as many warps as a Fisher block has tensors for


@emulated
@pytest.mark.parametrize("guard", [{}, GUARDED], ids=["plain", "guarded"])
@pytest.mark.parametrize("tensors", [1, 33, 65, 129, 270])
@pytest.mark.parametrize(("fisher", "groups"), [("model", 3), *(("group", n) for n in (1, 2, 3, 9))])
def test_a_fisher_block_has_all_of_its_tensors(
    fisher: str, groups: int, tensors: int, guard: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many to a group as it gives, the last one having the rest. The reference adds up in another order."""
    weights = {}
    for backend, single in (("reference", None), ("cuda", True), ("cuda", False)):
        monkeypatch.setattr(cuda, "SINGLE_LAUNCH", single)
        params = [nn.Parameter(torch.zeros(1 + i % 3)) for i in range(tensors)]
        size = -(-tensors // groups)
        chosen = [{"params": params[at : at + size]} for at in range(0, tensors, size)]
        optimizer = SOFIM(chosen, lr=1.0, rho=0.5, fisher=fisher, backend=backend, **guard)
        for step in range(2):  # a moment of about rho's size: a tensor that is missing shows
            for i, p in enumerate(params):
                p.grad = torch.arange(1.0, 1 + p.numel()) * (1 + (i + step) % 5) / tensors**0.5
            optimizer.step()
        assert optimizer.backends == {CPU: backend}
        weights[backend, single] = torch.cat([p.detach() for p in params])
    assert torch.equal(weights["cuda", True], weights["cuda", False])
    torch.testing.assert_close(weights["cuda", True], weights["reference", None], rtol=1e-5, atol=1e-9)


# The counter of skipped steps


@emulated
def test_a_skipped_step_is_counted_in_the_launch_itself() -> None:
    param = nn.Parameter(torch.ones(5000))
    optimizer = SOFIM([param], skip_nonfinite=True, backend="cuda")
    param.grad = torch.ones_like(param)
    optimizer.step()  # makes state and counter
    counter = optimizer.skipped_steps
    for spoiled, expected in ((False, 0), (True, 1), (True, 2), (False, 2)):
        param.grad = torch.full_like(param, float("nan") if spoiled else 1.0)
        before, version = param.detach().clone(), counter._version
        assert launches(optimizer.step) == 1
        assert optimizer.skipped_steps is counter
        assert int(counter) == expected
        assert counter._version > version
        assert torch.equal(param.detach(), before) == spoiled


@emulated
@pytest.mark.parametrize("counter", [None, torch.zeros((), dtype=torch.int32), torch.zeros(2, dtype=torch.int64)])
def test_a_counter_that_does_not_serve_is_left_alone(counter: Tensor | None) -> None:
    optimizer, (param,) = made([5], skip_nonfinite=True)
    optimizer.step()
    assert param.grad is not None
    param.grad.fill_(float("inf"))
    norm, skipped = module().Step()(optimizer.param_groups, optimizer.state, counter=counter)
    assert (float(norm), int(skipped)) == (float("inf"), 1)
    assert counter is None or not counter.any()
