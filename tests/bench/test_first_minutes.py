"""What the measurement of a newcomer's first minutes counts, with a demo that takes a moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import first_minutes
from bench.report import RESULTS

# It works for some time, in a process of a process, and waits for some.
SLOW = """demo:
\t@echo '[  0 s] Working'
\t@python3 -c 'import time; [0 for _ in iter(lambda: time.process_time() < {work}, False)]'
\t@sleep 0.3
\t@echo '[ 12 s] Done [1 s] at last'
"""


def test_time_and_work_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sources_of(revision: str | None, place: Path) -> Path:
        place.mkdir()
        (place / "Makefile").write_text(SLOW.format(work=0.1 if revision is None else 0.6))
        return place

    monkeypatch.setattr(first_minutes, "sources_of", sources_of)
    path = tmp_path / "first.json"
    first_minutes.main(["--before", "v0", "--rounds", "2", "--output", str(path)])
    runs = json.loads(path.read_text())["runs"]
    assert [len(runs[name]) for name in ("before", "now")] == [2, 2]
    for run in runs["before"]:
        assert run["wall"] >= 0.9
        assert run["cpu"] >= 0.6
        assert run["phases"] == [[0, "Working"], [12, "Done [1 s] at last"]]
    assert all(run["wall"] >= 0.4 for run in runs["now"])
    document = path.with_suffix(".md").read_text()
    assert "| CPU-seconds | 1 |" in document
    assert "    [ 12 s] Done [1 s] at last" in document


def test_a_demo_that_fails_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("demo:\n\t@echo no space left; exit 3\n")
    with pytest.raises(RuntimeError, match=r"ended with 2:[^$]*no space left"):
        first_minutes.measured(tmp_path)


def test_the_committed_document_is_that_of_the_committed_results() -> None:
    record = json.loads((RESULTS / "first_minutes.json").read_text())
    assert (RESULTS / "first_minutes.md").read_text() == first_minutes.markdown(record)
    assert record["runs"]["now"][-1]["phases"], "the Makefile says what it does"
