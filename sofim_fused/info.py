"""Reports what is installed and which backends are in use here: ``python -m sofim_fused.info``."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import sofim_fused
from sofim_fused import backends, native


def facts() -> dict[str, Any]:
    """The report as plain values, as ``--json`` prints them."""
    module = native.cpu()
    return {
        "sofim_fused": sofim_fused.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "triton": _version("triton"),
        "native": native.build(),
        "instruction_set": None if isinstance(module, str) else native.instruction_set(),
        "not_in_use": module if isinstance(module, str) else None,  # why the native CPU part is not
        "instruction_set_of_torch": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": [_device(device, name) for device, name in _devices()],
    }


def _device(device: torch.device, name: str) -> dict[str, Any]:
    """Which backend a device gets by default, and of each one ``"ok"`` or why it cannot run there."""
    passes, _ = backends.best("auto", device)
    states = {}
    for backend, passes_for in backends._REGISTRY.items():
        found = passes_for(device)
        states[backend] = found if isinstance(found, str) else "ok"
    if states["triton"] == "ok" and isinstance(native.cpu(), str):
        states["triton"] = "ok, but steps run pass by pass: whole steps in one call take the native CPU part"
    chosen = passes.name if passes is not None else None
    slow = chosen == "reference" and bool(backends.missing(device))
    return {
        "device": str(device),
        "name": name,
        "default": chosen,
        "backends": states,
        "remedy": native.remedy() if slow else None,
    }


def lines() -> Iterator[str]:
    """The report, line by line."""
    known = facts()
    yield f"sofim_fused      {known['sofim_fused']}"
    yield f"torch            {known['torch']}"
    yield f"Python           {known['python']}, {known['system']}, {known['machine']}"
    yield f"triton           {known['triton']}"
    yield f"native CPU part  {_built(known['native'])}"
    yield f"native CUDA part {_built_cuda(known['native']['cuda'])}"
    used = "not in use" if known["instruction_set"] is None else f"{known['instruction_set']} in use"
    yield f"instruction set  {used}; PyTorch uses {known['instruction_set_of_torch']}"
    yield f"threads          {known['threads']}"
    for device in known["devices"]:
        yield ""
        name = f" ({device['name']})" if device["name"] else ""
        yield f"Backends for {device['device']}{name}, * by default:"
        for backend, state in device["backends"].items():
            yield f"  {'*' if backend == device['default'] else ' '} {backend:<10} {state}"
        if device["remedy"] is not None:
            yield f"  Pure PyTorch is many times slower than native kernels. To build them: {device['remedy']}"


def _version(module: str) -> str:
    try:
        return str(importlib.import_module(module).__version__)
    except Exception as error:  # a broken installation may raise anything
        return "not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"


def _built(record: dict[str, Any]) -> str:
    if record["reason"] is not None:
        return f"not built: {record['reason']}"
    sanitizers = f", with sanitizers {record['sanitizers']}" if record["sanitizers"] else ""
    return (
        f"built for torch {record['torch']} and Python {record['python']} by {record['compiler']}: "
        f"{', '.join(record['instruction_sets'])}{sanitizers}"
    )


def _built_cuda(record: dict[str, Any]) -> str:
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


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> Iterator[str]:
    """What the command prints."""
    if options.json:
        yield json.dumps(facts(), indent=1)
    else:
        yield from lines()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m sofim_fused.info", description=__doc__.splitlines()[0])
    configure(parser)
    for line in run(parser.parse_args(arguments)):
        print(line)


if __name__ == "__main__":
    main()
