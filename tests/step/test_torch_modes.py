"""Steps under modes of PyTorch, such as another default device, have the bits of steps without them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM, in_backward
from tests.in_backward.support import backward
from tests.support.problems import GUARDED, give, give_state, same_bits, snapshot
from tests.support.runs import Run, once

Mode = Callable[[], contextlib.AbstractContextManager[Any]]


def default_device() -> contextlib.AbstractContextManager[Any]:
    """What ``torch.set_default_device("meta")`` sets: whatever names no device has no values."""
    return torch.device("meta")


def inference() -> contextlib.AbstractContextManager[Any]:
    """Whatever is made in it cannot be written to outside of it."""
    return torch.inference_mode()


none: Mode = contextlib.nullcontext
# One mode for each step.
MODES: dict[str, tuple[Mode, ...]] = {
    "a default device": (default_device, default_device, default_device),
    "inference first": (inference, none, none),
    "inference later": (none, inference, none),
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "guarded": GUARDED,
    "gradient": {"numerator": "gradient", "fisher": "group", "weight_decay": 0.1, "decoupled_weight_decay": False},
    "plain passes": {},
    "guarded passes": {"numerator": "gradient", "fisher": "group", **GUARDED},
    "in_backward": {"in_backward": True},
    "in_backward passes": {"in_backward": True, "numerator": "nesterov"},
}


def _values(size: int, step: int, device: str) -> Tensor:
    return torch.linspace(-1.0, 1.0 + 0.3 * step, size, device=device)


def _trained(run: Run, schedule: str, modes: Sequence[Mode]) -> list[Tensor]:
    """Parameters and state after a step under each mode. The last parameter has its first gradient in the last one."""
    options = SCHEDULES[schedule]
    params = [nn.Parameter(_values(size, 0, run.device)) for size in (5, 0, 70, 3)]
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    optimizer = SOFIM(groups, lr=0.1, backend=run.backend, **options)
    if "passes" in schedule:
        optimizer._step_in_one_call = lambda *_: None
        if optimizer._backward is not None:
            optimizer._backward._native = None
    else:
        give_state(optimizer)
    for step, mode in enumerate(modes):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] *= 0.5  # so that hyperparameters are written in each step
        present = params if step == len(modes) - 1 else params[:-1]
        grads = [_values(p.numel(), step + 1, run.device) for p in present]
        if "in_backward" in options:
            with none() if mode is inference else mode():  # autograd does not record in inference mode
                backward(present, grads)
        else:
            give(present, grads)
        with mode():
            optimizer.step()
    return snapshot(optimizer)


@functools.cache
def _trained_without(run: Run, schedule: str) -> list[Tensor]:
    return _trained(run, schedule, (none, none, none))


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bits_are_those_without_modes(schedule: str, modes: str, run: Run) -> None:
    found = _trained(run, schedule, MODES[modes])
    assert same_bits(found, _trained_without(run, schedule))
    assert not any(x.is_inference() for x in found)


@once
@pytest.mark.parametrize("freed", [False, True])
def test_a_record_of_a_gradient_without_values_fits_it(freed: bool) -> None:
    """Under another default device as well, although there are no elements to compare."""
    grad = torch.ones(3 if freed else 0)
    grad.untyped_storage().resize_(0)
    with default_device():
        assert in_backward._Mark(grad).fits(grad)
