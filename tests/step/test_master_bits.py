"""bfloat16 weights with ``master_weight_bits=32``: training is that of float32 weights, bit for bit."""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

import pytest
import torch
from torch import Tensor

from sofim_fused import SOFIM
from sofim_fused.backends.master_bits import joined, split
from tests.support.problems import NUMERATORS, give, give_state, mixed_problem, same_bits
from tests.support.runs import CPU_BACKENDS, EMULATED, Run

BF16 = torch.bfloat16


def bits(*patterns: int) -> Tensor:
    """Float32 numbers by their bits."""
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


def boundaries() -> Tensor:
    """Numbers of each sign and exponent: around each rounding of the upper half, and random ones."""
    generator = torch.Generator().manual_seed(0)
    upper = torch.arange(2**9, dtype=torch.int64) << 23  # sign and exponent
    mantissas = [
        high << 16 | low for high in (0, 1, 0x3F, 0x40, 0x7E, 0x7F) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    ]
    chosen = torch.cat([torch.tensor(mantissas), torch.randint(2**23, (100,), generator=generator)])
    return bits(*(upper[:, None] | chosen).reshape(-1).tolist())


def test_each_float32_comes_back_from_its_halves() -> None:
    weights = boundaries()
    shown, rest = split(weights)
    assert shown.dtype == BF16
    assert rest.dtype == torch.int16
    number = ~weights.isnan()
    back = joined(shown, rest)
    assert torch.equal(back.view(torch.int32)[number], weights.view(torch.int32)[number])
    quiet = torch.where(weights.view(torch.int32) < 0, -0x40, 0x7FC0).to(torch.int16)  # 0xFFC0, of a NaN's sign
    assert torch.equal(shown.view(torch.int16)[~number], quiet[~number])
    assert not rest[~number].any()
    # The bfloat16 is the nearest one: ties apart, that of PyTorch's own rounding.
    finite = weights.isfinite() & (weights.view(torch.int32) & 0xFFFF != 0x8000)
    assert torch.equal(shown[finite].view(torch.int16), weights[finite].bfloat16().view(torch.int16))
    away = bits(0x3F808000, 0x3F818000, 0xBF808000, 0x7F7FFFFF)
    assert split(away)[0].view(torch.int16).tolist() == [0x3F81, 0x3F82, 0xBF81 - 2**16, 0x7F80]


def test_a_rest_that_would_make_a_nan_counts_as_zero() -> None:
    """Of a weight that was replaced from outside: below either zero, and beyond either infinity."""
    shown = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("inf"), 1.0, float("nan")], dtype=BF16)
    rest = torch.tensor([-1, -(2**15), 1, 2**15 - 1, -1, -(2**15), -7], dtype=torch.int16)
    found = joined(shown, rest)
    expected = [0.0, -0.0, float("inf"), float("-inf"), torch.finfo(torch.float32).max, 1.0 - 2.0**-9]
    torch.testing.assert_close(found[:-1], torch.tensor(expected), rtol=0, atol=0)
    assert bool(found[1].signbit())
    assert bool(found[-1].isnan())


SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"max_grad_norm": 0.8},
    "skip": {"skip_nonfinite": True},
}
FORMS = {  # the diagonal, whether there is a term of rank one, and the decay
    "identity": ("identity", True, "none"),
    "decoupled decay": ("identity", True, "decoupled"),
    "L2 decay": ("identity", True, "l2"),
    "factored": ("factored", True, "decoupled"),
    "mixed": ("mixed", False, "none"),
}


class Twins:
    """An optimizer of bfloat16 weights with the other half of their bits, and one of float32 weights."""

    def __init__(self, run: Run, form: str, **options: Any) -> None:
        diagonal, rank_one, decay = FORMS[form]
        made = [
            mixed_problem(dtype, decay, 0, run.layouts, run.device, diagonal, rank_one)
            for dtype in (BF16, torch.float32)
        ]
        self.problem = made[0]
        self.params = [problem.params for problem in made]
        for narrow, wide in zip(*self.params, strict=True):
            wide.data.copy_(narrow.data)
        for problem in made:  # updates that bfloat16 cannot hold
            for group in problem.groups:
                group["lr"] /= 20
        self.optimizers = [SOFIM(problem.groups, backend=run.backend, **options) for problem in made]
        if run.ready:
            for optimizer in self.optimizers:
                give_state(optimizer)

    def whole(self) -> list[Tensor]:
        """The bfloat16 twin's weights in float32."""
        state = self.optimizers[0].state
        return [
            joined(p.detach(), state[p]["master_bits"]) if p in state else p.detach().float() for p in self.params[0]
        ]

    def assert_same(self) -> None:
        wide = [p.detach() for p in self.params[1]]
        assert same_bits(self.whole(), wide)
        assert same_bits([p.detach() for p in self.params[0]], [split(p)[0] for p in wide])
        for narrow, other in zip(*self.params, strict=True):
            if narrow not in self.optimizers[0].state:
                continue
            ours, theirs = (optimizer.state[p] for optimizer, p in zip(self.optimizers, (narrow, other), strict=True))
            assert ours.keys() == theirs.keys() | {"master_bits"}
            names = sorted(theirs)
            assert same_bits([ours[name] for name in names], [theirs[name] for name in names])


@pytest.mark.covering(2, 1)
@pytest.mark.parametrize(("numerator", "state_dtype"), [("moment", None), ("gradient", BF16), ("nesterov", None)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", FORMS)
def test_training_is_that_of_float32_weights(
    form: str, schedule: str, numerator: str, state_dtype: torch.dtype | None, run: Run
) -> None:
    twins = Twins(run, form, numerator=numerator, state_dtype=state_dtype, **SCHEDULES[schedule])
    known = list(islice(twins.problem.gradients(), 12))
    long = run.backend == "cpu" and numerator == "moment"
    steps = run.steps(1_000 if long else 12 if EMULATED else 100)
    for count, grads in enumerate(islice(cycle(known), steps)):
        wide = [None if g is None else g.float() for g in grads]
        if schedule == "skip" and count == 2:
            wide[0] = torch.full_like(wide[0], float("inf"))  # type: ignore[arg-type]
            grads = [None if g is None else g.bfloat16() for g in wide]
        give(twins.params[0], wide if count % 2 else grads)
        give(twins.params[1], wide)
        for optimizer in twins.optimizers:
            optimizer.step()
    twins.assert_same()
    rest = torch.cat([known["master_bits"].reshape(-1) for known in twins.optimizers[0].state.values()])
    assert rest.count_nonzero() > 0.9 * rest.numel()
    assert int(twins.optimizers[0].skipped_steps) == (schedule == "skip")


@pytest.mark.covering(2, 1)
@pytest.mark.parametrize("form", ["decoupled decay", "L2 decay"])
@pytest.mark.parametrize("numerator", NUMERATORS)
@pytest.mark.parametrize("state_dtype", [None, BF16], ids=str)
def test_gradients_taken_in_the_backward_pass(
    form: str, state_dtype: torch.dtype | None, numerator: str, run: Run
) -> None:
    """Weights change twice in a step of the gradient form and of the look-ahead, and lose nothing in between."""
    twins = Twins(run, form, numerator=numerator, state_dtype=state_dtype, in_backward=True)
    for grads in islice(twins.problem.gradients(), run.steps(8)):
        for params, optimizer in zip(twins.params, twins.optimizers, strict=True):
            terms = [(p * g.to(p.dtype)).sum() for p, g in zip(params, grads, strict=True) if g is not None]
            torch.stack(terms).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    twins.assert_same()


def small(dtype: torch.dtype = BF16, **options: Any) -> tuple[SOFIM, Tensor]:
    """An optimizer that has taken three steps, and its parameter."""
    p = torch.nn.Parameter(torch.linspace(-2, 2, 40).to(dtype))
    optimizer = SOFIM([p], lr=0.01, **options)
    advance(optimizer, p, 3)
    return optimizer, p


def advance(optimizer: SOFIM, p: Tensor, steps: int) -> None:
    for step in range(steps):
        p.grad = torch.cos(torch.arange(40.0) * (step + 1)).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_replaced_weight_stands(backend: str) -> None:
    """The rest of the old one moves it by half an ulp at most, and does not show; zero stays zero."""
    optimizer, p = small(backend=backend)
    rest = optimizer.state[p]["master_bits"].clone()
    assert rest.count_nonzero() > 30
    values = torch.linspace(-3, 5, 40).bfloat16()
    values[:4] = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    with torch.no_grad():
        p.copy_(values)
    optimizer.param_groups[0].update(lr=0.0)
    advance(optimizer, p, 1)
    assert torch.equal(p.detach(), values)
    whole = joined(p.detach(), optimizer.state[p]["master_bits"])
    assert not whole.isnan().any()
    assert bool(((whole - values.float())[4:].abs() <= values.float()[4:].abs() * 2.0**-8).all())
    assert bool((whole[:2].abs() < 1e-40).all())


def test_state_dicts_have_bits_that_ranks_can_send() -> None:
    """float16, which NCCL and gloo know; a state that was put into place as it was saved is good, too."""
    (optimizer, p), (twin, q) = small(), small()
    saved = optimizer.state_dict()["state"][0]["master_bits"]
    assert saved.dtype == torch.float16
    assert saved.data_ptr() == optimizer.state[p]["master_bits"].data_ptr()
    optimizer.state[p]["master_bits"] = saved.clone()  # as a ZeroRedundancyOptimizer does
    for made, param in ((optimizer, p), (twin, q)):
        advance(made, param, 3)
    assert optimizer.state[p]["master_bits"].dtype == torch.int16
    assert same_bits([p.detach(), optimizer.state[p]["master_bits"]], [q.detach(), twin.state[q]["master_bits"]])
    older = twin.state_dict()
    older["state"][0]["master_bits"] = twin.state[q]["master_bits"]  # the int16 themselves
    optimizer.load_state_dict(older)
    assert torch.equal(optimizer.state[p]["master_bits"], twin.state[q]["master_bits"])


def test_an_optimizer_of_an_older_version_goes_on_with_kahan() -> None:
    """Its groups do not have the option; its state has the bits of Kahan's compensation."""
    old, p = small(kahan=True)
    old.param_groups[0]["kahan"] = None  # the default of that version
    saved = old.state_dict()
    del saved["param_groups"][0]["master_weight_bits"]
    other = torch.nn.Parameter(p.detach().clone())
    new = SOFIM([other])
    new.load_state_dict(saved)
    old.param_groups[0].update(kahan=True)
    for optimizer, param in ((old, p), (new, other)):
        advance(optimizer, param, 5)
    assert set(new.state[other]) == {"exp_avg", "step", "kahan"}
    assert same_bits(list(new.state[other].values()), [old.state[p][name] for name in new.state[other]])
    assert same_bits([p.detach()], [other.detach()])


@pytest.mark.parametrize(
    ("saving", "loading"), [(BF16, torch.float32), (torch.float32, BF16), (BF16, torch.float16)], ids=str
)
def test_states_of_weights_of_another_dtype(saving: torch.dtype, loading: torch.dtype) -> None:
    """The rest belongs to a bfloat16 weight alone: others do without it, and new ones begin with none."""
    optimizer, _ = small(saving)
    other = torch.nn.Parameter(torch.zeros(40, dtype=loading))
    loaded = SOFIM([other])
    loaded.load_state_dict(optimizer.state_dict())
    assert set(loaded.state[other]) == {"exp_avg", "step"}
    with torch.no_grad():
        other.fill_(1.0)
    loaded.param_groups[0].update(lr=0.0)
    advance(loaded, other, 1)
    assert bool((other == 1.0).all())
    lost = {torch.float32: set(), BF16: {"master_bits"}, torch.float16: {"kahan"}}[loading]
    assert loaded.state[other].keys() - {"exp_avg", "step"} == lost


def test_the_kind_of_lost_bits_can_change_later() -> None:
    """Those of one kind are not taken for those of the other: the weight that is seen stands, and only one is kept."""
    optimizer, p = small()
    shown = p.detach().clone()
    assert optimizer.state[p]["master_bits"].any()
    for kahan, bits, name in ((True, "auto", "kahan"), (None, 32, "master_bits")):
        optimizer.param_groups[0].update(kahan=kahan, master_weight_bits=bits, lr=0.0)
        advance(optimizer, p, 1)
        assert same_bits([p.detach()], [shown])
        assert optimizer.state[p].keys() - {"exp_avg", "step"} == {name}
        assert not optimizer.state[p][name].any()
    optimizer.param_groups[0].update(kahan=True)
    with pytest.raises(ValueError, match="kahan=True with master_weight_bits=32"):
        optimizer.step()


def test_groups_may_have_their_own() -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=BF16)) for _ in range(4)]
    settings: list[dict[str, Any]] = [{}, {"kahan": True}, {"master_weight_bits": None}, {"kahan": False}]
    optimizer = SOFIM([{"params": [p], **setting} for p, setting in zip(params, settings, strict=True)])
    for p in params:
        p.grad = torch.ones(3, dtype=BF16)
    for _ in range(2):
        optimizer.step()
    lost = [optimizer.state[p].keys() - {"exp_avg", "step"} for p in params]
    assert lost == [{"master_bits"}, {"kahan"}, {"kahan"}, set()]
