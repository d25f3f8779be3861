"""The comparison of roundings for second moments, in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import second_moments


def test_the_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "CASES", {"LeNet-5 on digits": second_moments.CASES["LeNet-5 on digits"]})
    monkeypatch.setattr(second_moments, "BETAS", (0.99,))
    monkeypatch.setattr(second_moments, "TRAINED", (0.99,))
    threads = torch.get_num_threads()
    try:
        second_moments.main(["--steps", "2", "--seeds", "1", "--output", str(tmp_path / "second.json")])
    finally:
        torch.set_num_threads(threads)
    tables = json.loads((tmp_path / "second.json").read_text())["tables"]
    assert [row["provider"] for row in tables["losses"]] == [
        *["float32", *second_moments.ROUNDINGS, "the package, both moments"]
    ]
    off = {row["provider"]: row["mean"] for row in tables["drift"]}
    assert off["nearest"] < off["stochastic, mean v"] - 5  # most of it stands still
    assert abs(off["stochastic, mean v"]) < 5
    assert "Running means of squares" in (tmp_path / "second.md").read_text()
