"""The native parts of the package: what was built, the passes of this machine's instruction set, and those for CUDA."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import platform
import shlex
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_RECORD = Path(__file__).with_name("_build.json")  # setup.py writes it
INSTALL = "pip install --no-build-isolation --no-cache-dir"  # followed by a folder
# The instruction sets that a processor can run, best first, by PyTorch's name for it. Any other runs the default.
_RUNS = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}


@functools.cache
def build() -> dict[str, Any]:
    """The record of the build.

    Keys: ``reason`` (why the CPU part was not built, ``None`` if it was), ``expected`` (``False`` if it was left out on
    purpose, or the system is not supported), ``torch`` and ``python`` (the versions it was built for),
    ``compiler``, ``instruction_sets``, ``sanitizers``, ``wheel`` (whether a wheel of ``make wheel`` was installed), and
    ``cuda``, the record of the CUDA part: its ``reason``, ``compiler``, ``architectures`` ("sm_90", or "compute_80" for
    PTX) and ``emulated`` (its kernels are run by the CPU). If the record cannot be read, ``reason`` says so.
    """
    record = dict.fromkeys(("reason", "torch", "python", "compiler", "instruction_sets", "sanitizers"))
    cuda = dict.fromkeys(("reason", "compiler", "architectures", "emulated"))
    try:
        read = json.loads(_RECORD.read_text(encoding="utf-8"))
        record = {key: read[key] for key in record}
    except FileNotFoundError:
        reason = "the package was not installed"
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = f"{_RECORD.name} is no record of a build ({error!r}): reinstall sofim_fused"
    else:
        try:
            cuda = {key: read["cuda"][key] for key in cuda}
        except (TypeError, LookupError) as error:
            cuda["reason"] = f"{_RECORD.name} has no record of it ({error!r}): reinstall sofim_fused"
        # Records of earlier versions have neither key.
        expected, wheel = read.get("expected") is not False, read.get("wheel") is True
        return {**record, "expected": expected, "wheel": wheel, "cuda": cuda}
    return {**record, "reason": reason, "expected": True, "wheel": False, "cuda": {**cuda, "reason": reason}}


def remedy() -> str:
    """The command that builds the native parts again, for the environment that this process runs in."""
    # --no-cache-dir, because pip may otherwise install a wheel of an earlier build that it has cached.
    sources = _RECORD.parents[1]
    what = f"-e {shlex.quote(str(sources))}" if Path(sources, "setup.py").is_file() else "."
    where = "" if what != "." else " in the folder with the sources of sofim_fused"
    return f"{INSTALL} {what}{where}"


def cpu() -> ModuleType | str:
    """The extension ``sofim_fused._C``, with the passes of this machine's instruction set in use; or why there is none.

    ``ATEN_CPU_CAPABILITY`` limits the instruction set, as it does PyTorch's own.
    """
    found = _find()
    return found if isinstance(found, str) else found[0]


def cuda() -> ModuleType | str:
    """The extension ``sofim_fused._cuda``, for which ``sofim_fused._C`` is in use; or why there is none.

    Its attribute ``emulated`` tells whether its kernels are run by the CPU.
    """
    return _find_cuda()


def instruction_set() -> str:
    """The instruction set in use: ``"avx512"``, ``"avx2"`` or ``"default"``.

    Raises:
        RuntimeError: the native part is not in use; the message has the reason.
    """
    found = _find()
    if isinstance(found, str):
        raise RuntimeError(f"the native CPU part is not in use: {found}")
    return found[1]


@functools.cache
def _find() -> tuple[ModuleType, str] | str:
    record = build()
    if record["reason"] is not None:
        return f"the native part was not built: {record['reason']}"
    for what, built, running in (
        ("torch", record["torch"], torch.__version__),
        ("Python", record["python"], platform.python_version()),
    ):
        if _minor(built) != _minor(running):
            return f"it was built for {what} {built}, and this is {what} {running}: {_another()}"
    runs = _RUNS.get(torch.backends.cpu.get_cpu_capability(), ("default",))
    name = next((name for name in runs if name in record["instruction_sets"]), None)
    if name is None:
        built = ", ".join(record["instruction_sets"])
        return f"it was built for {built}, which this CPU does not run: reinstall sofim_fused"
    try:
        module = _load("_C")
        module.use_kernels(_load(f"_cpu_{name}").kernels)
    except Exception as error:  # a module that does not fit may raise anything
        return _unfit(error)
    return module, name


@functools.cache
def _find_cuda() -> ModuleType | str:
    reason = build()["cuda"]["reason"]
    if reason is not None:
        return f"the native CUDA part was not built: {reason}"
    found = _find()  # the CPU part, which was built together with the CUDA part, for the same versions
    if isinstance(found, str):
        return f"it needs the native CPU part: {found}"
    try:
        return _load("_cuda")
    except Exception as error:
        return _unfit(error)


def _load(name: str) -> ModuleType:
    spec = importlib.util.find_spec(f"sofim_fused.{name}")
    if spec is not None and spec.origin is not None and _cut_off(Path(spec.origin)):
        raise ImportError(f"{Path(spec.origin).name} is cut off")
    return importlib.import_module(f"sofim_fused.{name}")


def _cut_off(file: Path) -> bool:
    """Whether a library file is shorter than its header says. The loader would not check, and the process would crash.

    (The signal is SIGBUS.) Checks only ELF files, 64-bit and little-endian; for others the result is ``False``.
    """
    with file.open("rb") as opened:
        content = opened.read(4096)
    if content[:6] != b"\x7fELF\x02\x01":
        return False
    try:
        start, sections = struct.unpack_from("<QQ", content, 32)
        size, count, section_size, section_count = struct.unpack_from("<HHHH", content, 54)
        segments = [struct.unpack_from("<IIQQQQ", content, start + at * size) for at in range(count)]
    except struct.error:
        return len(content) < 4096
    loaded = [offset + length for kind, _, offset, _, _, length in segments if kind == 1]
    return bool(max([*loaded, sections + section_size * section_count]) > file.stat().st_size)


def _unfit(error: Exception) -> str:
    return (
        f"it was built for torch {build()['torch']} and cannot be loaded under torch {torch.__version__} "
        f"({str(error).partition(chr(10))[0]}): {_another()}"
    )


def _another() -> str:
    """What to do about a native part that was built for another torch or Python."""
    if not build()["wheel"]:
        return "reinstall sofim_fused"
    name = f"+torch{'.'.join(_minor(torch.__version__))}-cp{''.join(platform.python_version_tuple()[:2])}"
    return f"install the wheel of sofim_fused with {name} in its name, if there is one, or build it from its sources"


def _minor(version: str) -> list[str]:
    return str(version).split(".")[:2]
