"""The build of the native parts, what it records, and what the package makes of the record."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from sofim_fused import backends, info, native

ROOT = Path(__file__).resolve().parents[2]
NO_CPU = "it needs the native CPU part, which is not there: "


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
    stale = source / "sofim_fused" / "_cuda.cpython-311-x86_64-linux-gnu.so"
    stale.write_bytes(b"")
    done, record = built(source, **environment)
    assert done.returncode == 0, done.stderr
    assert record["reason"] == reason
    assert record["instruction_sets"] == []
    assert record["expected"] == ("SOFIM_BUILD_CPU" not in environment)
    assert record["cuda"]["reason"] == NO_CPU + reason
    assert not stale.exists()
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


def test_native_is_the_instruction_set_that_torch_uses_here(source: Path) -> None:
    called = source / "called"
    built(source, CXX=compiler(source, f'echo "$*" >> {called}; exit 1'), SOFIM_INSTRUCTION_SETS="native")
    names = re.findall(r"-DCPU_CAPABILITY=(\w+)", called.read_text())
    used = torch.backends.cpu.get_cpu_capability()
    assert set(names) == {used if used in ("AVX512", "AVX2") else "DEFAULT"}


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"SOFIM_BUILD_CPU": "yes"}, "SOFIM_BUILD_CPU='yes': take 0, 1 or auto"),
        ({"SOFIM_BUILD_CUDA": "on"}, "SOFIM_BUILD_CUDA='on': take 0, 1, auto or emulated"),
        ({"SOFIM_BUILD_CPU": "1", "CXX": "/nowhere/c++"}, "SOFIM_BUILD_CPU=1, but the native CPU part cannot be built"),
        (
            {"SOFIM_BUILD_CPU": "0", "SOFIM_BUILD_CUDA": "1"},
            "SOFIM_BUILD_CUDA=1, but the native CUDA part cannot be built: it needs the native CPU part",
        ),
        ({"SOFIM_INSTRUCTION_SETS": "sse"}, "SOFIM_INSTRUCTION_SETS='sse': take some of "),
    ],
    ids=str,
)
def test_switches_that_cannot_be_followed(source: Path, environment: dict[str, str], text: str) -> None:
    done, _ = built(source, **environment)
    assert done.returncode != 0
    assert text in done.stderr


# The CUDA part

needs_compiler = pytest.mark.skipif(native.build()["reason"] is not None, reason="nothing is compiled here")
LEFT_OUT = "going on without the native CUDA part: "
MODULE = """
#include <Python.h>
int answer();
static PyModuleDef definition;
PyMODINIT_FUNC PyInit__cuda() {
  definition.m_name = "_cuda";
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", answer());
  return module;
}
"""
NVCC = """#!/bin/sh
case "$1" in
--version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
--list-gpu-arch) printf '%s\\n' compute_75 compute_80 compute_90 compute_120 ;;
--dryrun)
    echo '#$ INCLUDES="-I@/here/include"  ' >&2
    echo '#$ LIBRARIES=  "-L@/here/lib/stubs" "-L@/here/lib"' >&2 ;;
*)
    echo "$NVCC_APPEND_FLAGS $*" > '@/called'
    while [ "$1" != -o ]; do shift; done
    echo 'int answer() { return 7; }' | c++ -x c++ -fPIC -c -o "$2" - ;;
esac
"""


@pytest.fixture
def small(source: Path) -> Path:
    """The same with C++ of a few lines. The CUDA part is a module with a number, which comes from its kernels' file."""
    for file in (source / "csrc").rglob("*.c*"):
        if file.parent.name == "cuda":
            file.unlink()
        else:
            file.write_text("")
    (source / "csrc" / "cuda" / "module.cpp").write_text(MODULE)
    (source / "csrc" / "cuda" / "kernels.cu").write_text("#include <cuda_runtime.h>\nint answer() { return ANSWER; }\n")
    emulator = source / "tests" / "emulator"
    emulator.mkdir(parents=True)
    (emulator / "cuda_runtime.h").write_text("#pragma unroll\n#define ANSWER 42\n")
    return source


@pytest.fixture
def cuda_home(tmp_path: Path) -> Path:
    """A folder of CUDA's, with an nvcc that gives a few answers, and compiles the same whatever it is given."""
    home = tmp_path / "cuda"
    for name in ("bin", "here/lib"):
        (home / name).mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(NVCC.replace("@", str(home)))
    nvcc.chmod(0o755)
    return home


def built_small(source: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    return built(source, SOFIM_BUILD_CPU="1", SOFIM_INSTRUCTION_SETS="default", **environment)


def with_cuda(home: Path, *more: str) -> dict[str, str]:
    """An environment where PyTorch takes itself for one with CUDA. ``more``: lines that Python runs when it starts."""
    for name in ("cudart", "c10_cuda", "torch_cuda"):
        library = home / "here" / "lib" / f"lib{name}.so"
        subprocess.run(["c++", "-shared", "-x", "c++", os.devnull, "-o", library], check=True)
    lines = ["import torch", "from torch.utils import cpp_extension"]
    lines += ["torch.version.cuda, torch.version.hip = '13.1', None", f"cpp_extension.CUDA_HOME = {str(home)!r}"]
    (home / "sitecustomize.py").write_text("\n".join([*lines, *more]))
    return {"PYTHONPATH": str(home), "TORCH_CUDA_ARCH_LIST": "", "NVCC_APPEND_FLAGS": ""}


def modules(source: Path) -> list[str]:
    """The extension modules that are there."""
    return sorted(file.name.partition(".")[0] for file in (source / "sofim_fused").glob("*.so"))


def answer(source: Path) -> int:
    """The number of the CUDA part."""
    (file,) = (source / "sofim_fused").glob("_cuda.*.so")
    spec = importlib.util.spec_from_file_location("_cuda", file)
    assert spec is not None
    return int(importlib.util.module_from_spec(spec).answer)


@needs_compiler
def test_kernels_to_be_emulated_are_compiled_as_cpp(small: Path) -> None:
    done, record = built_small(small, SOFIM_BUILD_CUDA="emulated")
    assert done.returncode == 0, done.stderr
    assert record["instruction_sets"] == ["default"]
    nothing = {"compiler": None, "architectures": [], "emulated": False}
    assert record["cuda"] == {**nothing, "reason": None, "compiler": record["compiler"], "emulated": True}
    assert modules(small) == ["_C", "_cpu_default", "_cuda"]
    assert answer(small) == 42
    assert "warning" not in done.stdout + done.stderr
    (compiled,) = small.glob("build/temp*/*._cuda/**/kernels.o")
    before = compiled.stat().st_mtime_ns
    if shutil.which("ninja", path=os.pathsep.join((os.environ["PATH"], str(Path(sys.executable).parent)))):
        assert built_small(small, SOFIM_BUILD_CUDA="emulated")[0].returncode == 0
        assert compiled.stat().st_mtime_ns == before  # it was not compiled again
    done, record = built_small(small, SOFIM_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert record["cuda"] == {"reason": "SOFIM_BUILD_CUDA=0 was set", **nothing}
    assert modules(small) == ["_C", "_cpu_default"]
    assert LEFT_OUT not in done.stderr  # it was wanted so


@needs_compiler
def test_kernels_that_do_not_compile_leave_the_cpu_part_alone(small: Path, cuda_home: Path) -> None:
    """An error if they are to be emulated, as with SOFIM_BUILD_CUDA=1; else the package goes on without them."""
    stale = small / "sofim_fused" / "_cuda.cpython-311-x86_64-linux-gnu.so"
    (small / "csrc" / "cuda" / "launch.cpp").write_text("no")
    cause = "sofim_fused._cuda could not be compiled (SOFIM_BUILD_CUDA=1 and "
    for value, prefix, environment in (
        ("emulated", "SOFIM_BUILD_CUDA=emulated, but the native CUDA part cannot be built: ", {}),
        ("1", "SOFIM_BUILD_CUDA=1, but the native CUDA part cannot be built: ", with_cuda(cuda_home)),
        ("auto", LEFT_OUT, with_cuda(cuda_home)),
    ):
        stale.write_bytes(b"")
        done, record = built_small(small, SOFIM_BUILD_CUDA=value, **environment)
        assert (done.returncode == 0) == (value == "auto"), done.stderr
        assert done.stderr.count(prefix + cause) == 1
        assert record["reason"] is None
        assert record["cuda"]["reason"].startswith(cause)
        assert record["cuda"]["architectures"] == []
        assert modules(small) == ["_C", "_cpu_default"]


@needs_compiler
def test_without_the_cpu_part_there_is_no_other(small: Path) -> None:
    (small / "csrc" / "cpu" / "step.cpp").write_text("no")
    done, record = built_small(small, SOFIM_BUILD_CUDA="emulated")
    assert done.returncode != 0
    assert "sofim_fused._C could not be compiled (SOFIM_BUILD_CPU=1 and " in record["reason"]
    assert record["cuda"]["reason"] == NO_CPU + record["reason"]
    assert modules(small) == []


@needs_compiler
def test_nvcc_compiles_once_for_all_gpus(small: Path, cuda_home: Path) -> None:
    done, record = built_small(small, MAX_JOBS="6", **with_cuda(cuda_home))
    assert done.returncode == 0, done.stderr
    assert record["cuda"] == {
        "reason": None,
        "compiler": "nvcc 13.0.88",
        "architectures": ["sm_80", "sm_90", "sm_120", "compute_80"],
        "emulated": False,
    }
    assert answer(small) == 7
    called = (cuda_home / "called").read_text().split()
    assert [word.partition("=")[2] for word in called if "arch" in word] == [
        f"arch=compute_80,code={name}" for name in record["cuda"]["architectures"]
    ]
    assert "--threads=3" in called
    assert "-fmad=false" in called


@needs_compiler
def test_what_pytorch_says_against_nvcc_is_a_reason(small: Path, cuda_home: Path) -> None:
    """It checks compilers before it compiles anything."""
    refusal = ["def refuse(*_): raise RuntimeError('c++ is too new')", "cpp_extension._check_cuda_version = refuse"]
    done, record = built_small(small, **with_cuda(cuda_home, *refusal))
    assert done.returncode == 0, done.stderr
    assert record["reason"] is None
    assert record["cuda"]["reason"] == "c++ is too new"
    assert modules(small) == ["_C", "_cpu_default"]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs setup.py without its call of setup, and gives what it defines."""

    def run(**environment: str) -> dict[str, Any]:
        if not (ROOT / "setup.py").is_file():
            pytest.skip("these are not the sources")
        for name in [name for name in os.environ if name.startswith("SOFIM_") or name == "TORCH_CUDA_ARCH_LIST"]:
            monkeypatch.delenv(name)
        for name, value in {"CXX": compiler(tmp_path, "exit 1"), "PATH": os.environ["PATH"], **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        monkeypatch.chdir(ROOT)
        return runpy.run_path(str(ROOT / "setup.py"))

    return run


@pytest.mark.parametrize(
    ("versions", "environment", "reason"),
    [
        ((None, None), {}, "torch was built without CUDA"),
        ((None, "6.4"), {}, "not tried on ROCm; Triton serves there"),
        (("12.9", None), {}, "nvcc is 13.0.88, and torch was built with CUDA 12.9"),
        (("13.1", None), {"TORCH_CUDA_ARCH_LIST": "7.5"}, "TORCH_CUDA_ARCH_LIST: '7.5' is too old"),
        (("13.1", None), {"SOFIM_BUILD_CUDA": "0"}, "SOFIM_BUILD_CUDA=0 was set"),
        (("13.1", None), {"SOFIM_BUILD_CPU": "0"}, f"{NO_CPU}SOFIM_BUILD_CPU=0 was set"),
        (("13.1", None), {}, None),
    ],
    ids=str,
)
def test_why_cuda_is_left_out(
    versions: tuple[str | None, str | None],
    environment: dict[str, str],
    reason: str | None,
    planned: Callable[..., dict[str, Any]],
    cuda_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", versions[0])
    monkeypatch.setattr(torch.version, "hip", versions[1])
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(cuda_home))
    record = planned(**environment)["RECORD"]
    assert (record["reason"] is None) == ("SOFIM_BUILD_CPU" not in environment)
    if reason is None:
        assert record["cuda"]["reason"] is None
    else:
        assert record["cuda"]["reason"].startswith(reason)


@pytest.mark.parametrize(
    ("home", "reason"),
    [
        (None, "nvcc was not found; CUDA_HOME may say where CUDA is"),
        ("nowhere", "nvcc was not found; CUDA_HOME may say where CUDA is"),
        ("fails", "nvcc --version does not run"),
        ("silent", "nvcc is of an unknown version, and torch was built with CUDA 13.1"),
    ],
)
def test_nvcc_that_is_no_good(
    home: str | None,
    reason: str,
    planned: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home and str(tmp_path / home))
    for name, status in (("fails", 1), ("silent", 0)):
        nvcc = tmp_path / name / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\nexit {status}\n")
        nvcc.chmod(0o755)
    assert planned()["RECORD"]["cuda"]["reason"].endswith(reason)


KNOWN = [f"compute_{number}" for number in (75, 80, 86, 87, 89, 90, 100, 103, 120)]


@pytest.mark.parametrize(
    ("wanted", "known", "visible", "expected"),
    [
        ("", KNOWN, [], "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_80"),
        ("", KNOWN[:6], [], "sm_80 sm_86 sm_89 sm_90 compute_80"),
        ("9.0", KNOWN, [], "sm_90"),
        ("8.0 8.6", KNOWN, [], "sm_80 sm_86"),
        ("10.0;8.0; 8.0;9.0a+PTX", KNOWN, [], "sm_80 sm_90 sm_100 compute_80"),
        ("native", KNOWN, [(9, 0), (8, 9), (9, 0)], "sm_89 sm_90 compute_80"),
        ("native", KNOWN, [(13, 0)], "compute_80"),
        ("native", KNOWN, [], "TORCH_CUDA_ARCH_LIST=native, but PyTorch finds no GPU"),
        ("native", KNOWN, [(7, 0)], "TORCH_CUDA_ARCH_LIST: '7.0+PTX' is too old, as the kernels need 8.0"),
        ("7.5 8.0", KNOWN, [], "TORCH_CUDA_ARCH_LIST: '7.5' is too old, as the kernels need 8.0"),
        ("12.1", KNOWN, [], "TORCH_CUDA_ARCH_LIST: nvcc does not compile for '12.1'"),
        ("Hopper", KNOWN, [], "TORCH_CUDA_ARCH_LIST: 'Hopper' is not understood; take numbers, as 8.0 or 9.0+PTX"),
        ("", ["compute_90"], [], "nvcc does not compile for compute_80"),
    ],
)
def test_architectures(
    wanted: str, known: list[str], visible: list[tuple[int, int]], expected: str, planned: Callable[..., dict[str, Any]]
) -> None:
    setup = planned(SOFIM_BUILD_CPU="0")
    try:
        found = " ".join(setup["architectures"](wanted, known, lambda: visible))
    except setup["UnavailableError"] as reason:
        found = str(reason)
    assert found.partition(" (")[0] == expected


# The record, as the package reads it

WHOLE: dict[str, Any] = {
    "reason": None,
    "torch": torch.__version__,
    "python": ".".join(map(str, sys.version_info[:3])),
    "compiler": "c++ 12",
    "instruction_sets": ["avx512", "avx2", "default"],
    "sanitizers": None,
    "cuda": {"reason": None, "compiler": "nvcc 13.0.88", "architectures": ["sm_90", "compute_80"], "emulated": False},
}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the package looks for its record."""
    path = tmp_path / "_build.json"
    monkeypatch.setattr(native, "_RECORD", path)

    def forget() -> None:
        native.build.cache_clear()
        native._find.cache_clear()
        native._find_cuda.cache_clear()

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


def test_a_wheel_for_another_torch_names_the_right_one(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of earlier versions do not say whether they are of a wheel: they ask to install the package again."""
    monkeypatch.setattr(torch, "__version__", "2.99.1+cu130")
    python = "".join(map(str, sys.version_info[:2]))
    named = f"the wheel of sofim_fused with +torch2.99-cp{python} in its name"
    for wheel, what in (
        ({}, "reinstall sofim_fused"),
        ({"wheel": False}, "reinstall sofim_fused"),
        ({"wheel": True}, f"install {named}, if there is one, or build it from its sources"),
    ):
        record.write_text(json.dumps({**WHOLE, "torch": "2.98.0", **wheel}))
        native.build.cache_clear()
        native._find.cache_clear()
        assert native.cpu() == f"it was built for torch 2.98.0, and this is torch 2.99.1+cu130: {what}"


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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "the native CUDA part was not built: the package was not installed"),
        ({**WHOLE, "cuda": {**WHOLE["cuda"], "reason": "no nvcc"}}, "the native CUDA part was not built: no nvcc"),
        ({**WHOLE, "cuda": {}}, "was not built: _build.json has no record of it (KeyError('reason')): reinstall"),
        ({**WHOLE, "cuda": None}, "was not built: _build.json has no record of it (TypeError("),
        ({name: WHOLE[name] for name in WHOLE if name != "cuda"}, "_build.json has no record of it (KeyError('cuda'))"),
        ({**WHOLE, "torch": "1.13.0"}, "it needs the native CPU part: it was built for torch 1.13.0, and this is"),
    ],
    ids=["none", "not built", "empty", "damaged", "of an earlier version", "another torch"],
)
def test_why_there_is_no_cuda_part(content: dict[str, Any] | None, reason: str, record: Path) -> None:
    if content is not None:
        record.write_text(json.dumps(content))
    found = native.cuda()
    assert isinstance(found, str)
    assert reason in found
    for key in ("reason", "compiler", "architectures", "emulated"):
        assert key in native.build()["cuda"]


def test_a_cuda_part_that_does_not_load_is_a_reason(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it needs is loaded first. The CPU part goes on without it."""
    record.write_text(json.dumps({**WHOLE, "instruction_sets": ["default"]}))
    cpu = SimpleNamespace(kernels=1, use_kernels=lambda address: None)
    imported = []

    def broken(name: str) -> Any:
        imported.append(name)
        if name == "sofim_fused._cuda":
            raise ImportError("libcudart.so.13: cannot open shared object file")
        return cpu

    monkeypatch.setattr(native.importlib, "import_module", broken)
    found = native.cuda()
    assert isinstance(found, str)
    assert "libcudart.so.13: cannot open shared object file): reinstall sofim_fused" in found
    assert imported == ["sofim_fused._C", "sofim_fused._cpu_default", "sofim_fused._cuda"]
    assert native.cpu() is cpu


@pytest.mark.parametrize(
    ("cuda", "text"),
    [
        ({}, "built by nvcc 13.0.88 for sm_90, compute_80"),
        ({"reason": "no nvcc"}, "not built: no nvcc"),
        ({"emulated": True, "compiler": "c++ 12"}, "built by c++ 12 to be emulated on the CPU"),
    ],
    ids=str,
)
def test_info_tells_of_the_cuda_part(
    cuda: dict[str, Any], text: str, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.write_text(json.dumps({**WHOLE, "cuda": {**WHOLE["cuda"], **cuda}}))
    monkeypatch.setattr(info, "_devices", list)
    assert f"native CUDA part {text}" in info.lines()


@pytest.mark.parametrize("there", [True, False], ids=["with the native part", "without"])
def test_info_tells_how_triton_takes_steps(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing the tensors of a whole step takes the native part."""
    monkeypatch.setitem(backends._REGISTRY, "cpu", lambda device: "not here")
    monkeypatch.setitem(backends._REGISTRY, "triton", lambda device: backends.choose("reference", device))
    monkeypatch.setattr(native, "cpu", lambda: object() if there else "the native part was not built")
    monkeypatch.setattr(native, "instruction_set", lambda: "default")
    (line,) = (line for line in info.lines() if line.startswith("    triton "))
    assert line.endswith(" ok") == there
    assert ("steps run pass by pass" in line) != there


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
