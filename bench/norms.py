"""The norm of a large float32 gradient: ``grad_norm`` compared with ``clip_grad_norm_`` and float64.

    python -m bench.norms 124000000

On a CPU, PyTorch adds up the squares of a float32 tensor in float32, and loses small ones if there are many.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from sofim_fused import SOFIM


class Norms(NamedTuple):
    """Norms of the same gradient.

    Attributes:
        ours: ``SOFIM.grad_norm``.
        theirs: what ``torch.nn.utils.clip_grad_norm_`` returns.
        exact: in float64.
    """

    ours: float
    theirs: float
    exact: float

    @property
    def off(self) -> tuple[float, float]:
        """How far ours and theirs are from the exact one, relative to it."""
        return abs(self.ours / self.exact - 1), abs(self.theirs / self.exact - 1)


def norms(elements: int, backend: str = "auto") -> Norms:
    """The norms of one float32 gradient with normally distributed elements.

    Args:
        elements: how many, in one tensor.
        backend: as SOFIM's.
    """
    param = nn.Parameter(torch.zeros(elements))
    param.grad = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    parts = param.grad.split(1 << 20)
    exact = math.sqrt(math.fsum(float(part.double().square().sum()) for part in parts))
    theirs = float(torch.nn.utils.clip_grad_norm_([param], math.inf))
    optimizer = SOFIM([param], max_grad_norm=math.inf, backend=backend)
    optimizer.step()
    assert optimizer.grad_norm is not None
    return Norms(float(optimizer.grad_norm), theirs, exact)


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of elements: give an integer from 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the norms of gradients of the sizes on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.norms", description=__doc__.splitlines()[0])
    parser.add_argument(
        "elements",
        type=_size,
        nargs="*",
        default=[1_000_000, 124_000_000],
        help="how many, of each gradient (default: 1000000 124000000)",
    )
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for elements in options.elements:
        found = norms(elements)
        ours, theirs = found.off
        print(f"{elements:,} elements: float64 {found.exact:.9g}, grad_norm off by {ours:.1e}, torch by {theirs:.1e}")


if __name__ == "__main__":
    main()
