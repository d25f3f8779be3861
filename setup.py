"""Set-up of the package: builds its native CPU part from ``csrc`` where that is possible.

What does not depend on the machine stands in pyproject.toml. Read from the environment:

    SOFIM_BUILD_CPU=auto|1|0  auto: where it cannot be built, install without it; 1: fail then; 0: do not try
    SOFIM_BUILD_CUDA=auto|1|0  nothing to build in this version; 1 fails
    SOFIM_SANITIZE=address,undefined  build with these sanitizers, for the tests
    CXX, CFLAGS, MAX_JOBS  as PyTorch's extensions take them

What was built, or why nothing was, is recorded in ``sofim_fused/_build.json`` (see ``sofim_fused/native.py``).
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
PACKAGE = "sofim_fused"
NATIVE = ("_C.*.so", "_cpu_*.so")  # the files of the native part in the package
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {  # flags by instruction set, the best first
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *_AVX2],
    "avx2": _AVX2,
    "default": [],
}
# Of passes.cpp: GCC warns in its own AVX-512 headers, and of vectors as parameters, which are all inlined.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]


class UnavailableError(Exception):
    """Why the native part cannot be built: a fragment of a sentence."""


def switch(name: str) -> str:
    """The environment variable ``name``: "0", "1" or "auto"."""
    value = os.environ.get(name, "auto")
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"{name}={value!r}: take 0, 1 or auto")
    return value


def find_compiler() -> str:
    """What the C++ compiler calls itself."""
    command = shlex.split(os.environ.setdefault("CXX", "c++"))  # one for compiling and for linking
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, IndexError, subprocess.CalledProcessError):
        raise UnavailableError(f"there is no C++ compiler ({os.environ['CXX']} does not run)") from None
    return done.stdout.partition("\n")[0].strip()


def instruction_sets() -> list[str]:
    """What to build on this machine."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["default"]
    # Scalar code and sanitizers' checks on every element: the default would take the compiler longest by far.
    return [name for name in INSTRUCTION_SETS if name != "default" or not os.environ.get("SOFIM_SANITIZE")]


def extensions(torch_version: str, compiler: str) -> list[Extension]:
    """The extension modules, those that take longest to compile first."""
    from torch.utils.cpp_extension import include_paths, library_paths

    sanitizers = os.environ.get("SOFIM_SANITIZE")
    flags = ["-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += [f"-ffile-prefix-map={ROOT}/=", *(part for path in include_paths() for part in ("-isystem", path))]
    if sanitizers:
        flags += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}"]
    else:
        flags += ["-O3", "-g0"]

    def extension(name: str, sources: list[Path], *more: str) -> Extension:
        return Extension(
            f"{PACKAGE}.{name}",
            [str(source) for source in sources],
            language="c++",
            depends=[str(header) for header in sorted(Path("csrc").rglob("*.h"))],
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[("SOFIM_TORCH_VERSION", torch_version)],  # another torch: another command, compiled anew
            library_dirs=library_paths(),
            libraries=["c10", "torch", "torch_cpu", "torch_python"],
            extra_compile_args=[*flags, *more],
            extra_link_args=[*openmp(library_paths(), compiler), *([f"-fsanitize={sanitizers}"] if sanitizers else [])],
        )

    result = [
        extension(
            f"_cpu_{name}",
            [Path("csrc/cpu/module.cpp"), Path("csrc/cpu/passes.cpp")],
            f"-DCPU_CAPABILITY={name.upper()}",
            f"-DCPU_CAPABILITY_{name.upper()}",
            *INSTRUCTION_SETS[name],
            *(QUIET if name == "avx512" else QUIET[-1:]),
        )
        for name in instruction_sets()
    ]
    return [*result, extension("_C", [*sorted(Path("csrc").glob("*.cpp")), Path("csrc/cpu/sweep.cpp")])]


def openmp(torch_libraries: list[str], compiler: str) -> list[str]:
    """Link flags for OpenMP: the library that torch brings and uses, as another one would have threads of its own."""
    own = [str(file) for path in torch_libraries for file in sorted(Path(path).glob("libgomp*.so*"))]
    return own[:1] if own and "clang" not in compiler else ["-fopenmp"]


def plan() -> tuple[list[Extension], type[build_ext], dict[str, object]]:
    """What to build, the command that does, and the record of it, its reason set where nothing can be built."""
    record: dict[str, object] = {
        "torch": None,
        "python": platform.python_version(),
        "compiler": None,
        "instruction_sets": [],
        "sanitizers": os.environ.get("SOFIM_SANITIZE") or None,
        "reason": None,
    }
    try:
        if CPU == "0":
            raise UnavailableError("SOFIM_BUILD_CPU=0 was set")
        if os.name != "posix":
            raise UnavailableError(f"it was not written for {platform.system()}")
        if not Path(ROOT, "csrc").is_dir():
            raise UnavailableError("csrc is not there")
        record["compiler"] = compiler = find_compiler()
        headers = Path(sysconfig.get_path("include"))
        if not Path(headers, "Python.h").is_file():
            raise UnavailableError(f"Python's headers are not there ({headers}/Python.h; Debian's package python3-dev)")
        try:
            torch = importlib.import_module("torch")
            command = importlib.import_module("torch.utils.cpp_extension").BuildExtension
        except Exception as error:  # a broken installation may raise anything
            raise UnavailableError(
                f"torch was not importable while building ({error}): install with --no-build-isolation"
            ) from None
        record["torch"] = str(torch.__version__)
        record["instruction_sets"] = instruction_sets()
        return extensions(str(torch.__version__), compiler), command, record
    except UnavailableError as reason:
        record["reason"] = str(reason)
        return [], build_ext, record


# pip runs this file with the PATH of whoever calls it; ninja may be in the environment of this Python.
if not shutil.which("ninja"):
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))

CPU, CUDA = switch("SOFIM_BUILD_CPU"), switch("SOFIM_BUILD_CUDA")
if CUDA == "1":
    raise SystemExit("SOFIM_BUILD_CUDA=1: csrc/cuda is not there in this version")
EXTENSIONS, COMMAND, RECORD = plan()


class BuildNative(COMMAND):  # type: ignore[misc, valid-type]
    """Builds all of the native part or nothing of it, and writes the record."""

    def run(self) -> None:
        """Build, record, and settle what a failure means."""
        record, inplace = RECORD, self.inplace
        failed = record["reason"] is not None
        try:
            if not failed:
                super().run()
        except Exception as error:
            failed = True
            record = {**record, "instruction_sets": [], "reason": " ".join(str(error).split())}
        package = Path(self.build_lib, PACKAGE)
        places = [package, ROOT / PACKAGE] if inplace else [package]
        for place in places:
            if failed:
                for pattern in NATIVE:
                    for file in place.glob(pattern):
                        file.unlink()
            place.mkdir(parents=True, exist_ok=True)
            (place / "_build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if not failed:
            return
        self.extensions = []  # there are no outputs
        if CPU == "1":
            raise SetupError(f"SOFIM_BUILD_CPU=1, but the native CPU part cannot be built: {record['reason']}")
        print(f"{PACKAGE}: going on without the native CPU part: {record['reason']}", file=sys.stderr)

    def build_extensions(self) -> None:
        """Several extensions at a time, all of them together with ``MAX_JOBS`` processes."""
        self.force = True  # distutils sees neither a new torch nor new flags; ninja does
        if self.use_ninja:
            jobs = max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
            self.parallel = min(jobs, len(self.extensions))
            os.environ["MAX_JOBS"] = str(jobs // self.parallel)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Build one extension with a directory of its own for its objects."""
        # Extensions share sources, but not flags: without a place of its own, one would take another one's objects.
        command = copy.copy(self)
        command.build_temp = os.path.join(self.build_temp, ext.name)
        try:
            super(BuildNative, command).build_extension(ext)
        except Exception as error:
            hint = "SOFIM_BUILD_CPU=1 and pip's option -v show the compiler's messages"
            raise CompileError(f"{ext.name} could not be compiled ({hint})") from error

    def get_outputs(self) -> list[str]:
        """The extensions and the record."""
        if self.inplace:
            return list(self.get_output_mapping())
        return [*super().get_outputs(), os.path.join(self.build_lib, PACKAGE, "_build.json")]

    def get_output_mapping(self) -> dict[str, str]:
        """Where an editable installation finds the outputs."""
        record = {os.path.join(self.build_lib, PACKAGE, "_build.json"): os.path.join(PACKAGE, "_build.json")}
        return {**super().get_output_mapping(), **(record if self.inplace else {})}


class Build(build):
    """Runs ``build_ext`` also where there is nothing to compile: it writes the record."""

    sub_commands: ClassVar = [(name, None if name == "build_ext" else wanted) for name, wanted in build.sub_commands]


setup(ext_modules=EXTENSIONS, cmdclass={"build": Build, "build_ext": BuildNative})
