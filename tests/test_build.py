"""The build of the native part, what it records, and what the package makes of the record."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sofim_fused import info, native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what is built from, without what was built, and with C++ that compiles in no time, or not at all."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("these are not the sources")
    for name in ("sofim_fused", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "_build.json"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def built(source: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """What ``setup.py build_ext --inplace`` comes to, and its record."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith("SOFIM_")}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=source,
        env={**unset, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    record = source / "sofim_fused" / "_build.json"
    return done, json.loads(record.read_text()) if record.exists() else {}


def compiler(source: Path, body: str) -> str:
    """A command that calls itself a C++ compiler."""
    path = source / "my-c++"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo my-c++ 1.0; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"SOFIM_BUILD_CPU": "0"}, "SOFIM_BUILD_CPU=0 was set"),
        ({"CXX": "/nowhere/c++"}, "there is no C++ compiler (/nowhere/c++ does not run)"),
    ],
    ids=["switched off", "no compiler"],
)
def test_without_a_compiler_the_package_installs_and_says_why(
    source: Path, environment: dict[str, str], reason: str
) -> None:
    done, record = built(source, **environment)
    assert done.returncode == 0, done.stderr
    assert record["reason"] == reason
    assert record["instruction_sets"] == []
    assert done.stderr.count(f"sofim_fused: going on without the native CPU part: {reason}") == 1


def test_a_compiler_that_fails(source: Path) -> None:
    """What was built before goes, so that no half of it is used; the message names the switch that shows more."""
    stale = source / "sofim_fused" / "_C.cpython-311-x86_64-linux-gnu.so"
    stale.write_bytes(b"")
    command = compiler(source, "echo no >&2; exit 1")
    done, record = built(source, CXX=command)
    assert done.returncode == 0, done.stderr
    assert "could not be compiled (SOFIM_BUILD_CPU=1" in record["reason"]
    assert record["compiler"] == "my-c++ 1.0"
    assert not stale.exists()
    done, record = built(source, CXX=command, SOFIM_BUILD_CPU="1")
    assert done.returncode != 0
    assert "SOFIM_BUILD_CPU=1, but the native CPU part cannot be built" in done.stderr


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"SOFIM_BUILD_CPU": "yes"}, "SOFIM_BUILD_CPU='yes': take 0, 1 or auto"),
        ({"SOFIM_BUILD_CUDA": "on"}, "SOFIM_BUILD_CUDA='on': take 0, 1 or auto"),
        ({"SOFIM_BUILD_CUDA": "1"}, "SOFIM_BUILD_CUDA=1: csrc/cuda is not there in this version"),
        ({"SOFIM_BUILD_CPU": "1", "CXX": "/nowhere/c++"}, "SOFIM_BUILD_CPU=1, but the native CPU part cannot be built"),
    ],
    ids=str,
)
def test_switches_that_cannot_be_followed(source: Path, environment: dict[str, str], text: str) -> None:
    done, _ = built(source, **environment)
    assert done.returncode != 0
    assert text in done.stderr


# The record, as the package reads it

WHOLE = {
    "reason": None,
    "torch": torch.__version__,
    "python": ".".join(map(str, sys.version_info[:3])),
    "compiler": "c++ 12",
    "instruction_sets": ["avx512", "avx2", "default"],
    "sanitizers": None,
}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the package looks for its record."""
    path = tmp_path / "_build.json"
    monkeypatch.setattr(native, "_RECORD", path)

    def forget() -> None:
        native.build.cache_clear()
        native._find.cache_clear()

    forget()
    yield path
    forget()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "the package was not installed"),
        ("{", "_build.json is no record of a build"),
        ("[]", "_build.json is no record of a build"),
        ("{}", "_build.json is no record of a build"),
        (json.dumps({**WHOLE, "reason": "no compiler"}), "the native part was not built: no compiler"),
        (json.dumps({**WHOLE, "torch": "1.13.0"}), "it was built for torch 1.13.0, and this is torch"),
        (json.dumps({**WHOLE, "python": "3.6.1"}), "it was built for Python 3.6.1, and this is Python"),
        (json.dumps({**WHOLE, "instruction_sets": ["amx"]}), "it was built for amx, which this CPU does not run"),
    ],
    ids=["none", "cut off", "a list", "empty", "not built", "another torch", "another Python", "no instruction set"],
)
def test_why_there_is_no_native_part(content: str | None, reason: str, record: Path) -> None:
    if content is not None:
        record.write_text(content)
    found = native.cpu()
    assert isinstance(found, str)
    assert reason in found
    with pytest.raises(RuntimeError, match="the native CPU part is not in use: "):
        native.instruction_set()
    assert any("not in use" in line for line in info.lines())


def test_a_module_that_does_not_load_is_a_reason(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.write_text(json.dumps(WHOLE))

    def broken(name: str) -> Any:
        raise ImportError(f"{name}: undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(native.importlib, "import_module", broken)
    found = native.cpu()
    assert isinstance(found, str)
    assert "undefined symbol: _ZN3c10): reinstall sofim_fused" in found


@pytest.mark.parametrize(
    ("capability", "sets", "expected"),
    [
        ("AVX512", ["avx512", "avx2", "default"], "avx512"),
        ("AVX512", ["avx2", "default"], "avx2"),
        ("AVX2", ["avx512", "avx2", "default"], "avx2"),
        ("DEFAULT", ["avx512", "avx2", "default"], "default"),
        ("SVE256", ["default"], "default"),
    ],
)
def test_the_best_instruction_set_that_runs(
    capability: str, sets: list[str], expected: str, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.write_text(json.dumps({**WHOLE, "instruction_sets": sets}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    used = []

    class Module:
        kernels = 1

        @staticmethod
        def use_kernels(address: int) -> None:
            used.append(address)

    imported = []
    monkeypatch.setattr(native.importlib, "import_module", lambda name: imported.append(name) or Module)
    assert native.instruction_set() == expected
    assert imported == ["sofim_fused._C", f"sofim_fused._cpu_{expected}"]
    assert used == [1]


def test_info_tells_what_is_used() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "sofim_fused.info"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert f"torch            {torch.__version__}" in text
    assert "Backends for cpu, * by default:" in text
    found = native.cpu()
    assert f"  {'*' if not isinstance(found, str) else ' '} cpu        " in text
    assert f"  {' ' if not isinstance(found, str) else '*'} reference  ok" in text
    if isinstance(found, str):
        assert found in text
    else:
        assert f"{native.instruction_set()} in use" in text
