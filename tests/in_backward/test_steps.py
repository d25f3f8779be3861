"""Gradients that are taken in the backward pass: every kind of step comes to what a plain optimizer's comes to."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sofim_fused import SOFIM, in_backward
from tests.in_backward.support import (
    FISHERS,
    NARROW,
    Pair,
    Reluctant,
    backward,
    both_ways,
    in_backward_of,
    on_cpu,
)
from tests.support.problems import NUMERATORS, same_bits
from tests.support.runs import INTERPRETED, Run, once

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "float64": (torch.float64, {}),
    "float32": (torch.float32, {}),
    "wide": ((torch.complex64, torch.float64, torch.float32), {}),
    "bf16-moments": (torch.float32, {"state_dtype": torch.bfloat16}),
    "narrow": (NARROW, {"state_dtype": torch.bfloat16, "kahan": True}),
    "narrow-without-kahan": ((torch.bfloat16, torch.complex128, torch.float16), {"kahan": False}),
}
CASES = [
    (numerator, FISHERS[(i + i // 6) % 3], release, kind, decay)
    for i, (numerator, kind, decay, release) in enumerate(
        product(NUMERATORS, KINDS, ["none", "decoupled", "l2"], [False, True])
    )
    if numerator == "moment" or not kind.startswith("narrow")
    if not (INTERPRETED and (i + i // 2) % 2)  # to a kernel it is one, whether a gradient stays
]


@pytest.mark.covering(3, 2)
@pytest.mark.parametrize(("numerator", "fisher", "release", "kind", "decay"), CASES)
def test_equals_a_plain_optimizer(numerator: str, fisher: str, release: bool, kind: str, decay: str, run: Run) -> None:
    dtype, options = KINDS[kind]
    pair = Pair(run, dtype, decay, release=release, numerator=numerator, fisher=fisher, **options)
    for count, grads in enumerate(pair.gradients(7)):
        if count == 2:  # as schedulers do
            pair.set(lr=0.02, momentum=0.8, rho=1.1)
        pair.backward(grads)
        assert [p.grad is None for p in pair.params] == [release or g is None for g in grads]
        moments = pair.moments()
        pair.step()
        assert same_bits(moments, pair.moments())  # all of them were taken before
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_equals_a_plain_optimizer_above_the_size_of_a_tile(numerator: str, release: bool, run: Run) -> None:
    """Sums are put together from parts; the largest tensor is swept without Python's lock."""
    generator = torch.Generator().manual_seed(5)
    sizes = (40_001, (1 << 21) + 3, 70)
    values, *batches = ([1e-3 * torch.randn(n, generator=generator) for n in sizes] for _ in range(3))

    def start() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        params = [nn.Parameter(x.clone()) for x in values]
        return params, params

    def work(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
        for grads in batches:
            optimizer.zero_grad()
            backward(params, grads)
            optimizer.step()

    assert both_ways(run, start, work, release=release, numerator=numerator, rho=2.0)


class Watching(TorchDispatchMode):
    """Sees each operation, and lets it pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@once
@pytest.mark.parametrize("what", ["freeze_settings", "take", "half", "finish"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize(
    ("numerator", "dtype", "options"),
    [
        ("moment", NARROW, {"state_dtype": torch.bfloat16}),
        ("gradient", (torch.complex64, torch.float64, torch.float32), {}),
        ("nesterov", (torch.float32, torch.complex64, torch.float64), {}),
    ],
    ids=NUMERATORS,
)
def test_what_is_not_taken_natively_is_taken_by_passes(
    numerator: str, dtype: Any, options: dict[str, Any], fisher: str, what: str
) -> None:
    """All of it or a part, to the same bits."""
    pair = Pair(Run("cpu", "cpu"), dtype, "l2", numerator=numerator, fisher=fisher, **options)
    pair.plain._step_in_one_call = lambda *_: None
    mine = in_backward_of(pair.optimizer)
    mine._native = Reluctant(mine._native, what)
    for grads in pair.gradients(5):
        pair.backward(grads)
        pair.step()
    assert pair.alike()


@once
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_on_a_cpu_all_of_it_is_native(numerator: str, release: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a step that was not."""
    pair = Pair(Run("cpu", "cpu"), release=release, numerator=numerator)
    with Watching():
        pair.backward([torch.ones_like(p) for p in pair.params])
        pair.step()
    called: list[str] = []
    for name in ("_take_later", "_finish_by_passes"):
        monkeypatch.setattr(in_backward.InBackward, name, lambda *_, name=name: called.append(name))
    for grads in pair.gradients(4):
        pair.backward(grads)
        pair.step()
    assert called == []
    assert pair.alike()


@on_cpu
def test_in_a_dispatch_mode(run: Run) -> None:
    """Native parts leave a step to the passes there, and the mode sees what is done."""
    pair = Pair(run, decay="l2", numerator="gradient")
    ours = run.backend == "cpu"
    for count, grads in enumerate(pair.gradients(4)):
        if count % 2:
            with Watching() as mode:
                pair.backward(grads)
            assert any(("sofim_fused.accumulate_step" if ours else "_foreach_") in name for name in mode.seen)
            pair.step()
        else:
            pair.backward(grads)
            with Watching() as mode:
                pair.step()
            assert any(("sofim_fused.apply" if ours else "_foreach_") in name for name in mode.seen)
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("numerator", NUMERATORS)
def test_tensors_may_be_replaced_at_any_time(numerator: str, run: Run) -> None:
    """No pointer is kept: users replace ``param.data`` and state, also by what has gaps in memory."""
    pair = Pair(run, decay="l2", numerator=numerator)

    def replace() -> None:
        for optimizer, params in pair.both:
            for i, p in enumerate(params):
                p.data = p.data.clone()
                known = optimizer.state.get(p, {})
                known.update({name: x.clone() for name, x in known.items()})
                if known and i % 2 and p.dim():
                    known["exp_avg"] = known["exp_avg"].repeat_interleave(2, -1)[..., ::2]

    for grads in pair.gradients(5):
        replace()
        pair.backward(grads)
        replace()
        pair.step()
    assert pair.alike()
