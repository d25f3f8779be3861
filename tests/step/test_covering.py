"""Which cases are left out where each case is dear (tests/support/covering.py, tests/conftest.py)."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest

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
        self.function = type(self) if marked else None
        self.name = f"test[{params}]"
        self.callspec = SimpleNamespace(params={"run": Run("triton", "cpu", None, None), **params})

    def get_closest_marker(self, name: str) -> Any:
        marked = {"covering": self.marked, "gpu": self.gpu}[name]
        return SimpleNamespace(args=(1,)) if marked else None


@pytest.mark.parametrize(("gpu", "asked", "expected"), [(False, False, 4), (False, True, 16), (True, False, 16)])
def test_cases_are_left_out_where_there_are_many(gpu: bool, asked: bool, expected: int) -> None:
    """Only of a test that is marked, not with ``--all-cases``, and none on a GPU."""
    marked, other = ([Case(yes, gpu, a=a, b=b) for a, b in product(range(4), repeat=2)] for yes in (True, False))
    items: list[Any] = [*marked, *other]
    deselected: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    config: Any = SimpleNamespace(getoption={"all_cases": asked}.__getitem__, hook=hook, stash=pytest.Stash())
    config.stash[conftest.LEFT_OUT] = 0
    conftest.pytest_collection_modifyitems(config, items)
    kept = [case for case in items if case.marked]
    assert len(kept) == expected
    assert {case.callspec.params["a"] for case in kept} == {case.callspec.params["b"] for case in kept} == set(range(4))
    assert [case for case in items if not case.marked] == other
    assert set(deselected) == set(marked) - set(kept)
    assert config.stash[conftest.LEFT_OUT] == len(deselected)


def test_each_backend_is_in_the_selection() -> None:
    """And each of its values with each backend, as every value of another argument."""
    cases = [Case(True, a=a) for a in range(4) for _ in ("cpu", "reference")]
    for i, case in enumerate(cases):
        case.callspec.params["run"] = Run(("cpu", "reference")[i % 2], "cpu")
    values = [conftest.values_of(case) for case in cases]
    assert {(a, backend) for a, backend, *_ in values} == set(product("0123", ("cpu", "reference")))
    assert len(chosen(values, 2)) == len(cases)


def test_what_other_processes_leave_out_is_said() -> None:
    """By the one that reports, which has not seen the cases."""
    stash, lines = pytest.Stash(), []
    stash[conftest.LEFT_OUT] = 0
    config: Any = SimpleNamespace(stash=stash)
    reporter: Any = SimpleNamespace(write_line=lines.append)
    conftest.pytest_terminal_summary(reporter, config)
    assert lines == []
    conftest.pytest_testnodedown(SimpleNamespace(config=config, workeroutput={"left_out": 7}))
    conftest.pytest_terminal_summary(reporter, config)
    assert lines == ["7 cases left out of a covering: --all-cases runs them"]
