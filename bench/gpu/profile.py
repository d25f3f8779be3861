"""Which kernels a step on a GPU spends its time in.

    python -m bench.gpu.profile > profile.txt

For each model and optimizer: the device's time per step by kernel, the longest eight, as torch.profiler has it, over 20
steps after three others. Its own work slows the host down, so that only the kernels' times mean something. With
``--device cpu`` it shows operators in the place of kernels, of miniature models: a rehearsal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu import providers
from bench.shapes import GPU_MODELS, miniature

STEPS = 20
SHOWN = 8  # kernels of a step


def times(work: providers.Workload, provider: providers.Provider) -> list[tuple[float, float, str]]:
    """Microseconds per step, calls per step and the name of each kernel (on a CPU: operator), the longest first."""
    device = work.device
    call = providers.ready(provider, work)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        call()
    wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as taken:
        for _ in range(STEPS):
            call()
        wait()
    events = [
        (float(event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total), event)
        for event in taken.key_averages()
    ]
    events.sort(key=lambda item: -item[0])
    return [(time / STEPS, event.count / STEPS, event.key) for time, event in events if time > 0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.profile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: cuda)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="some of the models of bench.gpu (default: five)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no GPU: --device cpu rehearses without one", file=sys.stderr)
        return 2
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    names = options.models or ["lenet-5", "resnet-9", "1000x32x32", "1000x1K", "gpt2-small"]
    if unknown := [name for name in names if name not in GPU_MODELS]:
        print(f"--models: no {', '.join(unknown)}; there are {', '.join(GPU_MODELS)}", file=sys.stderr)
        return 2
    backend = "cuda" if options.device == "cuda" else "cpu"
    every = [
        providers.ADAMW,
        providers.sofim(backend),
        providers.adaptive(backend, "factored"),
        providers.adaptive(backend, "factored, guarded", **providers.GUARD),
        providers.adaptive(backend, "factored, rank one", rho=1.0),
        providers.adaptive(backend, "row", diagonal="row"),
        providers.adaptive(backend, "element", diagonal="element"),
    ]
    for name in names:
        shapes = GPU_MODELS[name]() if options.device == "cuda" else miniature(GPU_MODELS[name](), 32, 8)
        for provider in every:
            work = providers.Workload(shapes, torch.float32, device, 1)
            print(f"== {name} {provider.name}")
            for time, count, kernel in times(work, provider)[:SHOWN]:
                print(f"   {time:8.2f} us  x{count:.1f}  {kernel[:100]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
