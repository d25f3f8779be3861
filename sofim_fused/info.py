"""Reports what is installed and which backends are in use here: ``python -m sofim_fused.info``."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator

import torch

import sofim_fused
from sofim_fused import backends, native


def lines() -> Iterator[str]:
    """The report, line by line."""
    yield f"sofim_fused      {sofim_fused.__version__}"
    yield f"torch            {torch.__version__}"
    yield f"Python           {platform.python_version()}, {platform.system()}, {platform.machine()}"
    yield f"triton           {_version('triton')}"
    yield f"native CPU part  {_built()}"
    yield f"native CUDA part {_built_cuda()}"
    module = native.cpu()
    used = "not in use" if isinstance(module, str) else f"{native.instruction_set()} in use"
    yield f"instruction set  {used}; PyTorch uses {torch.backends.cpu.get_cpu_capability()}"
    yield f"threads          {torch.get_num_threads()}"
    for device, name in _devices():
        yield ""
        yield f"Backends for {device} ({name}), * by default:" if name else f"Backends for {device}, * by default:"
        passes, _ = backends.best("auto", device)
        chosen = passes.name if passes is not None else ""
        for backend, passes_for in backends._REGISTRY.items():
            found = passes_for(device)
            state = found if isinstance(found, str) else "ok"
            if backend == "triton" and state == "ok" and isinstance(module, str):
                state = "ok, but steps run pass by pass: whole steps in one call take the native CPU part"
            yield f"  {'*' if backend == chosen else ' '} {backend:<10} {state}"
        if chosen == "reference" and backends.missing(device):
            yield f"  Pure PyTorch is many times slower than native kernels. To build them: {native.remedy()}"


def _version(module: str) -> str:
    try:
        return str(importlib.import_module(module).__version__)
    except Exception as error:  # a broken installation may raise anything
        return "not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"


def _built() -> str:
    record = native.build()
    if record["reason"] is not None:
        return f"not built: {record['reason']}"
    sanitizers = f", with sanitizers {record['sanitizers']}" if record["sanitizers"] else ""
    return (
        f"built for torch {record['torch']} and Python {record['python']} by {record['compiler']}: "
        f"{', '.join(record['instruction_sets'])}{sanitizers}"
    )


def _built_cuda() -> str:
    record = native.build()["cuda"]
    if record["reason"] is not None:
        return f"not built: {record['reason']}"
    if record["emulated"]:
        return f"built by {record['compiler']} to be emulated on the CPU"
    return f"built by {record['compiler']} for {', '.join(record['architectures'])}"


def _devices() -> Iterator[tuple[torch.device, str]]:
    yield torch.device("cpu"), ""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return
    name_of = getattr(torch.get_device_module(accelerator.type), "get_device_name", None)
    for index in range(torch.accelerator.device_count()):
        device = torch.device(accelerator.type, index)
        yield device, str(name_of(device)) if name_of else ""


if __name__ == "__main__":
    print("\n".join(lines()))
