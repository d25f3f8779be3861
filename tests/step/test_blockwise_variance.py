"""Second moments in 8 bits: their codes against a model of their own, and what becomes of them in steps and state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, backends, blockwise
from sofim_fused.backends.rounding import other_random_bits, random_bits, random_bytes
from tests.step.support import variances_of
from tests.step.test_blockwise import (
    BACKENDS,
    F8,
    LARGEST,
    SCHEDULES,
    VALUES,
    assert_goes_on,
    assert_not_loaded,
    assert_not_stepped,
    assert_skips,
    bits_of,
    bits_with,
    gradients,
    params_of,
    put,
    step_in_backward,
    trained,
)
from tests.support.problems import give, same_bits
from tests.support.runs import once

ELEMENT: dict[str, Any] = {"diagonal": "element", "rho": None}
RANK_ONE: dict[str, Any] = {"diagonal": "element", "rho": 0.5}


def scale_of(largest: Fraction) -> Fraction:
    return next(s for k in range(-65, 120) if (s := Fraction(2) ** k) * 448 >= largest) if largest else Fraction(0)


def codes_of(v: float, scale: Fraction, bits: int | None) -> set[int]:
    """The bits of a code, in exact arithmetic from the root in float32 on; of two, where float32 may take either."""
    if v == 0:
        return {0}
    x = Fraction(torch.tensor(v).sqrt().item()) / scale
    code = max(code for code, value in enumerate(VALUES) if value <= x)
    if code == 126:
        return {126}
    low, high = VALUES[code] ** 2, VALUES[code + 1] ** 2
    chance = Fraction(1, 2) if bits is None else Fraction(2 * bits + 1, 2**17)
    excess = (x**2 - low) - chance * (high - low)
    # Below 2^-6 x is rounded where 2^-6 is added to it; else (x - a)(x + a) alone is.
    even = abs(excess) <= (x**2 - low) * Fraction(1, 2**22) or (code < 8 and high - x**2 <= Fraction(1, 2**34))
    return {max(code + up, 1) for up in ({0, 1} if even else {excess > 0})}


def samples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    squares = torch.randn(3, 300, generator=generator, dtype=torch.float64).square()
    spread = squares * torch.randn(3, 300, generator=generator, dtype=torch.float64).mul(9).exp()
    found = {f"times {size:g}": squares * size for size in (1.0, 1e-30, 1e-38, 1e-42, 3e-45, 1e37)}
    found["of many sizes"] = spread
    found["a block of zeros"] = torch.cat([torch.zeros(3, 128), squares[:, 128:]], 1)
    found["the largest"] = torch.full((3, 300), LARGEST, dtype=torch.float64)
    found["codes themselves"] = torch.tensor([float(value**2) for value in VALUES[1:101]]).repeat(3, 3)
    return {name: x.clamp(max=LARGEST).float() for name, x in found.items()}


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", samples())
def test_codes_and_scales_are_those_of_exact_arithmetic(name: str, stochastic: bool) -> None:
    v = samples()[name]
    bits = other_random_bits(v, torch.tensor(3), 1) if stochastic else None
    codes, scale = blockwise.encode_squares(v, bits)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (F8, v.shape, torch.float32, (3, 3))
    decoded = blockwise.decode_squares(codes, scale)
    for i in range(3):
        for j in range(3):
            part = slice(128 * j, 128 * j + 128)
            block = v[i, part].tolist()
            expected = scale_of(max(Fraction(x) for x in v[i, part].sqrt().tolist()))
            assert Fraction(scale[i, j].item()) == expected
            chances = [None] * len(block) if bits is None else bits[i, part].tolist()
            codes_here = [codes_of(x, expected, chance) for x, chance in zip(block, chances, strict=True)]
            found = codes[i, part].view(torch.uint8).tolist()
            assert all(code in right for code, right in zip(found, codes_here, strict=True))
            values = [min((VALUES[code] * expected) ** 2, Fraction(LARGEST)) for code in found]
            assert [Fraction(x) for x in decoded[i, part].tolist()] == values
    assert torch.equal(decoded > 0, v > 0)
    last = torch.full(v.shape, 0xFFFF, dtype=torch.int32)
    for again in (None, torch.zeros_like(last), last):  # what is read back is stored without a change
        assert torch.equal(blockwise.decode_squares(*blockwise.encode_squares(decoded, again)), decoded)


@pytest.mark.parametrize("value", [0.01, 0.3, 1.03, 3e-7])
def test_stochastic_rounding_has_no_bias_in_what_enters_the_mean(value: float) -> None:
    v = torch.full((4096, 128), value)
    v[:, 0] = 3.6
    stored = blockwise.decode_squares(*blockwise.encode_squares(v, other_random_bits(v, torch.tensor(1), 0)))[:, 1:]
    low, high = stored.double().min().item(), stored.double().max().item()
    exact = v[0, 1].item()
    assert low <= exact <= high
    assert len(stored.unique()) == 2
    share = (exact - low) / (high - low)
    deviation = (stored.double().mean().item() - exact) / (high - low)
    assert abs(deviation) < 5 * (share * (1 - share) / stored.numel()) ** 0.5 + 2.0**-17


def test_the_random_bits_are_none_of_those_of_first_moments() -> None:
    like = torch.empty(1 << 16)
    first, second, byte = (f(like, torch.tensor(5), 2) for f in (random_bits, other_random_bits, random_bytes))
    assert int(second.min()) >= 0
    assert second.double().mean().item() == pytest.approx((2**16 - 1) / 2, rel=0.01)
    # By chance a correlation is 1/256.
    correlation = torch.stack([first.double(), second.double(), byte.double()]).corrcoef()
    assert float((correlation - torch.eye(3)).abs().max()) < 5 / 256


def test_a_nan_spoils_its_block_and_no_other() -> None:
    v = torch.ones(2, 300)
    v[1, 130] = math.nan
    stored = blockwise.decode_squares(*blockwise.encode_squares(v, other_random_bits(v, torch.tensor(1), 0)))
    assert bool(stored[1, 128:256].isnan().all())
    stored[1, 128:256] = 1
    assert bool((stored == 1).all())


# Steps; tests/step/test_blockwise.py compares each with the oracle.


@once
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [ELEMENT, RANK_ONE], ids=str)
def test_a_second_moment_under_a_large_decay_does_not_stall(options: dict[str, Any], backend: str) -> None:
    """A step changes its root by 0.05 %, far below the distance of codes; on the average that arrives."""
    p = nn.Parameter(torch.zeros(32, 1024))
    optimizer = SOFIM([p], lr=0.0, beta2=0.999, state_dtype=F8, backend=backend, **options)
    for step in range(51):
        p.grad = torch.full_like(p, 1.0 if step == 0 else 0.0)
        optimizer.step()
    found = variances_of(optimizer, p)["variance"]
    assert float(found.mean()) == pytest.approx(0.001 * 0.999**50, rel=0.01)
    assert float(found.min()) > 0


@once
@pytest.mark.parametrize("options", [ELEMENT, RANK_ONE], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [(33, 130), (2, 70_000), (9, 64, 3, 3)], ids=str)
def test_native_codes_are_those_of_the_definition(
    shape: tuple[int, ...], schedule: str, options: dict[str, Any]
) -> None:
    """Where squares are exact: β₂ is 1/2, and gradients have eight bits, or are tiny powers of two. Some are zero."""
    generator = torch.Generator().manual_seed(3)
    given = {"max_grad_norm": 1e30} if schedule == "clip" else SCHEDULES[schedule]
    for size in (1e-9, 1e16, 0.0):
        grads = [torch.randn(shape, generator=generator).pow(5).mul(size).bfloat16().float() for _ in range(2)]
        grads = [torch.where(g.abs() < 2.0**-62, 0.0, g) for g in grads]
        if size == 0:
            grads = [torch.randint(-74, -50, shape, generator=generator).double().exp2().float() for _ in range(2)]
        grads[0][0] = grads[1][0] = 0
        state = []
        for backend in BACKENDS:
            p = nn.Parameter(torch.ones(shape))
            common = {"lr": 1e-9, "momentum": 0.5, "beta2": 0.5, "state_dtype": F8}
            optimizer = SOFIM([p], backend=backend, **{**common, **options, **given})
            means = torch.zeros(shape)
            for count, g in enumerate(grads, start=1):
                p.grad = g.clone()
                optimizer.step()
                bits = other_random_bits(means, torch.tensor(count), 0)
                codes, scale = blockwise.encode_squares((means * 0.5).add_(g * (g * 0.5)), bits)
                means = blockwise.decode_squares(codes, scale)
                known = optimizer.state[p]
                assert torch.equal(known["variance"].view(torch.uint8), codes.view(torch.uint8)), (size, backend)
                assert torch.equal(known["variance_scale"], scale), (size, backend)
            assert set(optimizer.backends.values()) == {backend}
            state.append((known["exp_avg"].view(torch.uint8), known["exp_avg_scale"]))
        assert all(torch.equal(a, b) for a, b in zip(*state, strict=True)), size


@once
@pytest.mark.parametrize("options", [ELEMENT, RANK_ONE], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_skipping_a_nan_spoils_its_block_and_no_other(backend: str, options: dict[str, Any]) -> None:
    optimizer, params = trained(fisher="parameter", backend=backend, **options)
    grads = gradients(params, 1)[0]
    assert grads[1] is not None
    grads[1][3, 128] = math.nan  # in the last block of a row, which is shorter
    give(params, grads)
    optimizer.step()
    for p, expected in zip(params, (0, 2, 0, 0, 0), strict=True):
        found = variances_of(optimizer, p)["variance"]
        assert int(found.isnan().sum()) == expected
        assert bool((found[~found.isnan()] > 0).all())
    assert bool(variances_of(optimizer, params[1])["variance"][3, 128:].isnan().all())


@once
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_overflow_leave_means_that_decay(backend: str) -> None:
    p = nn.Parameter(torch.zeros(32, 128))
    optimizer = SOFIM([p], lr=0.0, beta2=0.5, state_dtype=F8, backend=backend, **ELEMENT)
    p.grad = torch.full_like(p, 3e38)
    optimizer.step()
    assert bool((variances_of(optimizer, p)["variance"] == LARGEST).all())
    p.grad = torch.zeros_like(p)
    optimizer.step()
    mean = variances_of(optimizer, p)["variance"].mean().item()
    assert mean == pytest.approx(LARGEST / 2, rel=0.02)


@once
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [ELEMENT, RANK_ONE], ids=str)
def test_a_skipped_step_leaves_every_bit(options: dict[str, Any], backend: str) -> None:
    optimizer, params = trained(skip_nonfinite=True, backend=backend, **options)
    assert_skips(optimizer, params)


@once
@pytest.mark.parametrize("numerator", ["moment", "nesterov"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_backward_takes_the_same_step(backend: str, numerator: Any) -> None:
    expected, _ = trained(backend=backend, numerator=numerator, **ELEMENT)
    params = params_of()
    optimizer = SOFIM(params, lr=0.1, numerator=numerator, state_dtype=F8, backend=backend, in_backward=True, **ELEMENT)
    step_in_backward(optimizer, params, 3)
    assert same_bits(bits_of(optimizer), bits_of(expected))


@once
@pytest.mark.parametrize("options", [ELEMENT, RANK_ONE], ids=str)
def test_sixteen_threads_have_the_bits_of_one(options: dict[str, Any]) -> None:
    assert same_bits(*(bits_with(threads, **options) for threads in (1, 16)))


@once
@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_in_another_order_take_the_same_step(backend: str) -> None:
    optimizer, params = trained(2, backend=backend, **RANK_ONE)
    twin, others = trained(2, backend=backend, **RANK_ONE)
    known, scales = twin.state[others[2]], twin.state[others[1]]
    known["variance"] = known["variance"].clone().contiguous(memory_format=torch.channels_last)
    scales["variance_scale"] = scales["variance_scale"].t().clone().t()
    for one, its in ((optimizer, params), (twin, others)):
        give(its, gradients(its, 1)[0])
        one.step()
    known["variance"] = known["variance"].contiguous()
    assert same_bits(bits_of(twin), bits_of(optimizer))


@once
def test_native_steps_need_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    params = params_of()
    optimizer = SOFIM(params, lr=0.1, state_dtype=F8, backend="cpu", **RANK_ONE)
    give(params, gradients(params, 1)[0])
    optimizer.step()  # it makes the state
    monkeypatch.setattr("sofim_fused.step.plan.Plan.shares", None)
    before = [p.detach().clone() for p in params]
    versions = [optimizer.state[params[0]][name]._version for name in ("variance", "variance_scale")]
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    after = [optimizer.state[params[0]][name]._version for name in ("variance", "variance_scale")]
    assert all(now > then for now, then in zip(after, versions, strict=True))


def declines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU's native part take codes of first moments alone."""
    monkeypatch.setattr(backends, "_WARNED", set())
    found = backends.best("cpu", torch.device("cpu"))[0]
    assert found is not None
    monkeypatch.setattr(found, "blockwise_variance", False)


@once
def test_a_backend_may_take_codes_of_first_moments_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    declines(monkeypatch)
    p = nn.Parameter(torch.ones(32, 128))
    with pytest.raises(RuntimeError, match=r"cannot run on cpu .*second moments in 8 bits \(diagonal='element'"):
        SOFIM([p], state_dtype=F8, backend="cpu", **ELEMENT)
    with pytest.warns(UserWarning, match="do not take second moments in 8 bits"):
        optimizer = SOFIM([p], state_dtype=F8, **ELEMENT)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["variance"].dtype == F8
    assert set(optimizer.backends.values()) == {"reference"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in (ELEMENT, {"diagonal": "factored"}):
            SOFIM([nn.Parameter(torch.ones(32, 128))], state_dtype=F8, **options)
    assert set(SOFIM([p], state_dtype=F8, diagonal="factored").backends.values()) == {"cpu"}


# Stored and restored


@once
def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Any) -> None:
    optimizer, params = trained(**ELEMENT)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    assert_goes_on(optimizer, params, torch.load(tmp_path / "state.pt", weights_only=True))


@once
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", None])
def test_second_moments_are_converted_once(state_dtype: str | None) -> None:
    optimizer, params = trained(state_dtype=state_dtype, **ELEMENT)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_dtype"] = "float8_e4m3fn"
    narrow, others = trained(0, start=saved, **ELEMENT)
    for p, q in zip(params[:3], others[:3], strict=True):
        codes, scale = blockwise.encode_squares(optimizer.state[p]["variance"])
        assert torch.equal(narrow.state[q]["variance"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(narrow.state[q]["variance_scale"], scale)
    back = narrow.state_dict()
    back["param_groups"][0]["state_dtype"] = state_dtype
    wide, again = trained(0, start=back, **ELEMENT)
    for p, q in zip(others, again, strict=True):
        assert "variance_scale" not in wide.state[q]
        assert torch.equal(wide.state[q]["variance"].double(), variances_of(narrow, p)["variance"])


@once
def test_the_state_of_an_earlier_version_has_second_moments_in_float32() -> None:
    """It had codes of first moments alone; so have pickles of it, whose first step says what to do."""
    optimizer, params = trained(**ELEMENT)
    saved = optimizer.state_dict()
    for number, p in enumerate(params[:3]):
        known = saved["state"][number] = dict(saved["state"][number])
        known["variance"] = variances_of(optimizer, p)["variance"].float()
        del known["variance_scale"]
    loaded, others = trained(0, start=saved, **ELEMENT)
    for p, q in zip(params, others, strict=True):  # all were codes before
        assert loaded.state[q]["variance"].dtype == optimizer.state[p]["variance"].dtype
        assert same_bits(*([variances_of(*x)["variance"]] for x in ((loaded, q), (optimizer, p))))
    for number, p in enumerate(params[:3]):
        optimizer.state[p]["variance"] = saved["state"][number]["variance"]
    give(params, gradients(params, 1)[0])
    with pytest.raises(
        ValueError, match=r"variance is .* float8_e4m3fn, .*load_state_dict\(optimizer.state_dict\(\)\)"
    ):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


@once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_running_adamw_is_taken_over(dtype: torch.dtype) -> None:
    params = params_of(dtype)
    theirs = torch.optim.AdamW(params, lr=0.1)
    give(params, gradients(params, 1)[0])
    theirs.step()
    narrow = SOFIM.from_adamw(theirs, state_dtype=F8, backend="reference", diagonal="element")
    for p in params[:3]:
        codes, scale = blockwise.encode_squares(theirs.state[p]["exp_avg_sq"].float())
        assert torch.equal(narrow.state[p]["variance"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(narrow.state[p]["variance_scale"], scale)


def minus_zero(known: dict[str, Any]) -> None:
    codes = known["variance"].clone()
    codes.view(torch.uint8)[2, 5] = 0x80
    known["variance"] = codes


@once
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda known: known.pop("variance_scale"), "variance in 8 bits and lacks variance_scale"),
        (
            lambda known: known.update(variance_scale=torch.ones(8, 4)),
            r"variance_scale has the shape \(8, 4\), expected \(8, 5\)",
        ),
        (lambda known: known.update(variance_scale=-torch.ones(8, 5)), "variance_scale has negative elements"),
        (lambda known: known.update(variance_scale=3.0), "variance_scale is of type float"),
        (lambda known: known.update(variance=torch.zeros(8, 5).to(F8)), r"variance has the shape \(8, 5\)"),
        (minus_zero, "variance has negative elements"),
    ],
)
def test_damaged_codes_are_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    optimizer, _ = trained(**ELEMENT)
    assert_not_loaded(optimizer, change, message)


@once
def test_codes_of_a_tensor_that_has_none_are_refused() -> None:
    optimizer, _ = trained(**ELEMENT)
    saved = optimizer.state_dict()
    saved["state"][4] = {**saved["state"][4], "variance": torch.zeros(40).to(F8)}
    with pytest.raises(ValueError, match="in which no parameter of this shape keeps its second moment"):
        optimizer.load_state_dict(saved)


@once
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "variance in 8 bits and lacks variance_scale: put it back"),
        (torch.ones(8, 4), r"variance_scale is shape \(8, 4\), float32, cpu, expected shape \(8, 5\), float32"),
        (torch.ones(8, 1).expand(8, 5), "variance_scale has strides"),
        (1.0, "variance_scale is of type float"),
    ],
)
def test_scales_that_do_not_fit_are_refused_in_a_step(value: Any, message: str) -> None:
    optimizer, params = trained(backend="cpu", **ELEMENT)
    put(optimizer.state[params[0]], "variance_scale", value)
    assert_not_stepped(optimizer, params, message)


@once
def test_scales_that_share_memory_are_refused() -> None:
    optimizer, params = trained(backend="cpu", **ELEMENT)
    optimizer.state[params[0]]["variance_scale"] = params[1].detach().view(-1)[:40].view(8, 5)
    assert_not_stepped(optimizer, params, "shares memory with", ValueError)
