"""The mutations of ``make mutations``: the sources still have what they change, and every stage of CI has one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import mutations
from tests.mutations import MUTATIONS, Mutation, place_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="these are not the sources")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.stage)
def test_the_text_is_there_once(mutation: Mutation) -> None:
    assert mutation.old != mutation.new
    assert mutation.old in place_of(mutation, ROOT).read_text(encoding="utf-8")


def test_every_stage_has_one() -> None:
    """Each make target that .ci/run names; ``native`` is the build itself."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    stages = {name for line in re.findall(r"\ball ([a-z -]+?) (?:&&|\|\|)", script) for name in line.split()}
    assert {mutation.stage for mutation in MUTATIONS} == stages - {"native"}


@pytest.mark.parametrize("content", ["", "one = 1\none = 1\n"], ids=["gone", "twice"])
def test_a_text_that_is_not_there_once_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(content)
    with pytest.raises(SystemExit, match=r"let tests/mutations\.py follow the sources"):
        place_of(Mutation("lint", "*.py", "one = 1", "one = 2", ""), tmp_path)


@pytest.mark.parametrize(
    ("recipe", "noticed"),
    [
        ("grep -q 'one = 1' a.py || { echo wrong; exit 1; }", "yes"),
        ("grep -q 'one = 1' a.py", "NO: it failed for another reason"),
        ("echo wrong", "NO: it passed"),
    ],
    ids=["noticed", "something else", "passed"],
)
def test_a_stage_has_to_fail_for_the_right_reason(
    recipe: str, noticed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutations, "COPY", tmp_path)
    (tmp_path / "Makefile").write_text(f"stage:\n\t@{recipe}\n")
    (tmp_path / "a.py").write_text("one = 1\n")
    outcome = mutations.tried(Mutation("stage", "*.py", "one = 1", "one = 2", "wrong"), tmp_path / ".venv", False)
    assert outcome.noticed == noticed
    assert (tmp_path / "a.py").read_text() == "one = 1\n"
