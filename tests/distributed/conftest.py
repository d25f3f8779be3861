"""Ranks that the tests of this folder share: processes that import PyTorch once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.ranks import Ranks


@pytest.fixture(scope="package")
def two() -> Iterator[Ranks]:
    """Two ranks. A test that ends one has to start ranks of its own."""
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="package")
def four() -> Iterator[Ranks]:
    """Four ranks, likewise."""
    with Ranks(4) as ranks:
        yield ranks
