"""``sofim_fused._C`` as Python sees it: arguments of a wrong number or kind, and who owns what it returns."""

from __future__ import annotations

import pickle
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sofim_fused import SOFIM, native
from tests.support.problems import give, same_bits

MODULE: Any = native.cpu()
pytestmark = pytest.mark.skipif(isinstance(MODULE, str), reason=str(MODULE))

REFUSED: dict[str, tuple[type[Exception], str, Callable[[Any, Any], Any]]] = {
    "a step of nothing": (TypeError, "param_groups and state", lambda step, _: step()),
    "a step of too much": (TypeError, "at most", lambda step, _: step([], {}, None, None, None, None)),
    "a step by keyword": (TypeError, "param_groups and state", lambda step, _: step([], {}, counter=None)),
    "too few": (TypeError, "2 arguments are needed, not 1", lambda step, _: step.mark(torch.ones(1))),
    "too many": (TypeError, "0 arguments are needed, not 1", lambda step, _: step.forget(None)),
    "by keyword": (TypeError, "keyword", lambda step, _: step.sums_of(ordinal=0)),
    "no list": (TypeError, "list of lists", lambda step, _: step.watch(None)),
    "no lists in it": (TypeError, "list of lists", lambda step, _: step.watch([()])),
    "no flag": (TypeError, "True or False", lambda step, _: step.freeze_settings([], 1)),
    "no place": (TypeError, "int", lambda step, _: step.sums_of("0")),
    "a place before the first": (OverflowError, "convert", lambda step, _: step.sums_of(-1)),
    "a place before the first, to take": (OverflowError, "convert", lambda step, _: step.take(None, {}, 0, -1, False)),
    "a place past all memory": (OverflowError, "convert", lambda step, _: step.fits(torch.ones(1), 1 << 64)),
    "a constructor's argument": (TypeError, "argument", lambda step, _: type(step)(1)),
    "finish: no flags": (TypeError, "True or False", lambda _, packed: packed.finish(None, None, None)),
    "gather: too few": (TypeError, "2 arguments are needed, not 0", lambda _, packed: packed.gather()),
    "no tile": (TypeError, "tile", lambda _, packed: type(packed)()),
    "a tile of text": (TypeError, "str", lambda _, packed: type(packed)("1024")),
    "an empty tile": (ValueError, "tile: at least 1 element", lambda _, packed: type(packed)(0)),
    "a setting": (AttributeError, "size", lambda _, packed: setattr(packed, "size", 1)),
    "kernels of text": (TypeError, "int", lambda *_: MODULE.use_kernels("0")),
    "a copy by pickle": (TypeError, "pickle", lambda step, _: pickle.dumps(step)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_raise(name: str) -> None:
    kind, message, call = REFUSED[name]
    with pytest.raises(kind, match=message):
        call(MODULE.Step(), MODULE.PackedStep(1024))


def stepped(**options: Any) -> tuple[SOFIM, list[nn.Parameter]]:
    """An optimizer whose parameters have state, and gradients for another step."""
    params = [nn.Parameter(torch.full((5,), float(i + 1))) for i in range(2)]
    optimizer = SOFIM(params, backend="cpu", **options)
    give(params, [torch.ones(5), torch.ones(5)])
    optimizer.step()
    return optimizer, params


def test_arguments_that_may_be_left_out() -> None:
    """Steps with and without the last three arguments do the same."""
    after = []
    for rest in ((), (None,), (None, None), (None, None, None), (1.0, 0.0, None)):
        optimizer, params = stepped(max_grad_norm=0.5)
        norm, skipped, _ = MODULE.Step()(optimizer.param_groups, optimizer.state, *rest)
        assert skipped is False
        after.append([*params, norm])
    assert after[0][-1].dtype == torch.float64
    assert after[0][-1].shape == ()
    assert all(same_bits(after[0], other) for other in after)


def test_nothing_is_kept_alive() -> None:
    """Each object releases what it holds, and its type; results belong to the caller alone."""
    optimizer, params = stepped(max_grad_norm=0.5)
    kinds = (MODULE.Step, MODULE.PackedStep)
    owned = [params, params[0], optimizer.state, optimizer.param_groups, *kinds, torch.float32]

    def once() -> None:
        step, packed = MODULE.Step(), MODULE.PackedStep(1024)
        norm, _, _ = step(optimizer.param_groups, optimizer.state)
        ended.append(weakref.ref(norm))
        assert packed.gather(optimizer.param_groups, optimizer.state) is not None
        assert (packed.kinds, packed.device) == ([0], torch.device("cpu"))
        assert (packed.fisher, packed.max_grad_norm) == ("model", 0.5)
        assert (packed.size, packed.tiles) == (2, 2)
        results = [packed.kinds, packed.scalars, []]  # the last one for comparison
        assert len({sys.getrefcount(result) for result in results}) == 1
        packed.finish(True, True, True)
        step.watch([[*params]])
        for wrong in (lambda: step.watch([1]), lambda: step.finish(1)):
            with pytest.raises(TypeError):
                wrong()

    ended: list[Any] = []
    once()
    before = [sys.getrefcount(x) for x in owned]
    for _ in range(5):
        once()
    assert [sys.getrefcount(x) for x in owned] == before
    assert all(reference() is None for reference in ended)
