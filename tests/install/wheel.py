"""Installs a wheel as a user would, beside one torch after the other, and tells what it does there: make wheel-check.

For each torch: a new virtual environment with that torch alone, pip without a network for the wheel, and a PATH without
a compiler. With the torch that the wheel was built for, its native part has to be in use, for each instruction set that
this processor runs, and give the reference's result. With another one it has to say so in one warning, and compute the
same in pure PyTorch. The exit status is 1 if anything is otherwise.

This needs only Python; packages of torch are downloaded (gigabytes if a torch has CUDA).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

# What a user's program does first. It prints one line of JSON.
PROGRAM = """
import json, sys, time, warnings
import torch
began = time.perf_counter()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from sofim_fused import SOFIM, AdaSOFIM, native

    def trained(kind, **options):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(48, 300)), torch.nn.Parameter(torch.randn(7))]
        optimizer = kind(params, **options)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
        return params, optimizer.backends

    far, used = 0.0, set()
    for kind in (SOFIM, AdaSOFIM):
        mine, backends = trained(kind)
        theirs, _ = trained(kind, backend="reference")
        used |= set(backends.values())
        far = max(far, *(float((a - b).abs().max()) for a, b in zip(mine, theirs)))
found = native.cpu()
print(json.dumps({
    "torch": torch.__version__,
    "used": sorted(used),
    "set": None if isinstance(found, str) else native.instruction_set(),
    "reason": found if isinstance(found, str) else None,
    "warnings": [str(x.message) for x in caught if "SOFIM" in str(x.message)],
    "far": far,
    "seconds": time.perf_counter() - began,
}))
"""
LIMITS = ("avx512", "avx2", "default")  # values of ATEN_CPU_CAPABILITY: the instruction sets, from the best


def said(command: list[str], **options: Any) -> str:
    """What a command prints, without warnings of torch's own.

    Raises:
        SystemExit: it failed; with what it printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def check(wheel: Path, torch: str, folder: Path) -> bool:
    """Try the wheel beside a torch, in an environment that is made in ``folder``; whether all is as it should be."""
    print(f"\n$ python -m venv fresh && fresh/bin/pip install {torch}", flush=True)
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True, symlinks=True)
        said([python, "-m", "pip", "install", "-q", torch])
    said([python, "-m", "pip", "uninstall", "-q", "-y", "sofim_fused"])
    print(f"$ fresh/bin/pip install --no-index {wheel.name}")
    began = time.monotonic()
    print(said([python, "-m", "pip", "install", "--no-index", str(wheel)]).splitlines()[-1])
    print(f"  {time.monotonic() - began:.1f} s")
    # No compiler, and not the folder with the sources.
    alone = {"PATH": str(folder / "bin"), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    print("$ fresh/bin/python -m sofim_fused info")
    print(said([python, "-m", "sofim_fused", "info"], env=alone, cwd=folder), end="")
    known = json.loads(said([python, "-m", "sofim_fused", "info", "--json"], env=alone, cwd=folder))
    same = known["native"]["torch"].split(".")[:2] == known["torch"].split(".")[:2]
    good = True
    for limit in LIMITS if same else LIMITS[:1]:
        environment = {**alone, **({} if limit == LIMITS[0] else {"ATEN_CPU_CAPABILITY": limit})}
        lines = said([python, "-c", PROGRAM], env=environment, cwd=folder).splitlines()
        got = json.loads(lines[-1])
        if same:
            fits = got["used"] == ["cpu"] and not got["warnings"] and got["set"] in known["native"]["instruction_sets"]
            text = f"native, {got['set']}: {got['far']:.1e} from the reference after three steps"
        else:
            fits = got["used"] == ["reference"] and len(got["warnings"]) == 1 and known["torch"] in got["warnings"][0]
            text = f"{len(got['warnings'])} warning: {' '.join(got['warnings'])}"
        good &= fits and got["far"] < 1e-5
        print(f"  {text}: {'as it should be' if fits and got['far'] < 1e-5 else f'WRONG: {got}'}", flush=True)
    return good


def main() -> int:
    """Check; the exit status is 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, nargs="+")
    parser.add_argument("--torch", nargs="+", default=["torch==2.13.0"], metavar="REQUIREMENT")
    parser.add_argument("--folder", type=Path, help="where the environments stay, to be used again")
    options = parser.parse_args()
    if len(options.wheel) > 1:
        parser.error(f"there are several wheels: {', '.join(map(str, options.wheel))}")
    good = True
    for torch in options.torch:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(options.folder or temporary).resolve() / torch
            good &= check(options.wheel[0].resolve(), torch, folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
