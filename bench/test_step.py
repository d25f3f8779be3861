"""The comparisons of bench.step under pytest-benchmark.

    pytest bench --benchmark-only

One group for each model and comparison. Providers run one after the other here; for ratios, bench.step times them in
turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.shapes import MODELS
from bench.step import GUARDED, PASSES, PLAIN, SIXTEEN_BIT, Recipe, Workload, one_pass, whole_step, worth_timing


class Model(NamedTuple):
    """A model's name and its workload, which one model after the other has in memory."""

    name: str
    work: Workload


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Model:
    """In float32."""
    return Model(request.param, Workload(MODELS[request.param]()))


@pytest.fixture(scope="module", params=list(MODELS))
def narrow_model(request: pytest.FixtureRequest) -> Model:
    """In bfloat16."""
    return Model(request.param, Workload(MODELS[request.param](), torch.bfloat16))


@pytest.mark.parametrize("provider", PLAIN)
def test_plain_step(benchmark: BenchmarkFixture, model: Model, provider: str) -> None:
    """Whole steps in float32."""
    _step(benchmark, "plain step", model, PLAIN, provider)


@pytest.mark.parametrize("provider", [*PASSES, "SGD fused"])
def test_pass(benchmark: BenchmarkFixture, model: Model, provider: str) -> None:
    """Each pass alone, beside SGD's whole step."""
    made = one_pass(provider, model.work) if provider in PASSES else whole_step(PLAIN[provider], model.work)
    _time(benchmark, "passes", model, made.call)


@pytest.mark.parametrize("provider", GUARDED)
def test_guarded_step(benchmark: BenchmarkFixture, model: Model, provider: str) -> None:
    """Whole steps in float32 with clipping."""
    _step(benchmark, "guarded step", model, GUARDED, provider)


@pytest.mark.parametrize("provider", SIXTEEN_BIT)
def test_sixteen_bit_step(benchmark: BenchmarkFixture, narrow_model: Model, provider: str) -> None:
    """Whole steps with bfloat16 weights and gradients."""
    _step(benchmark, "bfloat16 step", narrow_model, SIXTEEN_BIT, provider)


def _step(
    benchmark: BenchmarkFixture, comparison: str, model: Model, recipes: Mapping[str, Recipe], provider: str
) -> None:
    if provider not in worth_timing(recipes, model.work.elements):
        pytest.skip("the reference is what SOFIM uses anyway, or too slow for this model")
    _time(benchmark, comparison, model, whole_step(recipes[provider], model.work).call)


def _time(benchmark: BenchmarkFixture, comparison: str, model: Model, call: Callable[[], object]) -> None:
    benchmark.group = f"{model.name}: {comparison}"
    call()  # makes the state
    benchmark(call)  # for a second or five rounds
