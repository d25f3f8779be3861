"""The comparison of codes for moments, in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import codes
from bench.codes import CODES, WIDER, Code
from sofim_fused import blockwise

X = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6).view(6, 1)


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_one_of_the_codes_is_that_of_the_package() -> None:
    code = Code("e4m3", "power of 2", "nearest")
    assert torch.equal(code.stored(X, blockwise.BLOCK, noise()), blockwise.decode(*blockwise.encode(X)))


@pytest.mark.parametrize("code", [*CODES, WIDER], ids=str)
def test_each_code_keeps_shapes_zeros_and_most_of_a_number(code: Code) -> None:
    x = X.view(6, 3, 100).clone()
    x[2] = 0
    stored = code.stored(x, 64, noise())
    assert stored.shape == x.shape
    assert bool((stored[2] == 0).all())
    assert 0 < float((stored - x).norm() / x.norm()) < 0.05


@pytest.mark.parametrize("code", [code for code in CODES if code.rounding == "stochastic"], ids=str)
def test_stochastic_rounding_is_right_on_the_average(code: Code) -> None:
    """Of the root it is the code, not the number, that is right."""
    x = torch.full((4000, 64), 0.3)
    x[:, 0] = 1.0
    nearest = Code(code.format, code.scale, "nearest").stored(x, 64, noise())[:, 1:]
    stored = code.stored(x, 64, noise())[:, 1:]
    assert len(stored.unique()) == 2
    off = abs(float(stored.double().mean()) - 0.3)
    assert off < (1e-4 if code.format == "int8 root" else 3e-5) < abs(float(nearest[0, 0]) - 0.3)


def test_the_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "CASES", {"LeNet-5 on digits": codes.CASES["LeNet-5 on digits"]})
    monkeypatch.setattr(codes, "BLOCKS", (128,))
    threads = torch.get_num_threads()
    try:
        codes.main(["--steps", "2", "--seeds", "1", "--output", str(tmp_path / "codes.json")])
    finally:
        torch.set_num_threads(threads)
    tables = json.loads((tmp_path / "codes.json").read_text())["tables"]
    assert len(tables["errors"]) == len(CODES)
    assert len(tables["losses"]) == 3 * 8
    first, second = tables["errors"][:2]
    assert 0 < first["error"] < second["error"] < 6  # stochastic rounding is off by more
    assert "| int8 root | stochastic |" in (tmp_path / "codes.md").read_text()
