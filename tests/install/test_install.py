"""Installation never degrades in silence: what pip runs with and without torch, and what a fallback says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch import nn

from sofim_fused import SOFIM, backends, info, native

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COMMAND = "pip install --no-build-isolation --no-cache-dir ."
FALLBACK = "SOFIM runs in pure PyTorch"
STALE = {"_C.cpython-311-x86_64-linux-gnu.so": "built", "_build.json": "{}"}  # of an earlier build
HOOK = """
import json, sys
from setuptools import build_meta
print("RESULT", json.dumps(getattr(build_meta, sys.argv[1])(*sys.argv[2:])))
"""


# What pip runs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("these are not the sources")
    place = tmp_path / "sources"
    for name in ("sofim_fused", "csrc", "tests", "examples", "bench", "docs", ".ci"):
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "results")
        shutil.copytree(ROOT / name, place / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", ".clang-tidy"):
        shutil.copy(ROOT / name, place)
    for file in ROOT.glob("*[A-Z]*"):
        if file.is_file():
            shutil.copy(file, place)
    return place


@pytest.fixture
def isolated(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has setuptools and nothing else, as pip makes one to build in."""
    place = tmp_path / "isolated"
    place.mkdir()
    installed = Path(setuptools.__file__).parents[1]
    for pattern in ("setuptools*", "_distutils_hack", "pkg_resources"):
        for found in installed.glob(pattern):
            (place / found.name).symlink_to(found)
    return {"PYTHONPATH": str(place)}


def hook(name: str, *arguments: str, source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a hook of the build system (PEP 517) comes to; with ``isolated``, without site-packages."""
    unset = {key: value for key, value in os.environ.items() if not key.startswith("SOFIM_")}
    return subprocess.run(
        [sys.executable, *(["-S"] if "PYTHONPATH" in environment else []), "-c", HOOK, name, *arguments],
        cwd=source,
        env={**unset, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def result(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULT ")[2])


def record_in(wheel: Path) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as opened:
        return dict(json.loads(opened.read("sofim_fused/_build.json")))


@pytest.mark.parametrize("name", ["build_wheel", "build_editable"])
def test_nothing_is_built_without_torch(name: str, source: Path, isolated: dict[str, str], tmp_path: Path) -> None:
    """pip would hide any lesser message. What was built earlier stays as it is."""
    for file, content in STALE.items():
        (source / "sofim_fused" / file).write_text(content)
    done = hook(name, str(tmp_path), source=source, **isolated)
    assert done.returncode != 0
    last = done.stderr.partition("error: torch cannot be imported where sofim_fused is built (ModuleNotFoundError: ")[2]
    assert last.startswith("No module named 'torch')")
    assert COMMAND in last
    assert "SOFIM_BUILD_CPU=0" in last
    for file, content in STALE.items():
        assert (source / "sofim_fused" / file).read_text() == content
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.parametrize("name", ["build_wheel", "build_editable"])
def test_without_torch_pure_python_has_to_be_asked_for(
    name: str, source: Path, isolated: dict[str, str], tmp_path: Path
) -> None:
    wheel = result(hook(name, str(tmp_path), source=source, SOFIM_BUILD_CPU="0", **isolated))
    assert wheel.endswith("py3-none-any.whl" if name == "build_wheel" else ".whl")
    record = (
        record_in(tmp_path / wheel)
        if name == "build_wheel"
        else json.loads((source / "sofim_fused" / "_build.json").read_text())
    )
    assert record["reason"] == "SOFIM_BUILD_CPU=0 was set"
    assert record["expected"] is False


def test_metadata_and_sources_take_no_torch(source: Path, isolated: dict[str, str], tmp_path: Path) -> None:
    """As ``pip download``, resolvers and ``python -m build --sdist`` ask for them."""
    for kind in ("wheel", "editable", "sdist"):
        assert result(hook(f"get_requires_for_build_{kind}", source=source, **isolated)) == []
    for kind in ("wheel", "editable"):
        made = result(hook(f"prepare_metadata_for_build_{kind}", str(tmp_path), source=source, **isolated))
        assert "\nName: sofim_fused\n" in (tmp_path / made / "METADATA").read_text()
    assert result(hook("build_sdist", str(tmp_path), source=source, **isolated)).endswith(".tar.gz")


def test_with_torch_a_compiler_may_be_missing(source: Path, tmp_path: Path) -> None:
    """The record then says that a native part was expected, so that the first step tells why it is not there."""
    wheel = result(hook("build_wheel", str(tmp_path), source=source, CXX="/nowhere/c++"))
    record = record_in(tmp_path / wheel)
    assert record["reason"] == "there is no C++ compiler (/nowhere/c++ does not run)"
    assert record["expected"] is True


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("raise OSError('libtorch_cpu.so: cut off')", "is built (OSError: libtorch_cpu.so: cut off). "),
        ("__version__ = '2.4.1+cpu'", "the installed torch, and torch 2.4.1+cpu is too old. "),
    ],
    ids=["broken", "too old"],
)
def test_a_torch_that_is_no_good(
    content: str, text: str, source: Path, isolated: dict[str, str], tmp_path: Path
) -> None:
    """Built for an old torch, the native part would be useless as soon as pip has fetched the required one."""
    package = tmp_path / "isolated" / "torch"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text(content)
    (package / "utils" / "__init__.py").touch()
    (package / "utils" / "cpp_extension.py").write_text("BuildExtension = object")
    done = hook("build_wheel", str(tmp_path), source=source, **isolated)
    assert done.returncode != 0
    assert text in done.stderr
    assert COMMAND in done.stderr


def test_an_old_setuptools_is_named(source: Path, isolated: dict[str, str]) -> None:
    """As Python 3.11 puts one into each new environment. Of the licence's notation it would say nothing useful."""
    old = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    done = subprocess.run(
        [sys.executable, "-S", "-c", old, "egg_info"],
        cwd=source,
        env={**os.environ, **isolated},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "error: setuptools 65.5.0 is too old to build sofim_fused" in done.stderr
    assert '"setuptools>=77"' in done.stderr
    assert COMMAND in done.stderr


def test_the_sources_are_packed_whole(source: Path, isolated: dict[str, str], tmp_path: Path) -> None:
    """With the tests and all that these need; without what was built, and what running it left."""
    for name, content in STALE.items():
        (source / "sofim_fused" / name).write_text(content)
    (source / "tests" / "__pycache__").mkdir()
    (source / "tests" / "__pycache__" / "oracle.cpython-311.pyc").touch()
    packed = result(hook("build_sdist", str(tmp_path), source=source, **isolated))
    with tarfile.open(tmp_path / packed) as opened:
        found = {name.partition("/")[2] for name in opened.getnames() if not name.endswith("/")}
    expected = {
        str(file.relative_to(source))
        for file in source.rglob("*")
        if file.is_file() and file.name not in STALE and file.suffix != ".pyc" and ".egg-info" not in str(file)
    }
    assert {"tests/conftest.py", "tests/emulator/cuda_runtime.h", "docs/reliability.md", "Makefile"} <= expected
    assert expected - found == set()
    assert {name for name in found if name.endswith((".so", ".pyc", "_build.json"))} == set()


def test_documents_name_the_oldest_torch() -> None:
    """As pyproject.toml has it, from which setup.py takes it. ``make against`` is how it was found."""
    if not (ROOT / "README.md").is_file():
        pytest.skip("these are not the sources")
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    for document in ("README.md", "docs/installation.md"):
        text = (ROOT / document).read_text()
        assert set(re.findall(r"torch ?(?:>=|≥) ?([\d.]*\d)", text)) == {oldest}, document
    assert f"TORCH=torch=={oldest}." in (ROOT / "Makefile").read_text()


# What a fallback says


@pytest.fixture(autouse=True)
def _untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has warned of nothing."""
    monkeypatch.setattr(backends, "_WARNED", set())


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No native part, and a record of the build that tests may change."""
    record = {**native.build(), "reason": "there is no C++ compiler", "expected": True}
    reason = f"the native part was not built: {record['reason']}"
    monkeypatch.setattr(native, "build", lambda: record)
    monkeypatch.setitem(backends._REGISTRY, "cpu", lambda device: reason if device.type == "cpu" else "not here")
    return record


def parameter(device: str = "cpu") -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, device=device))]


@pytest.mark.usefixtures("without_native")
def test_the_first_fallback_warns_and_no_other() -> None:
    """At the line that made the optimizer, with the reason and with what to do."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer = SOFIM(parameter())
            optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
            optimizer.step()
        backends.choose("auto", CPU)
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert text.startswith(f"{FALLBACK} on cpu")
    assert "cpu: the native part was not built: there is no C++ compiler" in text
    assert "pip install --no-build-isolation --no-cache-dir " in text
    assert "backend='reference'" in text
    assert "cuda:" not in text  # of no interest on a CPU
    assert "triton:" not in text
    assert optimizer.backends == {CPU: "reference"}


@pytest.mark.usefixtures("without_native")
def test_a_warning_that_is_an_error_changes_nothing_and_comes_again() -> None:
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=FALLBACK):
                SOFIM(parameter())


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize(
    "options", [{"backend": "reference"}, {"foreach": True}, {"foreach": False}, {"fused": False}], ids=str
)
def test_who_asks_for_pure_pytorch_is_not_warned(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SOFIM(parameter(), **options).backends == {CPU: "reference"}


def test_who_installed_pure_python_is_not_warned(without_native: dict[str, Any]) -> None:
    without_native["expected"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SOFIM(parameter()).backends == {CPU: "reference"}


def test_devices_without_a_native_part_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SOFIM(parameter("meta")).backends == {torch.device("meta"): "reference"}
        for device in ("mps", "xpu"):
            assert backends.choose("auto", torch.device(device, 0)).name == "reference"


@pytest.mark.parametrize("there", [True, False], ids=["there", "in fake tensors only"])
def test_a_gpu_that_neither_kernel_runs_on(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the CPU part is: Triton does not depend on what was built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(native, "build", lambda: {"expected": False})
    monkeypatch.setitem(backends._REGISTRY, "cuda", lambda device: "nvcc was not found")
    monkeypatch.setitem(backends._REGISTRY, "triton", lambda device: "Triton 3.1.0 is older than 3.6")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert backends.choose("auto", GPU).name == "reference"
    assert len(caught) == there
    if there:
        text = str(caught[0].message)
        assert "on cuda" in text
        assert "cuda: nvcc was not found; triton: Triton 3.1.0 is older than 3.6" in text
        assert "pip install --no-build-isolation --no-cache-dir " in text
        assert "cpu:" not in text


@pytest.mark.usefixtures("without_native")
def test_info_says_what_to_do_and_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = list(info.lines())
    (line,) = (line for line in said if "many times slower" in line)
    assert "pip install --no-build-isolation --no-cache-dir " in line


@pytest.mark.usefixtures("without_native")
def test_who_asks_for_native_code_is_told_the_same() -> None:
    """But not where it lies here: reports of other machines have these messages."""
    with pytest.raises(
        RuntimeError,
        match=r"no C\+\+ compiler.* build the package again: pip install --no-build-isolation --no-cache-dir \.$",
    ):
        SOFIM(parameter(), fused=True)
    with pytest.raises(RuntimeError) as other:
        backends.choose("cuda", CPU)
    assert "build the package again" not in str(other.value)  # nothing brings that one to a CPU


def test_the_remedy_fits_the_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was installed from a folder that is still in use (``-e``) stays so; otherwise the folder is not known."""
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(native, "_RECORD", tmp_path / "a b" / "sofim_fused" / "_build.json")
    assert native.remedy() == f"{COMMAND} in the folder with the sources of sofim_fused"
    (tmp_path / "a b" / "setup.py").touch()
    assert native.remedy() == f"{COMMAND[:-1]}-e '{tmp_path}/a b'"


# PyTorch is imported once; each folder that is named gets a process of its own, forked from there.
FIRST_STEPS = """
import json, os, sys, warnings
import torch, torch._dynamo  # which torch.optim.Optimizer takes a second to import
# That of an installation with -e would find what is missing here.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
for line in sys.stdin:
    folder, version = json.loads(line)
    if os.fork():
        if os.wait()[1]:
            print("failed", flush=True)
        continue
    sys.path.insert(0, folder)
    torch.__version__ = version or torch.__version__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import sofim_fused
    assert sofim_fused.__file__.startswith(folder)
    assert not caught
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            p = torch.nn.Parameter(torch.ones(2))
            optimizer = sofim_fused.SOFIM([p])
            p.grad = torch.ones(2)
            optimizer.step()
    said = [str(w.message) for w in caught if "SOFIM" in str(w.message)]
    print(json.dumps([list(optimizer.backends.values()), said]), flush=True)
    break
"""
FirstStep = Callable[[Path, str], tuple[list[str], list[str]]]


@pytest.fixture(scope="module")
def first_step(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FirstStep]:
    """The first step of an installation in a folder, under a version of PyTorch: the backends, and what is said."""
    process = subprocess.Popen(
        [sys.executable, "-c", FIRST_STEPS],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    given, answers = process.stdin, process.stdout

    def take(folder: Path, version: str) -> tuple[list[str], list[str]]:
        given.write(json.dumps([str(folder), version]) + "\n")
        given.flush()
        answer = answers.readline()
        assert answer.startswith("["), answer
        used, said = json.loads(answer)
        return used, said

    yield take
    given.close()
    assert process.wait() == 0


@pytest.mark.skipif(isinstance(native.cpu(), str), reason="the native part is not there")
@pytest.mark.parametrize(
    ("damage", "upgraded", "text"),
    [
        ("nothing", "", ""),
        ("nothing", "99.1.0", f"it was built for torch {torch.__version__}, and this is torch 99.1.0"),
        ("cut off", "", " is cut off): reinstall sofim_fused"),
        ("no library", "", "No module named 'sofim_fused._C'): reinstall sofim_fused"),
        ("no record", "", "the package was not installed"),
        ("an earlier record", "", ""),
    ],
    ids=["whole", "torch upgraded", "cut off", "no library", "no record", "an earlier record"],
)
def test_what_becomes_of_an_installation_later(
    damage: str, upgraded: str, text: str, first_step: FirstStep, tmp_path: Path
) -> None:
    """``import`` says nothing; the first optimizer says, once, why its native part is not used any more."""
    package = tmp_path / "sofim_fused"
    shutil.copytree(Path(native.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (library,) = package.glob("_C.*.so")
    record = package / "_build.json"
    if damage == "cut off":
        library.write_bytes(library.read_bytes()[:5000])
    elif damage == "no library":
        library.unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "an earlier record":
        record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "expected"}))
    used, said = first_step(tmp_path, upgraded)
    assert used == ["reference" if text else "cpu"]
    assert len(said) == bool(text)
    assert all(text in line and "--no-cache-dir" in line for line in said)
