"""`bench.distributed`: what is measured, what is modelled, and the documents of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import distributed

from bench import distributed as bench
from bench import documents, report
from tests.support.runs import EMULATED, INTERPRETED

pytestmark = [
    pytest.mark.skipif(EMULATED or INTERPRETED, reason="processes of their own have no stand-ins"),
    pytest.mark.skipif(not distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]

ROOT = Path(__file__).parents[2]


def test_everything_in_miniature(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    bench.main(["--rounds", "2", "--ranks", "2", "--models", "LeNet-5", "--out", str(path)])
    tables = json.loads(path.read_text())["tables"]
    assert [row["bytes"] for row in tables["all_reduce"]] == list(bench.MESSAGES)
    ends = [row for row in tables["all_reduce"] if row["bytes"] in (bench.MESSAGES[0], bench.MESSAGES[-1])]
    assert [row["line"] for row in ends] == pytest.approx([row["median"] for row in ends])
    steps = {(row["ranks"], row["provider"]): row for row in tables["step"]}
    assert {ranks for ranks, _ in steps} == {1, 2}
    assert {provider: steps[2, provider]["sent"] for _, provider in steps} == {
        "SGD": None,
        "SOFIM": [8],
        "SGD, clipped": None,
        "SOFIM, clipped": [64],
        "SGD, fused, plain tensors": None,
    }
    assert steps[1, "SOFIM"]["sent"] == []
    assert steps[2, "SGD, clipped"]["ratio"] == 1
    assert path.with_suffix(".md").read_text().count("\n## ") == 3


@pytest.mark.parametrize(
    ("gpus", "microseconds"),
    [
        (1, 0),
        (8, 6.8 + 2 * 7 * 0.6),
        (64, 6.8 + 2 * (7 * 0.6 * 1.8 + 3 * 5)),
        (16384, 6.8 + 2 * (7 * 0.6 * 1.8 + 11 * 5)),
    ],
)
def test_the_model_of_an_all_reduce(gpus: int, microseconds: float) -> None:
    assert 1e6 * bench.all_reduce_time(gpus, 0) == pytest.approx(microseconds)


def test_modelled_rows() -> None:
    rows = list(bench.model_rows(bench.Run(1, [2], [])))
    assert len(rows) == 20
    for row in rows:
        if row["passes"] is None:
            assert row["parameters"] * bench.STATE_BYTES > row["gpus"] * bench.GPU_MEMORY
        else:
            assert row["shards"] <= row["gpus"]
            assert row["parameters"] * bench.STATE_BYTES <= row["shards"] * bench.GPU_MEMORY
            assert row["hybrid_message"] <= row["message"]
            assert row["passes"] <= row["hybrid_passes"]
    assert {row["shards"] for row in rows if row["parameters"] == 1e9} == {1}


def test_documents_come_from_the_results_that_are_committed() -> None:
    record = json.loads((report.RESULTS / "distributed.json").read_text())
    text = (report.RESULTS / "distributed.md").read_text()
    assert report.markdown(record, bench.TABLES, bench.INTRODUCTION) == text
    document = (ROOT / "docs" / "distributed.md").read_text()
    assert len(documents.BLOCK.findall(document)) == 4
    assert documents.filled(document, report.RESULTS) == document
