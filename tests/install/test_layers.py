"""Who includes and imports whom: only what is below."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
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


# The modules and packages of sofim_fused, from the top. Each imports only from lines below its own; the modules of a
# package that stands for all of them may import each other.
FLOORS = (
    {"__main__"},
    {"info", "memory", "bench", "integrations"},
    {""},  # sofim_fused itself
    {"adasofim"},
    {"optimizer"},
    {"in_backward", "from_sgd", "from_adamw"},
    {"from_torch"},
    {"step.plan", "step.schedule", "step.sharded"},
    {"step.reduce"},
    {"step.gather", "step.hyperparameters"},
    {"backends"},
    {"checks_state_dict"},
    {"checks", "sharding"},
    {"blockwise", "dtensor", "native", "shapes"},
)


def floor_of(module: str) -> tuple[int, str]:
    """The floor of ``sofim_fused.<module>``, and the entry that stands for it there."""
    for floor, names in enumerate(FLOORS):
        for name in names:
            if module == name or (name in ("backends", "integrations") and module.startswith(f"{name}.")):
                return floor, name
    raise AssertionError(f"sofim_fused.{module} has no floor: add it to FLOORS")


def imported(file: Path) -> Iterator[str]:
    """The modules of the package that a file imports: anywhere in it, and for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            path = ROOT.joinpath(*name.split("."))
            while name and not (path.is_dir() or path.with_suffix(".py").is_file()):  # a name in a module
                name, path = name.rpartition(".")[0], path.parent
            if name.partition(".")[0] == "sofim_fused":
                yield name.partition(".")[2]


def test_modules_import_what_is_below() -> None:
    """So that each can be read without those above it. No exception for ``if TYPE_CHECKING``."""
    seen = set()
    for file in sorted(ROOT.glob("sofim_fused/**/*.py")):
        path = file.relative_to(ROOT / "sofim_fused").with_suffix("")
        name = ".".join(path.parts).removesuffix("__init__").strip(".")
        if name == "step":
            assert not list(imported(file))
            continue
        floor, mine = floor_of(name)
        for other in imported(file):
            below, theirs = floor_of(other)
            assert below > floor or mine == theirs in ("backends", "integrations"), (
                f"sofim_fused.{name} imports sofim_fused.{other}"
            )
            seen.add((mine, theirs))
    assert {("optimizer", "step.plan"), ("in_backward", "step.plan"), ("step.reduce", "backends")} <= seen
