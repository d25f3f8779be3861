"""Stochastic rounding and Kahan compensation: the bits, their lack of bias, and what they buy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sofim_fused import SOFIM
from sofim_fused.backends.rounding import SEED, random_bits, round_stochastic
from tests.support.problems import give


def hashed(seed: int, step: int, ordinal: int, index: int) -> int:
    """The 16 bits of one element in Python's own integers: what each backend must reproduce."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    key = mix(mix((seed + ordinal * 0x9E3779B9) % 2**32) ^ step)
    return mix((mix(key ^ (index >> 32)) + index % 2**32 * 0x9E3779B9) % 2**32) >> 16


@pytest.mark.parametrize(("step", "ordinal", "seed"), [(1, 0, SEED), (2, 0, SEED), (1, 1, SEED), (70_000, 161, 2**31)])
def test_bits_are_the_documented_hash(step: int, ordinal: int, seed: int) -> None:
    bits = random_bits(torch.empty(5, 7), torch.tensor(step), ordinal, seed)
    assert bits.dtype == torch.int32
    assert bits.reshape(-1).tolist() == [hashed(seed, step, ordinal, i) for i in range(35)]


def test_bits_follow_memory_order() -> None:
    """A channels-last moment and its flat memory see the same bits, as a kernel that sweeps over memory does."""
    x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    bits = random_bits(x, torch.tensor(9), 3)
    assert bits.stride() == x.stride()
    flat = random_bits(torch.empty(120), torch.tensor(9), 3)
    assert torch.equal(bits.permute(0, 2, 3, 1).reshape(-1), flat)


def test_bits_are_uniform_and_unrelated() -> None:
    """Over 2**20 elements: mean, each single bit, and no correlation between steps, ordinals or neighbours."""
    size = 2**20
    like = torch.empty(size)
    draws = {key: random_bits(like, torch.tensor(key[0]), key[1]).double() / 2**16 for key in ((1, 0), (2, 0), (1, 1))}
    sigma = (1 / 12 / size) ** 0.5
    for x in draws.values():
        assert abs(x.mean().item() + 0.5 / 2**16 - 0.5) < 5 * sigma
        for bit in range(16):
            ones = ((x * 2**16).long() >> bit & 1).double().mean().item()
            assert abs(ones - 0.5) < 5 * 0.5 / size**0.5, bit
    first = draws[1, 0]
    for other in (draws[2, 0], draws[1, 1], first.roll(1)):
        correlation = ((first - 0.5) * (other - 0.5)).mean().item() * 12
        assert abs(correlation) < 5 / size**0.5


@pytest.mark.parametrize("value", [1.0 + 1e-3, -0.7123, 3.0e-5, 1e-40, 2.0])
def test_rounding_has_no_bias_over_a_million_draws(value: float) -> None:
    draws = 2**20
    x = torch.full((draws,), value)
    rounded = round_stochastic(x, random_bits(x, torch.tensor(1), 0)).double()
    below, above = rounded.min().item(), rounded.max().item()
    exact = float(x[0])
    ulp = above - below
    assert below <= exact <= above
    assert len(rounded.unique()) == (1 if float(x[0].bfloat16()) == exact else 2)
    deviation = (rounded.mean().item() - exact) / (ulp or 1.0)
    share = (exact - below) / (ulp or 1.0)
    assert abs(deviation) < 5 * (share * (1 - share) / draws) ** 0.5 + 2.0**-17


def test_rounding_keeps_what_is_exact_or_not_finite() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf"), float("nan")])
    rounded = round_stochastic(x, torch.full(x.shape, 0xFFFF, dtype=torch.int32))
    torch.testing.assert_close(rounded.float(), x, rtol=0, atol=0, equal_nan=True)
    quiet = torch.tensor([0x7F800001], dtype=torch.int32).view(
        torch.float32
    )  # a NaN whose bits all lie in the part cut off
    assert round_stochastic(quiet, torch.zeros(1, dtype=torch.int32)).isnan().all()


def test_rounding_against_numpy() -> None:
    """The same rounding by way of integers of another library."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    bits = random_bits(x, torch.tensor(5), 2)
    raised = (x.numpy().view(np.uint32) + bits.numpy().astype(np.uint32)) & np.uint32(0xFFFF0000)
    np.testing.assert_array_equal(round_stochastic(x, bits).float().numpy(), raised.view(np.float32))


def trained(dtype: torch.dtype, kahan: bool | None, steps: int) -> tuple[SOFIM, Tensor]:
    p = torch.nn.Parameter(torch.ones(16, dtype=dtype))
    optimizer = SOFIM([p], lr=1e-3, rho=1.0, momentum=0.0, kahan=kahan)
    for _ in range(steps):
        p.grad = torch.full_like(p, 0.25)
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kahan_keeps_updates_below_half_an_ulp(dtype: torch.dtype) -> None:
    """Updates of 1.25e-4 vanish beside a weight of 1 in 16 bits; compensated, a hundred of them add up."""
    expected = 1.0 - 100 * 1e-3 * 0.25 / (1 + 16 * 0.25**2)
    _, lost = trained(dtype, False, 100)
    assert bool((lost == 1.0).all())
    optimizer, kept = trained(dtype, True, 100)
    full = kept.detach().double() + optimizer.state[kept]["kahan"].double()
    assert full.sub(expected).abs().max() < 4e-4  # a hundred roundings of the compensation itself
    assert kept.detach().double().sub(expected).abs().max() < 2.0**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_replaced_weight_is_not_haunted(dtype: torch.dtype) -> None:
    """Bits kept for the old weight mean nothing to a new one: pruned, restored or averaged."""
    p = torch.nn.Parameter(torch.full((3,), 300.0, dtype=dtype))
    optimizer = SOFIM([p], lr=1.0, momentum=0.0, kahan=True)
    p.grad = torch.full((3,), 0.05, dtype=dtype)
    optimizer.step()
    assert optimizer.state[p]["kahan"].abs().min() > 0.01
    with torch.no_grad():
        p.copy_(torch.tensor([0.01, 0.0, -0.02]))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), before)


def test_kahan_can_be_switched_off_later() -> None:
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = SOFIM([p], lr=1e-3, kahan=True)
    p.grad = torch.ones(2, dtype=torch.bfloat16)
    optimizer.step()
    kept = optimizer.state[p]["kahan"].clone()
    optimizer.param_groups[0]["kahan"] = False
    for _ in range(20):
        optimizer.step()
    assert torch.equal(optimizer.state[p]["kahan"], kept)
    assert torch.equal(p.detach(), torch.ones(2, dtype=torch.bfloat16))


def test_an_overflowing_weight_stays_infinite() -> None:
    p = torch.nn.Parameter(torch.full((1,), 6e4, dtype=torch.float16))
    optimizer = SOFIM([p], lr=1e5, momentum=0.0)
    p.grad = torch.full((1,), -1.0, dtype=torch.float16)
    for _ in range(3):
        optimizer.step()
    assert p.item() == float("inf")


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}], ids=["plain", "guarded"])
def test_the_optimizer_rounds_by_step_and_ordinal(options: dict[str, Any]) -> None:
    """Bit by bit: the second parameter, which missed a step, is keyed by its own count and its own place."""
    first, second = (torch.nn.Parameter(torch.zeros(50)) for _ in range(2))
    optimizer = SOFIM([first, second], momentum=0.5, state_dtype=torch.bfloat16, **options)
    moments = [torch.zeros(50), torch.zeros(50)]
    counts = [0, 0]
    for step in range(4):
        grads = [torch.randn(50, generator=torch.Generator().manual_seed(step)) for _ in range(2)]
        give([first, second], [grads[0], None if step == 1 else grads[1]])
        optimizer.step()
        for i, p in enumerate((first, second)):
            if p.grad is None:
                continue
            counts[i] += 1
            exact = 0.5 * moments[i] + 0.5 * grads[i]  # halves: no rounding in float32 that could differ
            moments[i] = round_stochastic(exact, random_bits(exact, torch.tensor(counts[i]), i)).float()
            assert torch.equal(optimizer.state[p]["exp_avg"].float(), moments[i]), (step, i)


def test_a_bfloat16_moment_keeps_its_mean() -> None:
    """Rounded to nearest, a moment near 1 would not move by a gradient's thousandth; stochastically it does."""
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = SOFIM([p], lr=0.0, momentum=0.999, state_dtype=torch.bfloat16)
    for _ in range(200):
        give([p], [torch.full_like(p, 1.0)])
        optimizer.step()
    moment = optimizer.state[p]["exp_avg"]
    assert moment.dtype == torch.bfloat16
    assert moment.double().mean().item() == pytest.approx(1 - 0.999**200, rel=2e-3)


def test_the_same_run_has_the_same_bits() -> None:
    def weights() -> list[float]:
        p = torch.nn.Parameter(torch.linspace(-1, 1, 100).bfloat16())
        optimizer = SOFIM([p], lr=0.1, state_dtype=torch.bfloat16, kahan=True)
        for step in range(20):
            p.grad = torch.sin(torch.arange(100.0) + step).bfloat16()
            optimizer.step()
        return [*p.tolist(), *optimizer.state[p]["exp_avg"].tolist(), *optimizer.state[p]["kahan"].tolist()]

    assert weights() == weights()
