"""The shapes of the parameters of models, and a grid of sizes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not TYPE_CHECKING and importlib.util.find_spec("sofim_fused.shapes") is None:
    # bench.builds and bench.gpu.compare time earlier builds of the package, which had no such module.
    path = Path(__file__).parents[1] / "sofim_fused" / "shapes.py"
    spec = importlib.util.spec_from_file_location("sofim_fused.shapes", path)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])

from sofim_fused.shapes import Shape, elements, gpt2_small, lenet5, lm_1b, resnet9, resnet50, vit_b

__all__ = [
    "CPU_MODELS",
    "GPU_MODELS",
    "MODELS",
    "Shape",
    "elements",
    "gpt2_small",
    "grid",
    "lenet5",
    "miniature",
    "resnet50",
]


def many_small() -> list[Shape]:
    """1,000 tensors of 1,024 elements."""
    return [(1024,)] * 1000


def many_matrices() -> list[Shape]:
    """1,000 matrices of 32 rows and columns, as many elements as :func:`many_small` has."""
    return [(32, 32)] * 1000


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "lenet-5": lenet5,
    "1000x1K": many_small,
    "resnet-9": resnet9,
    "resnet-50": resnet50,
    "gpt2-small": gpt2_small,
}

# Those of bench.step. Diagonals that adapt are another thing in two dimensions than in one.
CPU_MODELS: dict[str, Callable[[], list[Shape]]] = {**MODELS, "1000x32x32": many_matrices}


def grid(limit: int = 200_000_000) -> dict[str, list[Shape]]:
    """Equal tensors, by number and size, as far as they have ``limit`` elements together or fewer."""
    sizes = {"1e3": 1000, "64K": 64 << 10, "1M": 1 << 20, "16M": 16 << 20}
    return {
        f"{tensors}x{name}": [(size,)] * tensors
        for name, size in sizes.items()
        for tensors in (1, 100, 1000)
        if tensors * size <= limit
    }


# Besides what bench.step runs on a CPU, models that would take it minutes and many GB.
GPU_MODELS: dict[str, Callable[[], list[Shape]]] = {**CPU_MODELS, "vit-b": vit_b, "lm-1b": lm_1b}


def miniature(shapes: Sequence[Shape], dimension: int, tensors: int) -> list[Shape]:
    """At most ``tensors`` of the shapes, as different ones as there are, each dimension at most ``dimension``."""
    small = [tuple(min(size, dimension) for size in shape) for shape in shapes]
    return [*dict.fromkeys(small), *small][: min(tensors, len(small))]
