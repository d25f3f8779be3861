"""The comparison of two revisions, where both are this one: sources are copied whole, processes take turns."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench import builds


def test_the_sources_of_this_folder_are_copied_whole(tmp_path: Path) -> None:
    if not (builds.ROOT / ".git").exists():
        pytest.skip("these sources have no history")
    now = builds.sources_of(None, tmp_path / "now")
    for name in ("setup.py", "sofim_fused/optimizer.py", "csrc/cpu/kernels.cpp"):
        assert (now / name).read_bytes() == (builds.ROOT / name).read_bytes()
    before = builds.sources_of("HEAD", tmp_path / "before")
    assert (before / "setup.py").is_file()


def test_two_processes_take_steps_in_turns(tmp_path: Path) -> None:
    """Each with its own package, also where a revision has a package ``bench`` of its own."""
    for name in ("before", "now"):
        shutil.copytree(builds.ROOT / "sofim_fused", tmp_path / name / "sofim_fused")
        (tmp_path / name / "bench").mkdir()
        (tmp_path / name / "bench" / "__init__.py").touch()
    workers = {name: builds.Worker(tmp_path / name, threads=1) for name in ("before", "now")}
    try:
        rows = list(builds.steps(workers, ["lenet-5"], rounds=2, seconds=0.001))
    finally:
        for worker in workers.values():
            worker.close()
    assert [(row["storage"], row["schedule"]) for row in rows] == [
        (storage, schedule) for storage in builds.STORAGE for schedule in builds.SCHEDULES
    ]
    assert all(row["before"] > 0 and row["now"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in rows)


def test_a_row_above_its_limit_is_missed() -> None:
    row = {
        "model": "m", "storage": "float32", "schedule": "plain", "before": 1e-3, "now": 1.04e-3, "ratio": 1.04,
        "low": 1.0, "high": 1.1, "limit": 1.03,
    }  # fmt: skip
    cost = {"everything": 100.0, "default": 60.0, "passes": 80.0}
    record = {
        "command": "c", "cpu": "p", "torch": "t", "threads": 1, "date": "d",
        "build": {"before": cost, "now": {name: value / 4 for name, value in cost.items()}}, "steps": [row],
    }  # fmt: skip
    text = builds.markdown(record)
    assert "| whole build | 100.0 | 25.0 | 0.25 |" in text
    assert text.count("`c`: p, torch t; d") == 2
    assert "| m | float32 | plain | 1 | 1.04 | 1.040 [1.000, 1.100] | 1.03: missed |" in text


def test_a_run_over_some_models_keeps_the_rows_of_others() -> None:
    """Under the command that measured them."""
    rows = [{"model": "m", "ratio": 1.0}, {"model": "n", "ratio": 1.1}]
    earlier = {"command": "c", "cpu": "p", "torch": "t", "date": "d", "threads": 2, "steps": rows}
    kept = builds.other_models(earlier, ["m"])
    assert kept == [{"model": "n", "ratio": 1.1, "run": "`c`: p, torch t; d, 2 thread(s)"}]
    assert builds.other_models({**earlier, "command": "later", "steps": kept}, ["m"]) == kept
    assert builds.other_models(None, ["m"]) == []


def test_a_run_that_only_compiles_keeps_the_steps() -> None:
    """And says of both parts which command measured them."""
    cost = {"everything": 100.0, "passes": 80.0}
    run = {"cpu": "p", "torch": "t", "date": "d", "threads": 1}
    steps = [
        {
            "model": "m", "storage": "float32", "schedule": "plain", "before": 1e-3, "now": 1e-3, "ratio": 1.0,
            "low": 1.0, "high": 1.0, "limit": 1.03,
        }
    ]  # fmt: skip
    earlier = {**run, "command": "both", "build": {"before": cost, "now": cost}, "steps": steps}
    now = {name: value / 2 for name, value in cost.items()}
    record = {**run, "command": "one", "build": {"before": cost, "now": now}, "steps": []}
    assert builds.with_steps_of(None, record) == record
    for known in (earlier, builds.with_steps_of(earlier, record)):
        text = builds.markdown(builds.with_steps_of(known, record))
        assert "`one`: p, torch t; d.\n\n| | before | now |" in text
        assert "| whole build | 100.0 | 50.0 | 0.50 |" in text
        assert "`both`: p, torch t; d, 1 thread(s).\n" in text
        assert "| m | float32 | plain | 1 | 1 |" in text
