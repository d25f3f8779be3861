"""bfloat16 weights with ``master_weight_bits=24``: a step of float32 weights, then one rounding, bit by bit."""

from __future__ import annotations

import copy
import io
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM
from sofim_fused.backends.master_bits import converted, joined, split
from sofim_fused.backends.rounding import SEED, random_bytes
from tests.step.test_master_bits import BF16, FORMS, SCHEDULES, advance, bits, boundaries
from tests.support.problems import NUMERATORS, give, give_state, mixed_problem, same_bits
from tests.support.runs import CPU_BACKENDS, EMULATED, Run

INF, NAN = 0x7F800000, 0x7FC00000
CONTIGUOUS = ("matrix", "scalar", "vector", "sliced", "offset", "empty", "one-element")


def hashed(step: int, ordinal: int, count: int) -> np.ndarray:
    """The 32 random bits of elements, from their definition in NumPy's integers."""

    def mix(x: Any) -> Any:
        x = np.asarray(x, np.uint64) & 0xFFFFFFFF
        x = x ^ (x >> np.uint64(16))
        x = x * np.uint64(0x7FEB352D) & 0xFFFFFFFF
        x = x ^ (x >> np.uint64(15))
        x = x * np.uint64(0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> np.uint64(16))

    key = mix(mix(mix((SEED + ordinal * 0x9E3779B9) % 2**32) ^ np.uint64(step)))
    return mix(key + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B9))  # type: ignore[no-any-return]


def rounded(u: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Float32 bits rounded to 24 with random bytes, element by element: what every backend has to compute."""
    u, r = u.astype(np.uint64), r.astype(np.uint64)
    magnitude, sign = u & 0x7FFFFFFF, u & 0x80000000
    up = (magnitude + r) // 256 * 256
    up = np.where((up >= INF) & (magnitude < INF), magnitude // 256 * 256, up)
    return np.where(magnitude > INF, sign + NAN, np.where(magnitude == INF, u, sign + up)).astype(np.uint32)


def of(x: Tensor) -> np.ndarray:
    return x.detach().cpu().contiguous().view(-1).view(torch.int32).numpy().view(np.uint32)  # type: ignore[no-any-return]


def test_bytes_are_the_documented_hash() -> None:
    for step, ordinal in ((1, 0), (2, 0), (1, 161)):
        found = random_bytes(torch.empty(5, 7), torch.tensor(step), ordinal)
        assert found.dtype == torch.int32
        assert found.reshape(-1).tolist() == (hashed(step, ordinal, 35) & 0xFF).tolist()
    last = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert random_bytes(last, torch.tensor(9), 3).stride() == last.stride()


def test_bytes_are_uniform_and_have_nothing_to_do_with_the_bits_of_moments() -> None:
    size = 2**20
    found = hashed(1, 0, size)
    counts = np.bincount((found & 0xFF).astype(np.int64), minlength=256)
    assert ((counts - size / 256) ** 2 / (size / 256)).sum() < 256 + 5 * (2 * 256) ** 0.5
    byte, others = (found & 0xFF) / 256 - 0.5, (found >> np.uint64(16)) / 2**16 - 0.5
    for left, right in ((byte, others), (byte, np.roll(byte, 1))):
        assert abs((left * right).mean() * 12) < 5 / size**0.5


@pytest.mark.parametrize("r", [0, 1, 127, 128, 255])
def test_the_rounding_of_numbers_around_each_boundary(r: int) -> None:
    weights = torch.cat(
        [boundaries(), bits(0x7F7FFFFF, 0x7F7FFF01, 0x7F7FFF00, 0x7F7FFEFF, 0x80000000, 0, 0xFF, 0x7F800001)]
    )
    shown, rest = split(weights, torch.full(weights.shape, r, dtype=torch.int32))
    assert (shown.dtype, rest.dtype) == (BF16, torch.int8)
    expected = rounded(of(weights), np.full(len(weights), r))
    assert np.array_equal(of(joined(shown, rest)), expected)
    number = ~weights.isnan()
    assert torch.equal(joined(shown, rest).isfinite(), weights.isfinite())
    assert torch.equal(shown.isnan(), ~number)
    assert not rest[~number].any()
    assert torch.equal(joined(shown, rest)[weights == 0].view(torch.int32), weights[weights == 0].view(torch.int32))


def test_the_rounding_has_no_bias() -> None:
    """Over all random bytes the mean is the weight itself, also where the exponent changes."""
    weights = torch.cat([torch.linspace(-3, 5, 101), bits(0x3FFFFFFF, 0x3FFFFF01, 0x00000003, 0x007FFFFF, 0x80000080)])
    every = torch.arange(256, dtype=torch.int32)
    whole = joined(*split(weights.repeat(256, 1).T.contiguous(), every.expand(len(weights), 256).contiguous()))
    assert torch.equal(whole.double().mean(1), weights.double())


class Steps:
    """An optimizer of weights of 24 bits; each step is compared with one of float32 weights and a rounding by hand."""

    def __init__(self, run: Run, form: str, **options: Any) -> None:
        diagonal, rank_one, decay = FORMS[form]
        # Where CUDA's sweeps would number the elements of a copy, pure PyTorch steps in, whose last bits are others.
        layouts = CONTIGUOUS if run.backend == "cuda" and diagonal != "identity" else run.layouts
        problems = [
            mixed_problem(dtype, decay, 0, layouts, run.device, diagonal, rank_one) for dtype in (BF16, torch.float32)
        ]
        self.problem = problems[0]
        self.params, self.wide = (problem.params for problem in problems)
        for problem in problems:
            for group in problem.groups:
                group["lr"] /= 20
        kinds: list[dict[str, Any]] = [{"master_weight_bits": 24}, {}]
        self.optimizer, self.twin = (
            SOFIM(problem.groups, backend=run.backend, **kind, **options)
            for problem, kind in zip(problems, kinds, strict=True)
        )
        if run.ready:
            give_state(self.optimizer)
            give_state(self.twin)
        self._before: list[int] = []

    def begin(self) -> None:
        """Give the twin the weights that the other one has."""
        self._before = []
        for p, q in zip(self.params, self.wide, strict=True):
            known = self.optimizer.state.get(p, {})
            q.data.copy_(joined(p.detach(), known["master_bits"]) if "master_bits" in known else p.detach().float())
            self._before.append(int(known.get("step", 0)))

    def compare(self) -> None:
        for ordinal, (p, q) in enumerate(zip(self.params, self.wide, strict=True)):
            known, wide = self.optimizer.state.get(p), self.twin.state.get(q)
            if known is None or wide is None:
                assert known is wide
                continue
            assert known.keys() == wide.keys() | {"master_bits"}
            assert same_bits([known[name] for name in sorted(wide)], [wide[name] for name in sorted(wide)])
            whole, count = joined(p.detach(), known["master_bits"]), int(known["step"])
            if count == self._before[ordinal]:
                assert same_bits([whole], [q.detach()])
                continue
            # Elements are numbered in the order in which memory has those of the moment.
            r = torch.from_numpy((hashed(count, ordinal, p.numel()) & 0xFF).astype(np.int64))
            r = r.as_strided(p.shape, known["exp_avg"].stride()).contiguous().view(-1)
            assert np.array_equal(of(whole), rounded(of(q), r.numpy())), ordinal


@pytest.mark.covering(3, 1)
@pytest.mark.parametrize(("numerator", "state_dtype"), [("moment", None), ("gradient", BF16), ("nesterov", None)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", FORMS)
def test_each_step_is_that_of_float32_weights_and_a_rounding(
    form: str, schedule: str, numerator: str, state_dtype: torch.dtype | None, run: Run
) -> None:
    steps = Steps(run, form, numerator=numerator, state_dtype=state_dtype, **SCHEDULES[schedule])
    for count, grads in enumerate(islice(steps.problem.gradients(), run.steps(4 if EMULATED else 8))):
        wide = [None if g is None else g.float() for g in grads]
        if schedule == "skip" and count == 2:
            wide[0] = torch.full_like(wide[0], float("inf"))  # type: ignore[arg-type]
            grads = [None if g is None else g.bfloat16() for g in wide]
        give(steps.params, wide if count % 2 else grads)
        give(steps.wide, wide)
        steps.begin()
        for optimizer in (steps.optimizer, steps.twin):
            optimizer.step()
        steps.compare()
    rest = torch.cat([known["master_bits"].reshape(-1) for known in steps.optimizer.state.values()])
    assert rest.dtype == torch.int8
    assert rest.count_nonzero() > 0.5 * rest.numel()  # a weight of few steps may have none


@pytest.mark.parametrize(("form", "numerator"), [("decoupled decay", "moment"), ("mixed", "nesterov")])
def test_gradients_taken_in_the_backward_pass(form: str, numerator: str, run: Run) -> None:
    """Where a weight is written once in a step."""
    steps = Steps(run, form, numerator=numerator, in_backward=True)
    for grads in islice(steps.problem.gradients(), run.steps(4)):
        steps.begin()
        for params, optimizer in ((steps.params, steps.optimizer), (steps.wide, steps.twin)):
            terms = [(p * g.to(p.dtype)).sum() for p, g in zip(params, grads, strict=True) if g is not None]
            torch.stack(terms).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        steps.compare()


@pytest.mark.parametrize("numerator", NUMERATORS[1:])
def test_where_a_weight_would_be_rounded_twice_it_is_refused(numerator: str) -> None:
    p = nn.Parameter(torch.ones(3, dtype=BF16))
    with pytest.raises(ValueError, match=r"would round it twice in a step.*master_weight_bits=32"):
        SOFIM([p], in_backward=True, numerator=numerator, master_weight_bits=24)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_state_dicts(backend: str) -> None:
    """The rest is an int8, which ranks can send each other and torch.load(weights_only=True) reads."""
    p, q = (nn.Parameter(torch.linspace(-2, 2, 40).to(BF16)) for _ in range(2))
    optimizer, other = (SOFIM([x], lr=0.01, backend=backend, master_weight_bits=24) for x in (p, q))
    advance(optimizer, p, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["state"][0]["master_bits"].dtype == torch.int8
    assert saved["param_groups"][0]["master_weight_bits"] == 24
    other.load_state_dict(saved)
    q.data.copy_(p.data)
    for one, param in (
        (optimizer, p),
        (other, q),
        (copied := copy.deepcopy(other), copied.param_groups[0]["params"][0]),
    ):
        advance(one, param, 3)
    assert same_bits([p.detach(), optimizer.state[p]["master_bits"]], [q.detach(), other.state[q]["master_bits"]])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("loaded", [False, True], ids=["in a group", "in a state dict"])
def test_the_number_of_bits_can_change_later(loaded: bool, backend: str) -> None:
    """From 24 to 32 nothing is lost, and from 32 to 24 the lower 8."""
    p = nn.Parameter(torch.linspace(-2, 2, 40).to(BF16))
    optimizer = SOFIM([p], lr=0.01, backend=backend, master_weight_bits=24)
    advance(optimizer, p, 3)
    for number, dtype in ((32, torch.int16), (24, torch.int8)):
        before = joined(p.detach(), optimizer.state[p]["master_bits"])
        if loaded:
            saved = optimizer.state_dict()
            saved["param_groups"][0].update(master_weight_bits=number, lr=0.0)
            optimizer.load_state_dict(saved)
        else:
            optimizer.param_groups[0].update(master_weight_bits=number, lr=0.0)
        advance(optimizer, p, 1)
        assert optimizer.state[p]["master_bits"].dtype == dtype
        expected = before if number == 32 else (before.view(torch.int32) & ~0xFF).view(torch.float32)
        assert same_bits([joined(p.detach(), optimizer.state[p]["master_bits"])], [expected])
        optimizer.param_groups[0].update(lr=0.01)
        advance(optimizer, p, 3)


def test_converted_rests_never_overflow() -> None:
    weights = boundaries()
    shown, rest = split(weights)
    back = joined(shown, converted(rest, torch.int8))
    assert torch.equal(back.isfinite(), weights.isfinite())
    assert torch.equal(converted(converted(rest, torch.int8), torch.int16), rest >> 8 << 8)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_small_updates_add_up(backend: str) -> None:
    """Of a 32nd of the last bit that a weight has; rounding to nearest would lose all of them."""
    p, steps, update = nn.Parameter(torch.ones(10_000, dtype=BF16)), 64, 2.0**-21
    optimizer = SOFIM([p], lr=update * 1e9, momentum=0.0, rho=1e9, backend=backend, master_weight_bits=24)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    moved = 1 - joined(p.detach(), optimizer.state[p]["master_bits"]).double().mean().item()
    assert abs(moved / (steps * update) - 1) < 0.02
