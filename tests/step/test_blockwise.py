"""Moments in 8 bits: the codes against a model of their own, and steps against the oracle."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, AdaSOFIM, backends, blockwise
from sofim_fused.backends.master_bits import joined
from sofim_fused.backends.rounding import random_bits
from tests.step.support import variances_of, within
from tests.support.covering import chosen
from tests.support.oracle import Hyper, Oracle, real64
from tests.support.problems import give, same_bits, snapshot
from tests.support.runs import CPU_BACKENDS, EMULATED, INTERPRETED, once

F8 = torch.float8_e4m3fn
LARGEST = float(torch.finfo(torch.float32).max)
# The positive codes in the order of their bits, from the format's definition.
VALUES = [Fraction(code % 8 + 8 * (code > 7), 8) * Fraction(2) ** (max(code // 8, 1) - 7) for code in range(127)]


def scale_of(block: Sequence[float]) -> Fraction:
    """The scale of a block of finite numbers."""
    largest = max(abs(Fraction(x)) for x in block)
    if largest == 0:
        return Fraction(0)
    return next(s for k in range(-140, 120) if (s := Fraction(2) ** k) * 448 >= largest or k == 119)


def code_of(x: float, scale: Fraction, bits: int | None) -> int:
    """The bits of a code, in exact arithmetic."""
    y = min(abs(Fraction(x)) / scale, Fraction(448)) if scale else Fraction(0)
    below = max(code for code, value in enumerate(VALUES) if value <= y)
    code = below
    if below < 126:
        share = (y - VALUES[below]) / (VALUES[below + 1] - VALUES[below])
        if bits is None:
            code += share > Fraction(1, 2) or (share == Fraction(1, 2) and below % 2)
        else:
            code += share + Fraction(bits, 2**16) >= 1
    return code | (0x80 if math.copysign(1, x) < 0 else 0)


def samples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(3, 300, generator=generator, dtype=torch.float64)
    spread = normal * torch.randn(3, 300, generator=generator, dtype=torch.float64).mul(6).exp()
    found = {f"times {size:g}": (normal * size) for size in (1.0, 1e-20, 3e-38, 1e-40, 3e-44, 1e20, 1e38)}
    found["of many sizes"] = spread
    found["ties"] = torch.arange(900, dtype=torch.float64).view(3, 300) / 16 + 1
    found["a block of zeros"] = torch.cat([torch.zeros(3, 128), normal[:, 128:]], 1)
    found["negative zeros"] = -torch.zeros(3, 300, dtype=torch.float64)
    found["least"] = torch.full((3, 300), 2.0**-149, dtype=torch.float64)
    found["the largest"] = torch.full((3, 300), LARGEST, dtype=torch.float64)
    found["between scales"] = torch.tensor([1.75, math.nextafter(1.75, 2), 1.9999999]).repeat(3, 100)
    return {name: x.clamp(-LARGEST, LARGEST).float() for name, x in found.items()}


@once
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", samples())
def test_codes_and_scales_are_those_of_exact_arithmetic(name: str, stochastic: bool) -> None:
    x = samples()[name]
    bits = random_bits(x, torch.tensor(3), 1) if stochastic else None
    codes, scale = blockwise.encode(x, bits)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (F8, x.shape, torch.float32, (3, 3))
    found, decoded = codes.view(torch.uint8), blockwise.decode(codes, scale)
    for i in range(3):
        for j in range(3):
            part = slice(128 * j, 128 * j + 128)
            block = x[i, part].tolist()
            expected = scale_of(block)
            assert Fraction(scale[i, j].item()) == expected
            chances = [None] * len(block) if bits is None else bits[i, part].tolist()
            codes_here = [code_of(each, expected, chance) for each, chance in zip(block, chances, strict=True)]
            off = [a - b for a, b in zip(found[i, part].tolist(), codes_here, strict=True)]
            # Adding 2^-6 rounds a small number before its random bits are added: rarely, that is one code more or less.
            assert sum(map(abs, off)) <= (1 if stochastic else 0)
            values = [VALUES[code & 0x7F] * expected for code in found[i, part].tolist()]
            assert [abs(Fraction(value)) for value in decoded[i, part].tolist()] == values


@once
@pytest.mark.parametrize("name", samples())
def test_codes_are_those_of_torch(name: str) -> None:
    """Where scaling overflows nothing, the codes are a cast of what was scaled, in float64."""
    x = samples()[name]
    codes, scale = blockwise.encode(x)
    wide = scale.double().repeat_interleave(128, 1)[:, :300]
    scaled = torch.where(wide == 0, 0.0 * x.double(), x.double() / wide).clamp(-448, 448)
    assert torch.equal(scaled.float().to(F8).view(torch.uint8), codes.view(torch.uint8))


@once
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", samples())
def test_what_is_read_back_is_stored_without_a_change(name: str, stochastic: bool) -> None:
    once_stored = blockwise.decode(*blockwise.encode(samples()[name]))
    bits = torch.full(once_stored.shape, 0xFFFF, dtype=torch.int32) if stochastic else None
    assert torch.equal(blockwise.decode(*blockwise.encode(once_stored, bits)), once_stored)


@once
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_number_that_is_not_finite_spoils_its_block_and_no_other(bad: float) -> None:
    x = torch.ones(2, 300)
    x[1, 130] = bad
    for bits in (None, random_bits(x, torch.tensor(1), 0)):
        codes, scale = blockwise.encode(x, bits)
        stored = blockwise.decode(codes, scale)
        assert bool(stored[1, 128:256].isnan().all())
        stored[1, 128:256] = 1
        assert bool((stored == 1).all())
        assert bool((codes[1, 128:256].float() == 0).all())


@once
@pytest.mark.parametrize("value", [0.01, -0.3, 1.03, 1e-6])
def test_stochastic_rounding_has_no_bias(value: float) -> None:
    """Over half a million draws, of a number far below the largest in its block too, whose codes are few."""
    x = torch.full((4096, 128), value)
    x[:, 0] = 1.9
    x[:, 0] *= 1 if abs(value) > 1e-3 else 0.5
    stored = blockwise.decode(*blockwise.encode(x, random_bits(x, torch.tensor(1), 0)))[:, 1:].double()
    low, high = stored.min().item(), stored.max().item()
    exact = x[0, 1].item()
    assert low <= exact <= high
    assert len(stored.unique()) == 2
    share = (exact - low) / (high - low)
    deviation = (stored.mean().item() - exact) / (high - low)
    assert abs(deviation) < 5 * (share * (1 - share) / stored.numel()) ** 0.5 + 2.0**-16


@once
def test_which_tensors_are_stored_in_8_bits() -> None:
    assert [blockwise.suits(shape) for shape in ((32, 128), (1, 4096), (32, 8, 4, 4), (0, 128))] == [True] * 3 + [False]
    assert not any(blockwise.suits(shape) for shape in ((), (1 << 20,), (1 << 20, 127), (31, 128), (64, 0)))
    assert blockwise.scale_shape((5, 3, 43)) == (5, 2)


@once
@pytest.mark.slow
def test_compiled_codes_are_the_same() -> None:
    """Inductor (torch 2.13) crops rows wrongly that were scaled by block: findings/inductor_cropped_blocks.sh."""
    x = samples()["of many sizes"]
    bits = random_bits(x, torch.tensor(1), 0)
    for found, expected in zip(torch.compile(blockwise.encode)(x, bits), blockwise.encode(x, bits), strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    stored = blockwise.encode(x, bits)
    assert torch.equal(torch.compile(blockwise.decode)(*stored), blockwise.decode(*stored))


@once
def test_codes_of_no_elements() -> None:
    codes, scale = blockwise.encode(torch.empty(0, 300))
    assert (codes.shape, scale.shape) == ((0, 300), (0, 3))
    assert blockwise.decode(codes, scale).shape == (0, 300)


@once
def test_the_default_dtype_changes_nothing() -> None:
    x = samples()["times 1e-40"]
    expected = blockwise.encode(x)
    torch.set_default_dtype(torch.float64)
    try:
        found = blockwise.encode(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same_bits([a.view(torch.uint8)], [b.view(torch.uint8)]) for a, b in zip(found, expected, strict=True))


# Steps. Only the last two tensors are too small, or of too few dimensions, for 8 bits.

SHAPES = ((8, 600), (33, 130), (5, 16, 8, 9), (4, 50), (40,))
SCHEDULES: dict[str, dict[str, Any]] = {"plain": {}, "clip": {"max_grad_norm": 1.0}, "skip": {"skip_nonfinite": True}}
DIAGONALS: dict[str, dict[str, Any]] = {
    "identity": {"rho": 2.0},
    "tensor": {"rho": None},
    "row, with a term of rank one": {"rho": 0.5},
    "factored": {"rho": None},
}
if not INTERPRETED:  # Triton declines these: their second moments are in 8 bits, too
    DIAGONALS |= {"element, with a term of rank one": {"rho": 0.5}, "element": {"rho": None}}


# The backends that take codes, and those of them whose codes can be compared with the reference's.
BACKENDS = [] if EMULATED else CPU_BACKENDS
NATIVE: list[Any] = [(name, "cpu") for name in BACKENDS if name != "reference"]
NATIVE.append(pytest.param(("triton", "cuda"), marks=pytest.mark.gpu))


def some(strength: int, *values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """All cases; in Triton's interpreter, where each step takes long, a choice in which any so many values meet."""
    cases = list(itertools.product(*values))
    return [cases[i] for i in chosen(cases, strength)] if INTERPRETED else cases


def params_of(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    params[2] = nn.Parameter(params[2].detach().to(memory_format=torch.channels_last))
    return list(params)


def gradients(params: Sequence[Tensor], count: int) -> list[list[Tensor | None]]:
    generator = torch.Generator().manual_seed(2)
    drift = [torch.randn(p.shape, generator=generator) for p in params]
    return [
        [
            (0.01 * (d + torch.randn(p.shape, generator=generator))).to(p.dtype)
            for p, d in zip(params, drift, strict=True)
        ]
        for _ in range(count)
    ]


def stored_moment(optimizer: SOFIM, p: Tensor) -> Tensor:
    known = optimizer.state.get(p)
    if not known:
        return torch.zeros_like(real64(p))
    if "exp_avg_scale" in known:
        return blockwise.decode(known["exp_avg"], known["exp_avg_scale"]).double()
    return real64(known["exp_avg"])


def quantum(optimizer: SOFIM, p: Tensor, exact: Tensor, name: str = "exp_avg") -> Tensor:
    """The distance of codes around each number: a stochastic rounding is off by less."""
    scale = optimizer.state[p][f"{name}_scale"].double().repeat_interleave(128, 1)
    scale = scale[:, : p.numel() // len(p)].reshape(p.shape)
    return torch.maximum(exact.abs() / 8, scale * 2.0**-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("diagonal", "schedule", "numerator", "dtype"),
    some(1, [*DIAGONALS], [*SCHEDULES], ["moment", "gradient", "nesterov"], [torch.float32, torch.bfloat16]),
    ids=str,
)
def test_each_step_follows_the_oracle(
    diagonal: str, schedule: str, numerator: str, dtype: torch.dtype, backend: str
) -> None:
    params = params_of(dtype)
    kind, options = diagonal.partition(",")[0], {**DIAGONALS[diagonal], **SCHEDULES[schedule]}
    optimizer = SOFIM(
        params,
        lr=0.1,
        diagonal=kind,  # type: ignore[arg-type]
        numerator=numerator,  # type: ignore[arg-type]
        state_dtype=F8,
        kahan=False,
        backend=backend,
        **options,
    )
    rho = math.inf if options["rho"] is None else options["rho"]
    hypers = [Hyper(lr=0.1, rho=rho, diagonal=kind)] * len(params)
    oracle = Oracle([p.detach() for p in params], hypers, [0] * len(params), numerator, options.get("max_grad_norm"))
    # A guarded step, and one without the term of rank one, use the moment before its rounding.
    reads_stored = options["rho"] is not None if kind != "identity" else schedule == "plain"
    for count, grads in enumerate(gradients(params, STEPS)):
        give(params, grads)
        oracle.weights = [real64(p) for p in params]
        oracle.variances = [variances_of(optimizer, p) for p in params]
        optimizer.step()
        stored, variances = [stored_moment(optimizer, p) for p in params], [variances_of(optimizer, p) for p in params]
        oracle.step(grads, *((stored, variances) if reads_stored else ()))
        for i, p in enumerate(params):
            known, exact = optimizer.state[p], oracle.exact[i]
            assert (known["exp_avg"].dtype == F8) is ("exp_avg_scale" in known) is (i < 3), i
            bound = 1e-7 + (1e-6 * exact.abs() if i >= 3 else 1.0001 * quantum(optimizer, p, exact))
            assert within(stored[i], exact, bound), (count, i)
            if kind == "element":
                assert ("variance_scale" in known) is (known["variance"].dtype == F8) is (i < 3), i
                root = oracle.exact_variances[i]["variance"].sqrt()
                bound = 1e-6 * root + (1.0001 * quantum(optimizer, p, root, "variance") if i < 3 else 0)
                assert within(variances[i]["variance"].sqrt(), root, bound), (count, i)
            rounding = 1e-6 if dtype == torch.float32 else 2.0**-8
            assert within(real64(p), oracle.weights[i], rounding * (oracle.weights[i].abs() + 0.1)), (count, i)
        oracle.moments = stored


STEPS = 2 if INTERPRETED else 3


def trained(steps: int = STEPS, start: dict[str, Any] | None = None, **options: Any) -> tuple[SOFIM, list[Tensor]]:
    params = params_of()
    optimizer = SOFIM(params, **{"lr": 0.1, "state_dtype": F8, "backend": "reference", **options})
    if start is not None:
        optimizer.load_state_dict(start)
    for grads in gradients(params, steps):
        give(params, grads)
        optimizer.step()
    return optimizer, params


def bits_of(optimizer: SOFIM) -> list[Tensor]:
    """Parameters and state, those in 8 bits as integers."""
    return [x.view(torch.uint8) if x.dtype == F8 else x for x in snapshot(optimizer)]


# What tests/step/test_blockwise_variance.py does likewise.


def assert_skips(optimizer: SOFIM, params: list[Tensor]) -> None:
    """A step with a NaN is skipped, and leaves every bit."""
    before = [x.clone() for x in bits_of(optimizer)]
    grads = gradients(params, 1)[0]
    assert grads[1] is not None
    grads[1][3, 7] = math.nan
    give(params, grads)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert same_bits(bits_of(optimizer), before)


def step_in_backward(optimizer: SOFIM, params: list[Tensor], count: int) -> None:
    """Steps whose gradients come from backward passes."""
    for grads in gradients(params, count):
        for p in params:
            p.grad = None
        loss: Tensor = sum((p * g).sum() for p, g in zip(params, grads, strict=True))  # type: ignore[operator,misc,assignment]
        loss.backward()
        optimizer.step()


def bits_with(threads: int, **options: Any) -> list[Tensor]:
    """After training natively in so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return bits_of(trained(backend="cpu", **options)[0])
    finally:
        torch.set_num_threads(before)


def assert_goes_on(optimizer: SOFIM, params: list[Tensor], saved: dict[str, Any]) -> None:
    """A new optimizer with this state takes the same steps."""
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = SOFIM(others, backend="reference")
    other.load_state_dict(saved)
    for grads in gradients(params, 2):
        for one, its in ((optimizer, params), (other, others)):
            give(its, grads)
            one.step()
    assert same_bits(bits_of(other), bits_of(optimizer))


def assert_not_loaded(optimizer: SOFIM, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """The state of the first parameter, changed in this way, is refused before anything changes."""
    before = [x.clone() for x in bits_of(optimizer)]
    saved = optimizer.state_dict()
    saved["state"][0] = dict(saved["state"][0])
    change(saved["state"][0])
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(saved)
    assert same_bits(bits_of(optimizer), before)


def put(known: dict[str, Any], name: str, value: Any) -> None:
    """An entry of a parameter's state, ``None``: it goes."""
    if value is None:
        del known[name]
    else:
        known[name] = value


def assert_not_stepped(optimizer: SOFIM, params: list[Tensor], message: str, *errors: type[Exception]) -> None:
    """A step is refused, with one of these errors, before a parameter changes."""
    give(params, gradients(params, 1)[0])
    before = [p.detach().clone() for p in params]
    with pytest.raises(errors or (TypeError, ValueError), match=message):
        optimizer.step()
    assert same_bits([p.detach() for p in params], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("diagonal", ["identity", "factored"])
def test_a_skipped_step_leaves_every_bit(diagonal: str, backend: str) -> None:
    optimizer, params = trained(diagonal=diagonal, skip_nonfinite=True, backend=backend)
    assert_skips(optimizer, params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_skipping_an_infinity_does_not_become_a_number(backend: str) -> None:
    optimizer, params = trained(fisher="parameter", backend=backend)
    grads = gradients(params, 1)[0]
    assert grads[1] is not None
    grads[1][3, 7] = math.inf
    give(params, grads)
    optimizer.step()
    moment = stored_moment(optimizer, params[1])
    assert bool(moment[3, :128].isnan().all())
    assert int(moment.isnan().sum()) == 128
    known = optimizer.state[params[1]]
    assert known["exp_avg_scale"].view(torch.int32)[3, 0] == 0x7FC00000
    assert not known["exp_avg"].view(torch.uint8)[3, :128].any()


@pytest.mark.parametrize(
    "options",
    [
        {"numerator": "nesterov", "weight_decay": 0.1, "decoupled_weight_decay": False},
        {"diagonal": "factored", "rho": None},
        *([] if INTERPRETED else [{}, {"numerator": "gradient"}]),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_backward_takes_the_same_step(options: dict[str, Any], backend: str) -> None:
    expected, _ = trained(backend=backend, **options)
    params = params_of()
    optimizer = SOFIM(params, lr=0.1, state_dtype=F8, backend=backend, in_backward=True, **options)
    step_in_backward(optimizer, params, STEPS)
    for ours, theirs in zip(bits_of(optimizer), bits_of(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@once
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_does_not_depend_on_the_order_in_memory(backend: str) -> None:
    expected, params = trained(backend=backend)
    contiguous = [nn.Parameter(p.detach().contiguous()) for p in params_of()]
    optimizer = SOFIM(contiguous, lr=0.1, state_dtype="float8_e4m3fn", backend=backend)
    for grads in gradients(params, STEPS):
        give(contiguous, grads)
        optimizer.step()
    for (_, a), (_, b) in zip(optimizer.state.items(), expected.state.items(), strict=True):
        assert torch.equal(a["exp_avg"].contiguous().view(torch.uint8), b["exp_avg"].contiguous().view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_in_another_order_take_the_same_step(backend: str) -> None:
    """They are contiguous where SOFIM makes them, but users copy state."""
    optimizer, params = trained(2, backend=backend)
    twin, others = trained(2, backend=backend)
    known = twin.state[others[2]]
    known["exp_avg"] = known["exp_avg"].clone().contiguous(memory_format=torch.channels_last)
    scales = twin.state[others[1]]
    scales["exp_avg_scale"] = scales["exp_avg_scale"].t().clone().t()
    for one, its in ((optimizer, params), (twin, others)):
        give(its, gradients(its, 1)[0])
        one.step()
    known["exp_avg"] = known["exp_avg"].contiguous()
    assert same_bits(bits_of(twin), bits_of(optimizer))


@once
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("diagonal", ["identity", "row, with a term of rank one", "factored"])
def test_the_random_bits_are_those_of_the_step_and_the_ordinal(diagonal: str, schedule: str, backend: str) -> None:
    options = {**DIAGONALS[diagonal], **SCHEDULES[schedule], "diagonal": diagonal.partition(",")[0]}
    if schedule == "clip":
        options["max_grad_norm"] = 1e9  # so that gradients enter as they are
    params = params_of()
    optimizer = SOFIM(params, lr=0.1, momentum=0.5, state_dtype=F8, backend=backend, **options)
    moments = [torch.zeros(p.shape) for p in params]
    for count, grads in enumerate(gradients(params, 2), start=1):
        give(params, grads)
        optimizer.step()
        for i, (p, g) in enumerate(zip(params[:3], grads, strict=False)):
            assert g is not None
            bits = random_bits(moments[i].contiguous(), torch.tensor(count), i)
            exact = torch.add(moments[i] * 0.5, g, alpha=0.5).contiguous()
            codes, scale = blockwise.encode(exact, bits)
            known = optimizer.state[p]
            assert torch.equal(known["exp_avg"].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(known["exp_avg_scale"], scale)
            moments[i] = blockwise.decode(codes, scale)


@once
def test_a_moment_under_a_large_decay_does_not_stall() -> None:
    """Changes of 1 % are far below the distance of codes; rounded stochastically, they arrive on the average."""
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = SOFIM([p], lr=0.0, momentum=0.99, state_dtype=F8, backend="reference")
    for step in range(60):
        p.grad = torch.full_like(p, 1.0 if step == 0 else 0.0)
        optimizer.step()
    assert float(stored_moment(optimizer, p).mean()) == pytest.approx(0.01 * 0.99**59, rel=0.01)


@once
def test_adasofim_has_it_as_a_group_option() -> None:
    first, second = nn.Parameter(torch.ones(32, 128)), nn.Parameter(torch.ones(32, 128))
    groups = [{"params": [first], "state_dtype": "float8_e4m3fn"}, {"params": [second]}]
    optimizer = AdaSOFIM(groups, backend="reference")
    give([first, second], [torch.ones(32, 128)] * 2)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg"].dtype for p in (first, second)] == [F8, torch.float32]


# Backends


@pytest.mark.parametrize("native", NATIVE, ids=lambda value: "-".join(value))
@pytest.mark.parametrize(
    ("shape", "diagonal", "schedule"),
    some(
        2,
        [(33, 130), (40, 128), (9, 64, 3, 3)] + ([] if INTERPRETED else [(300, 1000), (2, 70_000)]),
        ["identity", "row, with a term of rank one", "factored"],
        [*SCHEDULES],
    ),
    ids=str,
)
def test_native_codes_are_those_of_the_definition(
    shape: tuple[int, ...], diagonal: str, schedule: str, native: tuple[str, str]
) -> None:
    """At momentum 1/2 a moment has the same bits in both backends; then so have its codes, of numbers of any size."""
    kind, _, finite = diagonal.partition(",")
    options: dict[str, Any] = {"rho": 0.5} if finite or kind == "identity" else {"rho": None}
    options |= {"max_grad_norm": 1e30} if schedule == "clip" else SCHEDULES[schedule]
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([0, 1.0, 1e-20, 1e-38, 1e-42, 1e25])
    of_blocks = sizes[torch.arange(shape[0] * 551).view(shape[0], -1) % len(sizes)].repeat_interleave(128, 1)
    factors = of_blocks[:, : math.prod(shape[1:])].reshape(shape)
    grads = [torch.randn(shape, generator=generator) * factors for _ in range(2)]
    # The largest of a block at, and just above, the largest code times a power of two.
    grads[0][1] = 0
    grads[1][1].clamp_(-1, 1).view(-1)[0] = 1.75
    grads[1][1].view(-1)[-1] = 1.75 + 2.0**-23
    backend, device = native
    state = []
    for name in ("reference", backend):
        p = nn.Parameter(torch.ones(shape, device=device))
        optimizer = SOFIM(
            [p],
            lr=1e-9,
            momentum=0.5,
            diagonal=kind,  # type: ignore[arg-type]
            state_dtype=F8,
            backend=name,
            **options,
        )
        for g in grads:
            p.grad = g.to(device, copy=True)
            optimizer.step()
        assert set(optimizer.backends.values()) == {name}
        known = optimizer.state[p]
        state.append((known["exp_avg"].view(torch.uint8), known["exp_avg_scale"]))
    assert all(torch.equal(a, b) for a, b in zip(*state, strict=True))
    assert len(state[0][1].unique()) >= len(sizes)


@pytest.mark.parametrize("native", NATIVE, ids=lambda value: "-".join(value))
@pytest.mark.parametrize("diagonal", ["identity", "factored"])
def test_native_steps_need_no_python(diagonal: str, native: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    backend, device = native
    params = [nn.Parameter(p.detach().to(device)) for p in params_of()]
    optimizer = SOFIM(params, lr=0.1, diagonal=diagonal, state_dtype=F8, backend=backend)  # type: ignore[arg-type]
    give(params, [None if g is None else g.to(device) for g in gradients(params, 1)[0]])
    optimizer.step()  # it makes the state
    monkeypatch.setattr("sofim_fused.step.plan.Plan.shares", None)
    before = [p.detach().clone() for p in params]
    versions = [optimizer.state[params[0]][name]._version for name in ("exp_avg", "exp_avg_scale")]
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    after = [optimizer.state[params[0]][name]._version for name in ("exp_avg", "exp_avg_scale")]
    assert all(now > then for now, then in zip(after, versions, strict=True))


@pytest.mark.parametrize("backend", [name for name, _ in NATIVE[:-1]])
@pytest.mark.parametrize(
    ("diagonal", "numerator"),
    [("identity", "nesterov")] if INTERPRETED else [*itertools.product(DIAGONALS, ["moment", "nesterov"])],
)
def test_a_native_step_by_passes_has_the_bits_of_one_in_a_call(
    diagonal: str, numerator: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**DIAGONALS[diagonal], "diagonal": diagonal.partition(",")[0], "numerator": numerator}
    whole, _ = trained(2, backend=backend, **options)
    native_step = f"{type(backends.choose(backend, torch.device('cpu'))).__name__}.native_step"
    module = {"cpu": "operators", "triton": "triton.passes"}[backend]
    monkeypatch.setattr(f"sofim_fused.backends.{module}.{native_step}", lambda _: lambda *given: None)
    by_passes, _ = trained(2, backend=backend, **options)
    assert same_bits(bits_of(by_passes), bits_of(whole))


@pytest.mark.parametrize("native", NATIVE, ids=lambda value: "-".join(value))
@pytest.mark.parametrize(
    ("options", "accuracy"),
    [
        ({"master_weight_bits": 32}, 1e-6),
        ({"master_weight_bits": 24, "max_grad_norm": 1e30}, 2.0**-14),
        ({"kahan": True, "master_weight_bits": None, "diagonal": "factored", "rho": None}, 2.0**-14),
    ],
    ids=str,
)
def test_weights_of_16_bits_with_more_beside_them(
    options: dict[str, Any], accuracy: float, native: tuple[str, str]
) -> None:
    """Moments have the bits of the definition, as above; the random bits of weights are those of the same elements."""
    name, device = native
    found = []
    for backend in ("reference", name):
        generator = torch.Generator().manual_seed(5)
        shapes = ((33, 130), (40, 128), (9, 64, 3, 3))
        params = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(device)) for shape in shapes]
        optimizer = SOFIM(params, lr=0.1, momentum=0.5, state_dtype=F8, backend=backend, **options)
        for _ in range(2):
            give(params, [torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes])
            optimizer.step()
        found.append((optimizer, params))
    (expected, theirs), (optimizer, ours) = found
    for p, q in zip(ours, theirs, strict=True):
        known, reference = optimizer.state[p], expected.state[q]
        assert torch.equal(known["exp_avg"].view(torch.uint8), reference["exp_avg"].view(torch.uint8))
        assert torch.equal(known["exp_avg_scale"], reference["exp_avg_scale"])
        weights = [_whole(*each) for each in ((p, known), (q, reference))]
        torch.testing.assert_close(*weights, rtol=accuracy, atol=1e-6)
        assert float((weights[0] == weights[1]).double().mean()) > 0.9


def _whole(p: Tensor, known: dict[str, Any]) -> Tensor:
    """A weight with the bits beside it."""
    if "kahan" in known:
        return p.detach().double() + known["kahan"].double()
    return joined(p.detach(), known["master_bits"]).double()


@once
def test_sixteen_threads_have_the_bits_of_one() -> None:
    assert same_bits(*(bits_with(threads) for threads in (1, 16)))


def declines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU's native part decline codes, as those of GPUs do."""
    monkeypatch.setattr(backends, "_WARNED", set())
    found = backends.best("cpu", torch.device("cpu"))[0]
    assert found is not None
    monkeypatch.setattr(found, "blockwise", False)


@once
def test_a_backend_that_does_not_take_codes_says_so_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    declines(monkeypatch)
    p = nn.Parameter(torch.ones(32, 128))
    SOFIM([nn.Parameter(torch.ones(31, 128))], state_dtype=F8, backend="cpu")  # too small: it stays in float32
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run on cpu .*does not take moments in 8 bits"):
        SOFIM([p], state_dtype=F8, backend="cpu")
    with pytest.raises(RuntimeError, match="fused=True cannot run on cpu"):
        SOFIM([p], state_dtype=F8, fused=True)


@once
def test_auto_falls_back_to_pure_pytorch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    declines(monkeypatch)
    p = nn.Parameter(torch.ones(32, 128))
    with pytest.warns(UserWarning, match="do not take moments in 8 bits"):
        optimizer = SOFIM([p], state_dtype=F8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SOFIM([nn.Parameter(torch.ones(32, 128))], state_dtype=F8)
    assert set(optimizer.backends.values()) == {"reference"}
    assert set(SOFIM([nn.Parameter(torch.ones(3))], state_dtype=F8).backends.values()) == {"cpu"}


@once
def test_whole_steps_are_those_of_a_backend_that_takes_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whose best backend declines them that is the next one, for all tensors of a step."""
    declines(monkeypatch)
    monkeypatch.setattr("sofim_fused.backends.operators.OperatorPasses.native_step", None)  # not to be asked
    p = nn.Parameter(torch.ones(32, 128))
    with pytest.warns(UserWarning, match="do not take moments in 8 bits"):
        optimizer = SOFIM([nn.Parameter(torch.ones(3)), p], state_dtype=F8, lr=0.1)
    give(optimizer.param_groups[0]["params"], [torch.ones(3), torch.ones(32, 128)])
    optimizer.step()
    assert float(p.detach().max()) < 1


# Stored and restored


@once
@pytest.mark.parametrize("diagonal", ["identity", "factored"])
def test_a_restored_run_goes_on_bit_for_bit(diagonal: str, tmp_path: Any) -> None:
    optimizer, params = trained(diagonal=diagonal)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved["param_groups"][0]["state_dtype"] == "float8_e4m3fn"
    assert_goes_on(optimizer, params, saved)


@once
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", None])
def test_a_moment_is_converted_once(state_dtype: str | None) -> None:
    optimizer, params = trained(state_dtype=state_dtype)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_dtype"] = "float8_e4m3fn"
    narrow, others = trained(0, start=saved)
    for p, q in zip(params[:3], others[:3], strict=True):
        codes, scale = blockwise.encode(optimizer.state[p]["exp_avg"].float())
        assert torch.equal(narrow.state[q]["exp_avg"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(narrow.state[q]["exp_avg_scale"], scale)
    back = narrow.state_dict()
    back["param_groups"][0]["state_dtype"] = state_dtype
    wide, again = trained(0, start=back)
    for p, q in zip(others, again, strict=True):
        assert "exp_avg_scale" not in wide.state[q]
        assert torch.equal(wide.state[q]["exp_avg"].double(), stored_moment(narrow, p))


@once
def test_a_changed_state_dtype_says_what_to_do_and_that_works() -> None:
    optimizer, params = trained()
    moments = [stored_moment(optimizer, p) for p in params]
    optimizer.param_groups[0]["state_dtype"] = None
    give(params, gradients(params, 1)[0])
    with pytest.raises(ValueError, match=r"optimizer.load_state_dict\(optimizer.state_dict\(\)\)"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(real64(optimizer.state[p]["exp_avg"]), m) for p, m in zip(params, moments, strict=True))
    optimizer.step()


@once
@pytest.mark.parametrize("start", [torch.optim.SGD, torch.optim.AdamW])
def test_a_running_torch_optimizer_is_taken_over(start: Any) -> None:
    params = params_of()
    theirs = start(params, lr=0.1, **({"momentum": 0.9} if start is torch.optim.SGD else {}))
    give(params, gradients(params, 1)[0])
    theirs.step()
    convert = SOFIM.from_sgd if start is torch.optim.SGD else SOFIM.from_adamw
    exact, narrow = convert(theirs, backend="reference"), convert(theirs, state_dtype=F8, backend="reference")
    for p in params[:3]:
        codes, scale = blockwise.encode(exact.state[p]["exp_avg"])
        assert torch.equal(narrow.state[p]["exp_avg"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(narrow.state[p]["exp_avg_scale"], scale)


@once
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda known: known.pop("exp_avg_scale"), "exp_avg in 8 bits and lacks exp_avg_scale"),
        (
            lambda known: known.update(exp_avg_scale=torch.ones(8, 4)),
            r"exp_avg_scale has the shape \(8, 4\), expected \(8, 5\)",
        ),
        (lambda known: known.update(exp_avg_scale=-torch.ones(8, 5)), "exp_avg_scale has negative elements"),
        (lambda known: known.update(exp_avg_scale=3.0), "exp_avg_scale is of type float"),
        (lambda known: known.update(exp_avg_scale=torch.ones(8, 5).to(F8)), "exp_avg_scale is float8_e4m3fn"),
        (lambda known: known.update(kahan=torch.zeros(8, 600).to(F8)), "kahan is float8_e4m3fn"),
    ],
)
def test_damaged_scales_are_refused(change: Any, message: str) -> None:
    optimizer, _ = trained()
    assert_not_loaded(optimizer, change, message)


@once
def test_codes_of_a_tensor_that_has_none_are_refused() -> None:
    optimizer, _ = trained()
    saved = optimizer.state_dict()
    saved["state"][4] = {**saved["state"][4], "exp_avg": torch.zeros(40).to(F8)}
    with pytest.raises(ValueError, match="in which no parameter of this shape keeps its moment"):
        optimizer.load_state_dict(saved)


@once
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "lacks exp_avg_scale: put it back"),
        (torch.ones(8, 4), r"exp_avg_scale is shape \(8, 4\), float32, cpu, expected shape \(8, 5\), float32"),
        (torch.ones(8, 5, dtype=torch.float64), "float64, cpu, expected"),
        (torch.ones(8, 1).expand(8, 5), "exp_avg_scale has strides"),
        (1.0, "exp_avg_scale is of type float"),
    ],
)
def test_scales_that_do_not_fit_are_refused_in_a_step(value: Any, message: str) -> None:
    optimizer, params = trained()
    put(optimizer.state[params[0]], "exp_avg_scale", value)
    assert_not_stepped(optimizer, params, message)


@once
def test_scales_that_share_memory_are_refused() -> None:
    optimizer, params = trained()
    optimizer.state[params[0]]["exp_avg_scale"] = params[0].detach().view(-1)[:40].view(8, 5)
    assert_not_stepped(optimizer, params, "exp_avg_scale shares memory with the parameter", ValueError)


@once
def test_numpy_reads_what_is_stored() -> None:
    """How the documents say to read a moment outside of SOFIM."""
    x = samples()["of many sizes"]
    codes, scale = blockwise.encode(x)
    table = np.array([*map(float, VALUES), np.nan], dtype=np.float32)
    raw = codes.view(torch.uint8).numpy()
    values = np.where(raw & 0x80, -1, 1) * table[raw & 0x7F] * np.repeat(scale.numpy(), 128, axis=1)[:, :300]
    np.testing.assert_array_equal(values.astype(np.float32), blockwise.decode(codes, scale).numpy())
