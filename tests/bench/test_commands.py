"""Every command of bench and examples says what it does, and does nothing else, when it is asked for help."""

from __future__ import annotations

import re
import runpy
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = [
    file
    for folder in ("bench", "examples")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if re.search("^if __name__ == .__main__.:", file.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize("file", COMMANDS, ids=[file.relative_to(ROOT).as_posix() for file in COMMANDS])
def test_help(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own handlers
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(file), run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
