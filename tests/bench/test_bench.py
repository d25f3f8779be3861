"""The benchmarks measure what they say: shapes, the arithmetic of timings, and that nothing that is timed is idle."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import step, timing
from bench.shapes import CPU_MODELS, MODELS, elements, grid
from bench.step import ADAPTIVE, GUARDED, HOST, MEMORY, PASSES, PLAIN, SIXTEEN_BIT, TABLES, TARGETS, Recipe, Workload
from bench.timing import MIN_ROUNDS, WARMUP_ROUNDS, Timing, compare, copy_bandwidth, orders
from examples.models import LeNet5
from sofim_fused import SOFIM
from sofim_fused.backends.master_bits import joined

MS = 1_000_000


# Shapes


@pytest.mark.parametrize(
    ("model", "tensors", "size"),
    [
        ("lenet-5", 10, 61_706),
        ("1000x1K", 1000, 1_024_000),
        # Convolutions 9·(3·64 + 64·128 + 2·128² + 128·256 + 256·512 + 2·512²) = 6,563,520, their normalizations
        # 2·(64 + 3·128 + 256 + 3·512) = 4,480, the head 512·10 + 10 = 5,130.
        ("resnet-9", 26, 6_573_130),
        ("resnet-50", 161, 25_557_032),
        ("gpt2-small", 148, 124_439_808),
    ],
)
def test_models_have_their_known_sizes(model: str, tensors: int, size: int) -> None:
    shapes = MODELS[model]()
    assert (len(shapes), elements(shapes)) == (tensors, size)


def test_lenet5_has_the_shapes_of_the_example() -> None:
    assert MODELS["lenet-5"]() == [tuple(p.shape) for p in LeNet5(channels=1, classes=10).parameters()]


def test_the_grid_has_what_fits() -> None:
    cells = {name: (len(shapes), elements(shapes)) for name, shapes in grid().items()}
    assert len(cells) == 9
    assert max(size for _, size in cells.values()) == cells["100x1M"][1] == 100 << 20
    assert cells["1000x64K"] == (1000, 65_536_000)
    assert "1000x1M" not in cells
    assert not set(cells) & set(MODELS)


# Timing


class Clock:
    """Time that passes only in what is called."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[str] = []

    def __call__(self) -> int:
        return self.now

    def taking(self, name: str, cost: Callable[[int], int]) -> Callable[[], None]:
        """What takes ``cost(k)`` nanoseconds when it is called for the k-th time, from 0."""

        def call() -> None:
            self.now += cost(self.log.count(name))
            self.log.append(name)

        return call


def test_medians_percentiles_and_ratios() -> None:
    clock = Clock()
    unmeasured = WARMUP_ROUNDS + 1  # one to find the number of calls per sample
    costs = {"a": [1, 2, 3, 4, 6], "b": [2, 10, 3, 40, 5]}

    def cost(name: str) -> Callable[[int], int]:
        return lambda k: MS * (50 if k < unmeasured else costs[name][k - unmeasured])

    result = compare({name: clock.taking(name, cost(name)) for name in costs}, "a", 0, clock=clock)
    assert len(costs["a"]) == MIN_ROUNDS
    a, b = result["a"], result["b"]
    # On five samples the 20th percentile lies 0.8 of the way from the first to the second.
    assert a == pytest.approx(Timing(0.003, 0.0018, 0.0044, 1, MIN_ROUNDS, 1))
    assert b == pytest.approx(Timing(0.005, 0.0028, 0.016, 2, MIN_ROUNDS, 1))  # ratios 2, 5, 1, 10, 5/6
    samples = torch.tensor([costs["b"]], dtype=torch.float64) / 1e3
    assert [b.low, b.high] == pytest.approx(torch.quantile(samples, torch.tensor([0.2, 0.8]).double()).tolist())


def test_fast_calls_are_timed_in_batches_and_every_provider_is_called_equally_often() -> None:
    clock = Clock()
    providers = {name: clock.taking(name, lambda _, us=us: 1000 * us) for name, us in (("a", 40), ("b", 10), ("c", 90))}
    result = compare(providers, "b", 0.05, clock=clock)
    assert {t.calls for t in result.values()} == {128}  # the fastest takes 1.28 ms then
    assert [result[name].median for name in "abc"] == pytest.approx([4e-5, 1e-5, 9e-5])
    assert [result[name].ratio for name in "abc"] == pytest.approx([4, 1, 9])
    assert len(set(Counter(clock.log).values())) == 1


def test_rounds_go_on_until_the_time_is_spent() -> None:
    clock = Clock()
    providers = {name: clock.taking(name, lambda _: 2 * MS) for name in "ab"}
    assert {t.rounds for t in compare(providers, "a", 0.1, clock=clock).values()} == {25}
    assert {t.rounds for t in compare(providers, "a", 0.0, clock=clock).values()} == {MIN_ROUNDS}


def test_what_comes_before_a_call_is_not_timed() -> None:
    clock = Clock()
    providers = {name: clock.taking(name, lambda _: MS // 4) for name in "ab"}
    before = {"b": clock.taking("before b", lambda _: 7 * MS)}
    result = compare(providers, "a", 0.1, before=before, clock=clock)
    assert [result[name].median for name in "ab"] == pytest.approx([2.5e-4, 2.5e-4])
    assert clock.log.count("before b") == clock.log.count("b")
    assert all(first == "before b" for first, second in pairwise(clock.log) if second == "b")


@pytest.mark.parametrize("n", range(1, 8))
def test_in_the_orders_each_follows_each_other_equally_often(n: int) -> None:
    rows = orders(n)
    assert all(sorted(row) == list(range(n)) for row in rows)
    assert Counter(pair for row in rows for pair in pairwise(row)) == dict.fromkeys(permutations(range(n), 2), 2)
    assert Counter(row[0] for row in rows) == dict.fromkeys(range(n), 2)


def test_rounds_take_the_orders_in_turn() -> None:
    clock = Clock()
    names = "abcde"
    compare({name: clock.taking(name, lambda _: MS) for name in names}, "a", 0.05, clock=clock)
    rounds = ["".join(clock.log[i : i + 5]) for i in range(0, len(clock.log), 5)]
    expected = ["".join(names[i] for i in row) for row in orders(5)]
    assert rounds == [expected[i % len(expected)] for i in range(len(rounds))]
    assert len(set(rounds)) == len(expected)


def test_copy_bandwidth_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_millisecond(
        providers: Mapping[str, Callable[[], object]], baseline: str, seconds: float
    ) -> dict[str, Timing]:
        assert isinstance(copied := providers[baseline](), Tensor)
        assert copied.nbytes == 4_000_000
        assert copied.min() == 1
        return {baseline: Timing(1e-3, 1e-3, 1e-3, 1, 1, 1)}

    monkeypatch.setattr(timing, "compare", one_millisecond)
    assert copy_bandwidth(8_000_000, 1) == pytest.approx(8.0)


# Providers

SHAPES = [(40, 6, 5, 5), (17,), (), (20_011,)]  # long enough for clipping to be at work
COMPARISONS = {
    "plain": (PLAIN, torch.float32),
    "guarded": (GUARDED, torch.float32),
    "sixteen_bit": (SIXTEEN_BIT, torch.bfloat16),
    "adaptive": (ADAPTIVE, torch.float32),
    "host": (HOST, torch.float32),
    "memory": (MEMORY, torch.float32),
}
RECIPES = [(table, provider) for table, (recipes, _) in COMPARISONS.items() for provider in recipes]


def after(recipe: Recipe, work: Workload, steps: int = 3) -> list[Tensor]:
    """The change of the weights over some steps, in float64; with the rest that is kept beside 16-bit weights."""
    initial = [p.detach().clone() for p in work.parameters()]
    provider = step.whole_step(recipe, work)
    for _ in range(steps):
        provider.call()
    changes = []
    for param, start in zip(provider.params, initial, strict=True):
        known = provider.optimizer.state[param]
        if "master_bits" in known:
            whole = joined(param.detach(), known["master_bits"]).double()
        else:
            whole = param.detach().double() + known.get("kahan", torch.zeros(())).double()
        changes.append((whole - start.double()).reshape(-1))
    return changes


def other_way(recipe: Recipe) -> Recipe:
    """The same update by the reference backend, or by another optimizer tensor by tensor."""
    other: dict[str, Any] = {"backend": "reference"} if recipe.optimizer is SOFIM else {"foreach": False}
    if "fused" in recipe.options:
        other["fused"] = False
    return recipe._replace(options={**recipe.options, **other})


@pytest.mark.parametrize(("table", "name"), RECIPES)
def test_every_provider_takes_the_step_it_is_timed_for(table: str, name: str) -> None:
    recipes, dtype = COMPARISONS[table]
    recipe = recipes[name]
    if dtype == torch.bfloat16:  # a step that most weights notice
        recipe = recipe._replace(options={**recipe.options, "lr": 100 * recipe.options["lr"]})
    work = Workload(SHAPES, dtype)
    grads = [g.clone() for g in work.grads]
    change, expected = torch.cat(after(recipe, work)), torch.cat(after(other_way(recipe), work))
    assert change.count_nonzero() > 0.8 * work.elements
    if dtype == torch.bfloat16:
        assert (change == expected).double().mean() > 0.95  # sums of 8 bits, rounded in another order
    else:
        # The rounding of the weight that an update is added to counts; so does a bfloat16 moment's last bit.
        rtol = 2**-7 if "bfloat16" in name else 1e-4
        torch.testing.assert_close(change, expected, rtol=rtol, atol=3e-8)
    assert all(map(torch.equal, work.grads, grads)), "the gradients are everyone's"


def test_sgd_takes_the_momentum_step() -> None:
    """Three steps with one gradient move by lr·(1 + 1.9 + 2.71)·g."""
    work = Workload(SHAPES)
    for name in ("SGD fused", "SGD foreach", "SGD default"):
        for change, grad in zip(after(PLAIN[name], work), work.grads, strict=True):
            expected = -1e-3 * 5.61 * grad.double().reshape(-1)
            torch.testing.assert_close(change, expected, rtol=1e-4, atol=3e-8)


def test_clipping_is_at_work() -> None:
    work = Workload(SHAPES)
    norm = float(torch.nn.utils.get_total_norm(work.grads))
    assert norm > 1.2 * step.MAX_GRAD_NORM
    clipped = after(GUARDED["SGD fused, clip_grad_norm_"], work)
    for change, free in zip(clipped, after(PLAIN["SGD fused"], work), strict=True):
        torch.testing.assert_close(change, free * step.MAX_GRAD_NORM / norm, rtol=1e-3, atol=3e-8)


def test_every_pass_does_its_work() -> None:
    work = Workload(SHAPES)
    weights = [p.detach().clone() for p in work.parameters()]
    squares = torch.stack([g.double().square().sum() for g in work.grads])
    made = {name: step.one_pass(name, work) for name in PASSES}

    def moved(name: str) -> list[Tensor]:
        return [p.double() - w.double() for p, w in zip(made[name].params, weights, strict=True)]

    # The moment is 0.1 g at first, as one_pass has accumulated once; then 0.19 g, then 0.271 g.
    for moment in (0.19, 0.271):
        sums: Any = made["accumulate"].call()
        torch.testing.assert_close(sums.mm, moment**2 * squares, rtol=1e-5, atol=0)
    for _ in range(2):
        sums = made["dots"].call()
        torch.testing.assert_close(sums.gg, squares, rtol=1e-6, atol=0)
        torch.testing.assert_close(sums.mg, 0.1 * squares, rtol=1e-5, atol=0)
    made["apply"].call()
    made["commit"].call()  # a moment of 0.9·0.1 g + 0.1·0.5 g
    for name, moment in (("apply", 0.1), ("commit", 0.14)):
        for change, grad in zip(moved(name), work.grads, strict=True):
            torch.testing.assert_close(change, -1e-2 * moment * grad.double(), rtol=1e-3, atol=3e-8)
    for name in ("accumulate", "dots"):
        assert not any(change.count_nonzero() for change in moved(name))


def test_providers_share_gradients_and_nothing_else() -> None:
    work = Workload(SHAPES)
    first, second = (step.whole_step(PLAIN["SOFIM"], work) for _ in range(2))
    for p, q, grad in zip(first.params, second.params, work.grads, strict=True):
        assert torch.equal(p, q)
        assert p.data_ptr() != q.data_ptr()
        assert p.grad is q.grad is grad


def test_recreated_gradients_are_equal_and_elsewhere() -> None:
    work = Workload([(1,)] * 10)
    params = work.parameters()
    recreate = step._recreation(params, work.grads)
    for _ in range(2):
        previous = [p.grad for p in params]
        recreate()
        for p, grad, old in zip(params, work.grads, previous, strict=True):
            assert p.grad is not None
            assert p.grad is not old
            assert torch.equal(p.grad, grad)


# The runner


def test_targets_name_what_is_measured() -> None:
    measured = {**{table: set(recipes) for table, (recipes, _) in COMPARISONS.items()}, "passes": set(PASSES)}
    for (table, provider), by_model in TARGETS.items():
        assert table in TABLES
        assert provider in measured[table]
        assert set(by_model) <= set(CPU_MODELS)
    for table, (recipes, _) in COMPARISONS.items():
        assert TABLES[table].baseline in {*recipes, ""}


def test_a_missed_target_is_reported() -> None:
    rows = [
        {"model": model, "provider": "SOFIM", **step._verdict("plain", "SOFIM", model, ratio)}
        for model, ratio in (("lenet-5", 0.5), ("resnet-50", 1.21), ("1000x1e3", 9.0))
    ]
    assert [row["met"] for row in rows] == [True, False, None]
    assert step.targets({"plain": rows}) == "Targets met: 1 of 2. Missed: plain: SOFIM on resnet-50."
    assert [step._target(row) for row in rows] == ["≤ 0.5: met", "≤ 1.2: missed", ""]


def test_memory_is_that_of_state_and_peak() -> None:
    """SGD's step takes nothing besides its state, which is as large as a moment; the bound leaves room for pages."""
    shapes = [(1 << 20,)] * 4
    with step.fresh_processes() as pool:
        state, growth = pool.apply(step.memory_use, (shapes, "SGD fused", 1))
    assert state == 16 << 20
    assert state <= growth < 1.1 * state


def test_step_times_some_tables(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    step.main(
        ["--models", "lenet-5", "--tables", "adaptive", "--seconds", "0.01", "--threads", "1", "--json", str(path)]
    )
    record = json.loads(path.read_text())
    assert list(record["tables"]) == ["adaptive"]
    assert "--models lenet-5 --tables adaptive --threads 1" in record["command"]


def test_the_runner_writes_every_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "HOST_TENSORS", (10,))
    monkeypatch.setattr(step, "MEMORY", {"SOFIM": MEMORY["SOFIM"]})
    path = tmp_path / "step.json"
    step.main(["--models", "lenet-5", "--seconds", "0.05", "--threads", "1", "--json", str(path)])
    record = json.loads(path.read_text())
    assert (
        list(record["tables"])
        == list(TABLES)
        == [*("plain", "passes", "guarded", "adaptive", "sixteen_bit", "host", "memory")]
    )
    document = path.with_suffix(".md").read_text()
    printed = capsys.readouterr().out
    for key, rows in record["tables"].items():
        names = {row["provider"] for row in rows}
        whole = {"passes": {*PASSES, "SGD fused"}, "memory": {"SOFIM"}}.get(key) or set(COMPARISONS[key][0])
        assert whole - names <= {"SOFIM, reference"}  # left out where it is what "auto" takes
        assert TABLES[key].title in document
        assert TABLES[key].title in printed
        for row in rows:
            assert row.get("rounds", MIN_ROUNDS) >= MIN_ROUNDS
            assert row.get("median", 1) > 0
            assert f"| {row['provider']} |" in document
    assert str(tmp_path) not in path.read_text() + document
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["instruction_set"] in document
    assert record["command"] == "python -m bench.step --device cpu --models lenet-5 --threads 1 --seconds 0.05"
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0123456, "0.0123"), (0.5, "0.500"), (1.0, "1.00"), (12.34, "12.3"), (12345.6, "12346")]
)
def test_three_digits_count(value: float, shown: str) -> None:
    assert step._digits(value) == shown
