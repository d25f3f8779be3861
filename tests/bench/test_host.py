"""What a step costs the host: every way to take one is timed, and none reaches a kernel."""

from __future__ import annotations

import pytest

from bench import host
from sofim_fused import native

pytest.importorskip("triton")


def test_all_ways_are_timed() -> None:
    rows = host.measured(2, seconds=0.01)
    assert len(host.measured(3, seconds=0.01)) == len(rows)  # with kernels that are compiled already
    whole = [] if isinstance(native.cpu(), str) else ["Triton, whole step", "Triton, factored"]
    cuda = native.cuda()
    emulated = [] if isinstance(cuda, str) or not cuda.emulated else ["CUDA C++", "CUDA C++, factored"]
    expected = ["Triton, by passes", *whole, *emulated, "AdamW fused", "SGD fused"]
    assert [(row.gradients, row.provider) for row in rows] == [
        (gradients, provider) for gradients in ("kept", "made anew") for provider in expected
    ]
    assert all(0 < row.low <= row.median <= row.high for row in rows)
    assert all(f"| {provider} |" in host.as_markdown(rows, "command") for provider in expected)
