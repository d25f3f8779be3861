"""Who includes and imports whom: only what is below."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# By folder of csrc, the folders that its files may include from.
INCLUDES = {
    "step": {"step"},
    "gather": {"gather", "step"},
    "cpu": {"cpu", "gather", "step"},
    "cuda": {"cuda", "gather", "step"},
}


def test_folders_of_csrc_include_what_is_below() -> None:
    """The CPU's and CUDA's parts share ``gather`` and ``step``, which know of neither."""
    seen = set()
    for file in sorted(ROOT.glob("csrc/*/*")):
        folder = file.parent.name
        for other in re.findall(r'^#include "(\w+)/', file.read_text(encoding="utf-8"), re.MULTILINE):
            seen.add((folder, other))
            assert other in INCLUDES[folder], f"{file.relative_to(ROOT)} includes from csrc/{other}"
    assert ("gather", "step") in seen
