"""Launches of Triton's kernels: only the first of a kind goes through Triton's own binding of arguments."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.host import CountingDriver
from sofim_fused.backends.triton import launch
from tests.support.runs import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
tl: Any = triton.language


@triton.jit
def kernel(x, n, scale, FIRST: tl.constexpr, SECOND: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    tl.store(x, tl.load(x) * scale + n + FIRST + SECOND)


@pytest.fixture
def driver() -> Iterator[CountingDriver]:
    driver = CountingDriver()
    with driver.installed():
        yield driver


def aligned(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.zeros(64, dtype=dtype)
    return x[(-x.data_ptr() % 16) // x.element_size() :]


def test_later_launches_of_a_kind_go_to_the_compiled_kernel(
    driver: CountingDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_compiled", {})
    bound: list[tuple[Any, ...]] = []
    once = kernel.run

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        bound.append(arguments)
        return once(*arguments, **options)

    monkeypatch.setattr(kernel, "run", types.MethodType(run, kernel))
    x = aligned()
    for count, (n, scale) in enumerate(((3, 0.5), (5, 2.0), (7, 3.0)), 1):
        launch.run(kernel, 4, x, n, scale, SECOND=20, FIRST=10, num_warps=2)
        assert driver.launches == count
        assert driver.arguments[0] is x
        assert driver.arguments[1:] == (n, scale, 10, 20)  # constants in the order of the signature
    assert len(bound) == 1
    launch.run(kernel, 4, x, 3, 0.5, SECOND=20, FIRST=11, num_warps=2)
    assert driver.arguments[1:] == (3, 0.5, 11, 20)
    launch.run(kernel, 4, x, 3, 0.5, SECOND=20, FIRST=10, num_warps=4)
    assert len(bound) == 3


INTEGERS = [0, 1, 2, 16, 17, -1, -16, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, 2**40 + 1, -(2**31), -(2**40), 2**63]


def test_kinds_tell_apart_all_that_triton_compiles_for(driver: CountingDriver) -> None:
    """In Triton's own words: what it specializes on."""
    *_, binder = kernel.device_caches[driver.get_current_device()]
    x = aligned()
    tensors = [x, x[1:], x[4:], aligned(torch.float64), aligned(torch.bfloat16), aligned(torch.bfloat16)[4:]]
    of_tensors = {i: (str(binder(t, 3, 0.5, 1, 2)[1]), launch._kind(t)) for i, t in enumerate(tensors)}
    of_numbers = {v: (str(binder(x, v, 0.5, 1, 2)[1]), launch._kind(v)) for v in (*INTEGERS, 0.5, float("inf"))}
    apart = 0
    for found in (of_tensors, of_numbers):
        for (theirs, ours), (other_theirs, other_ours) in itertools.combinations(found.values(), 2):
            assert ours != other_ours or theirs == other_theirs
            apart += theirs != other_theirs
    assert apart > 50  # Triton does specialize on these
