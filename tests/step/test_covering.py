"""Which cases are left out where each case is dear, or cannot run (tests/support/covering.py, tests/conftest.py)."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import conftest
from tests.support.covering import chosen
from tests.support.runs import Run


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_values_that_meet_in_all_cases_meet_in_those_that_are_chosen(strength: int) -> None:
    """Also where columns depend on each other; and few are chosen."""
    cases = [(a, b, c, d, (a + b + c + d) % 2) for a, b, c, d in product(range(4), range(3), range(3), range(2))]

    def meetings(some: list[tuple[int, ...]]) -> set[tuple[object, ...]]:
        return {(columns, *(case[i] for i in columns)) for case in some for columns in combinations(range(5), strength)}

    places = chosen(cases, strength)
    assert places == sorted(set(places)) == chosen(cases, strength)
    assert meetings([cases[place] for place in places]) == meetings(cases)
    assert len(places) <= {1: 5, 2: 18, 3: 50}[strength] < len(cases)


def test_nothing_is_left_out_of_one_case_or_none() -> None:
    assert chosen([], 3) == []
    assert chosen([(1, 2, 3, 4)], 3) == [0]


class Case:
    """As pytest collects it: of a test that is marked ``covering``, or not, and ``gpu``, or not."""

    def __init__(self, marked: bool, gpu: bool = False, **params: Any) -> None:
        self.marked, self.gpu = marked, gpu
        self.fixturenames = ["run"]
        self.function = type(self) if marked else None
        self.name = f"test[{params}]"
        self.callspec = SimpleNamespace(params={"run": Run("triton", "cpu", None, None), **params})

    def get_closest_marker(self, name: str) -> Any:
        marked = {"covering": self.marked, "gpu": self.gpu}[name]
        return SimpleNamespace(args=(1,)) if marked else None


def left(items: list[Any], deselected: list[Any], asked: bool = False) -> Counter[str]:
    """Leaves cases out of ``items``; how many by what is said of them."""
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    config: Any = SimpleNamespace(getoption={"all_cases": asked}.__getitem__, hook=hook, stash=pytest.Stash())
    config.stash[conftest.LEFT_OUT] = Counter()
    conftest.pytest_collection_modifyitems(config, items)
    return +config.stash[conftest.LEFT_OUT]


@pytest.mark.parametrize(("gpu", "asked", "expected"), [(False, False, 4), (False, True, 16), (True, False, 16)])
def test_cases_are_left_out_where_there_are_many(
    gpu: bool, asked: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only of a test that is marked, not with ``--all-cases``, and none on a GPU."""
    monkeypatch.setattr(conftest, "ALL_ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    marked, other = ([Case(yes, gpu, a=a, b=b) for a, b in product(range(4), repeat=2)] for yes in (True, False))
    items: list[Any] = [*marked, *other]
    deselected: list[Any] = []
    counts = left(items, deselected, asked)
    kept = [case for case in items if case.marked]
    assert len(kept) == expected
    assert {case.callspec.params["a"] for case in kept} == {case.callspec.params["b"] for case in kept} == set(range(4))
    assert [case for case in items if not case.marked] == other
    assert set(deselected) == set(marked) - set(kept)
    assert counts == +Counter({conftest.COVERED: len(deselected)})


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_cases_for_a_gpu_are_left_out_where_there_is_none(
    gpu: bool, every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one, a case in eight of the tests of backends runs, unless all are asked for."""
    monkeypatch.setattr(conftest, "ALL_ON_GPU", every)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cases = [Case(False, gpu=True, a=a) for a in range(400)]
    special, other = Case(False, gpu=True), Case(False)
    special.fixturenames = ["backend"]
    items: list[Any] = [*cases, special, other]
    deselected: list[Any] = []
    counts = left(items, deselected)
    if not gpu:
        assert items == [other]
        assert counts == {conftest.NEED_GPU: 401}
    elif every:
        assert items == [*cases, special, other]
        assert not counts
    else:
        assert items[-2:] == [special, other]
        assert 30 < len(items) - 2 < 80
        assert counts == {conftest.ONE_IN_EIGHT: len(deselected)}
    assert len(items) + len(deselected) == 402


def test_each_backend_is_in_the_selection() -> None:
    """And each of its values with each backend, as every value of another argument."""
    cases = [Case(True, a=a) for a in range(4) for _ in ("cpu", "reference")]
    for i, case in enumerate(cases):
        case.callspec.params["run"] = Run(("cpu", "reference")[i % 2], "cpu")
    values = [conftest.values_of(case) for case in cases]
    assert {(a, backend) for a, backend, *_ in values} == set(product("0123", ("cpu", "reference")))
    assert len(chosen(values, 2)) == len(cases)


def test_what_other_processes_leave_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one that reports, which has not seen the cases."""
    monkeypatch.setattr(conftest, "CHECKED", Counter())  # this process may have counted some
    stash, lines = pytest.Stash(), []
    stash[conftest.LEFT_OUT] = Counter()
    config: Any = SimpleNamespace(stash=stash)
    reporter: Any = SimpleNamespace(write_line=lines.append)
    conftest.pytest_terminal_summary(reporter, config)
    assert lines == []
    conftest.pytest_testnodedown(SimpleNamespace(config=config, workeroutput={"left_out": {conftest.NEED_GPU: 1234}}))
    conftest.pytest_terminal_summary(reporter, config)
    assert lines == ["1,234 cases need a GPU that PyTorch finds; on such a machine: make gpu, or pytest -m gpu"]
