"""Settings for the tests with real frameworks: ``make clients`` runs them, in an environment of their own."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from bench.ranks import Ranks

os.environ.update(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")


class _Anything(type):
    """Classes with any attribute, such as the values of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    """In the place of torchvision, which does not load beside PyTorch's build for CPUs: any name, nothing behind it."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm imports it, for images and data sets. Only for the tests of timm: others ask whether it is installed."""
    for name in (
        "",
        ".datasets",
        ".models",
        ".models.feature_extraction",
        ".ops",
        ".ops.misc",
        ".transforms",
        ".transforms.functional",
        ".utils",
    ):
        module = _StandIn(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parent, _, child = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two ranks, of one framework alone: what one sets up in a process may stand in the way of another."""
    with Ranks(2) as ranks:
        yield ranks
