"""Damage to state dicts that was found at random (test_state_fuzz.py), with the messages that it has now."""

from __future__ import annotations

from collections import ChainMap, UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from tests.optimizer.damaged_state import Image, Tagged, check_steps, check_valid, outline, subject
from tests.support.problems import same_bits, snapshot
from tests.support.runs import once

pytestmark = once


def _set(*path: Any) -> Callable[[Any], Any]:
    """Puts the value that a function makes to the end of a path."""
    *before, last, make = path

    def spoil(saved: Any) -> None:
        for key in before:
            saved = saved[key]
        saved[last] = make()

    return spoil


def _chain(saved: Any) -> None:
    saved["state"][0] = ChainMap(saved["state"][0])


FOUND: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a quantized count": (
        _set("state", 0, "step", lambda: torch.quantize_per_tensor(torch.tensor(1.0), 0.1, 0, torch.quint8)),
        ValueError,
        r"state of parameter 0 .*: step is quantized: save a plain tensor",
    ),
    "a nested moment": (
        _set("state", 0, "exp_avg", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        ValueError,
        r"state of parameter 0 .*: exp_avg is nested: save a plain tensor",
    ),
    "a moment not initialised": (
        _set("state", 0, "exp_avg", nn.UninitializedBuffer),
        ValueError,
        r"state of parameter 0 .*: exp_avg is not initialised: save a plain tensor",
    ),
    "a count that the next step would carry over": (
        _set("state", 0, "step", lambda: torch.tensor(2**63 - 1)),
        ValueError,
        r"state of parameter 0 .*: step is 9223372036854775807, expected a count of updates",
    ),
    "an entry of the user's without values": (
        _set("state", 0, "mine", lambda: [{"x": torch.empty(2, device="meta")}]),
        ValueError,
        r"state of parameter 0 .*: 'mine' is on the meta device",
    ),
    "a state that torch takes for its keys": (
        _chain,
        TypeError,
        r"state of parameter 0 .* is of type ChainMap, not a dict",
    ),
    "a group that is no dict": (
        lambda saved: saved["param_groups"].__setitem__(0, UserDict(saved["param_groups"][0])),
        TypeError,
        r"parameter group 0 is not a dict",
    ),
    "a tensor for a key of the state": (
        lambda saved: saved["state"].update({nn.Parameter(torch.ones(1)): saved["state"][0]}),
        ValueError,
        r"has a tensor for a key of its state",
    ),
    "a number for a key that is no parameter's": (
        lambda saved: saved["state"].update({7.0: saved["state"].pop(0)}),
        ValueError,
        r"has a state for parameter 7\.0, which is in none of its groups",
    ),
    "a tensor among the parameters' numbers": (
        _set("param_groups", 0, "params", 1, lambda: torch.ones(2)),
        TypeError,
        r"'params' of group 0 has a tensor",
    ),
    "a flag that is neither true nor false": (
        _set("param_groups", 1, "fused", lambda: torch.ones(2)),
        TypeError,
        r"parameter group 1: fused=tensor\(.*\): pass True or False",
    ),
    "a tensor with a history": (
        _set("param_groups", 1, "mine", lambda: nn.Parameter(torch.ones(1)) * 2),
        TypeError,
        r"parameter group 1 cannot be copied: Only Tensors created explicitly",
    ),
    "a learning rate not initialised": (
        _set("param_groups", 0, "lr", nn.UninitializedBuffer),
        ValueError,
        r"parameter group 0: lr is not initialised: save a plain tensor",
    ),
    "a norm that no float holds": (
        lambda saved: [group.update(max_grad_norm=10**400) for group in saved["param_groups"]],
        ValueError,
        r"parameter group 0: max_grad_norm=inf: it must be greater than 0 and finite",
    ),
    "a learning rate without a value": (
        _set("param_groups", 0, "lr", lambda: torch.tensor(0.1, device="meta")),
        ValueError,
        r"parameter group 0: lr is on the meta device",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize(("spoil", "error", "text"), FOUND.values(), ids=FOUND)
def test_damage_that_was_found(spoil: Callable[[Any], Any], error: type[Exception], text: str) -> None:
    its = subject("float32")
    damaged = outline(its.saved)
    spoil(damaged)
    before = Image.of(its.optimizer)
    with pytest.raises(error, match=text):
        its.optimizer.load_state_dict(damaged)
    assert before.same(Image.of(its.optimizer))


def test_a_saved_tensor_of_another_class_is_taken_as_a_tensor() -> None:
    its = subject("float32")
    damaged = outline(its.saved)
    damaged["state"][0] = {name: x.as_subclass(Tagged) for name, x in damaged["state"][0].items()}
    its.optimizer.load_state_dict(damaged)
    check_valid(its.optimizer, its.params)
    check_steps(its)


def test_a_form_that_16_bit_parameters_cannot_take_in_the_backward_pass() -> None:
    its = subject("in-backward")
    damaged = outline(its.saved)
    for group in damaged["param_groups"]:
        group.update(numerator="gradient", kahan=True)
    before = Image.of(its.optimizer)
    with pytest.raises(ValueError, match=r"state_dict: parameter 1 of group 0 .*numerator='gradient' would round it"):
        its.optimizer.load_state_dict(damaged)
    assert before.same(Image.of(its.optimizer))


class View(Mapping):  # type: ignore[type-arg]
    """A mapping that has no copy()."""

    def __init__(self, items: dict[str, Any]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def test_any_mapping_is_taken() -> None:
    its = subject("float32")
    before = snapshot(its.optimizer)
    its.optimizer.load_state_dict(View(its.saved))  # type: ignore[arg-type]
    assert same_bits(before, snapshot(its.optimizer))
