"""bench.memory counts what there is, and measures what it counts; docs/memory.md has its results."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench import documents, memory, report
from sofim_fused.memory import OURS


class Wrapped(Tensor):
    """A tensor of codes and scales, as other packages have them."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(cls, codes.shape)  # type: ignore[attr-defined]
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(**inner)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


class Packed(Optimizer):
    """An optimizer whose moment is wrapped."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                codes = torch.zeros(param.shape, dtype=torch.uint8)
                self.state[param] = {"step": 3, "moment": Wrapped(codes, torch.zeros(-(-param.numel() // 256)))}


def test_the_tensors_that_others_make_are_added_up() -> None:
    state = memory._made(Packed)([(5, 100), (7,), (7,)], "bfloat16")
    assert state == 500 + 4 * 2 + 2 * (7 + 4)


def test_the_layout_of_flashoptim() -> None:
    shapes = [(5, 100), (7,)]
    for name, moments, rest in (("FlashSGD", 1, 0), ("FlashAdamW", 2, 0)):
        each = moments * (507 + 2 * (16 + 1)) + rest
        assert memory.PEERS[f"{name}, 24 bits"].state(shapes, "float32") is None
        assert memory.PEERS[f"{name}, 32 bits"].state(shapes, "float32") == each
        assert memory.PEERS[f"{name}, 24 bits"].state(shapes, "bfloat16") == each + 507
        assert memory.PEERS[f"{name}, 32 bits"].state(shapes, "bfloat16") == each + 2 * 507


def test_the_gradients_of_the_measured_steps_come_one_by_one() -> None:
    """From the last parameter to the first, with all of them in memory only if nothing releases them."""
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    alive: list[list[int]] = []
    for param in params:
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append([i for i, p in enumerate(params) if p.grad is not None])
        )
    number = torch.zeros((), requires_grad=True)
    for param in params:
        number = memory._MakesGradient.apply(number, param)
    number.backward()
    assert alive == [[2], [1, 2], [0, 1, 2]]


def test_measured_is_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own; 8 MB a tensor, which is far above what a process takes by itself."""
    shapes = [(1024, 2048)] * 6
    monkeypatch.setitem(memory.SHAPES, "six", lambda: shapes)
    run = SimpleNamespace(models=["six"], threads=1)
    monkeypatch.setattr(memory, "DTYPES", {"float32": torch.float32})
    monkeypatch.setattr(memory, "MEASURED", {"SOFIM": OURS["SOFIM"]})
    kept, released = memory.Run.measured(run)  # type: ignore[arg-type]
    size = 4 * math.prod(shapes[0])
    assert kept["counted"] - released["counted"] == 5 * size
    for row in (kept, released):
        assert abs(row["measured"] - row["counted"]) < size / 2, row


def test_what_the_document_says_of_the_measurements() -> None:
    rows = json.loads((report.RESULTS / "memory.json").read_text())["tables"]["measured"]
    assert {row["released"] for row in rows} == {False, True}
    for row in rows:
        more = row["measured"] / row["counted"] - 1
        assert -0.001 < more < (0.0205 if row["provider"].startswith("AdaSOFIM") else 0.0025), row


def test_the_document_is_what_the_results_give() -> None:
    """If it is not: ``python -m bench.memory``."""
    document = memory.DOCUMENT.read_text(encoding="utf-8")
    assert documents.filled(document, report.RESULTS) == document
