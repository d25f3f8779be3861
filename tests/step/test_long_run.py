"""The long run, cut short: what it says of drift, and that it is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import long_run
from bench.long_run import KINDS, Run


def test_drift_is_what_rounding_allows() -> None:
    rows = Run(300).rows
    drift = {(row["provider"], row["steps"]): row for row in rows["drift"]}
    assert list(drift) == [(name, steps) for name in KINDS for steps in (100, 300)]
    for row in rows["drift"]:
        assert 0 < row["of_bound"] < 1
    assert drift["float32", 300]["drift"] < 1e-6
    assert drift["bfloat16 with Kahan", 300]["drift"] < 1e-4 < drift["bfloat16 without Kahan", 300]["drift"]
    assert [row["provider"] for row in rows["speed"]] == [*KINDS, long_run.CONTROL]
    assert rows["speed"][-1]["beside"] == pytest.approx(1, rel=1e-12)
    assert rows["memory"][0]["start"] > 0


def test_a_wrong_step_is_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = long_run.SOFIM.step
    monkeypatch.setattr(
        long_run.SOFIM, "step", lambda self: self.param_groups[0].update(momentum=0.8999) or steps(self)
    )
    rows = Run(300).rows["drift"]
    assert [row["met"] for row in rows if row["provider"] == "float32"] == [False, False]


def test_it_is_written_down(tmp_path: Path) -> None:
    path = tmp_path / "long_run.json"
    long_run.main(["--steps", "200", "--json", str(path)])
    record = json.loads(path.read_text())
    assert record["command"] == "python -m bench.long_run --steps 200"
    assert list(record["tables"]) == list(long_run.TABLES)
    assert "bfloat16 without Kahan" in path.with_suffix(".md").read_text()
