"""Frozen parameters of any kind: integers and quantized weights in ``model.parameters()``, as AdamW takes them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from sofim_fused import SOFIM
from sofim_fused.backends.triton import pack
from tests.support.problems import same_bits, snapshot
from tests.support.runs import once

pytestmark = once
BACKENDS = ("cpu", "reference")
EAGER: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient": {"numerator": "gradient"},
    "guarded": {"max_grad_norm": 1.0, "skip_nonfinite": True},
    "bfloat16 moment": {"state_dtype": torch.bfloat16},
    "in_backward": {"in_backward": True},
    "in_backward, gradient form": {"in_backward": True, "numerator": "gradient", "kahan": True},
    "in_backward, released": {"in_backward": True, "release_grads": True},
}


class Quantized(Tensor):
    """Weights as int8 and a scale, as bitsandbytes' and torchao's are; every operation is seen."""

    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Quantized:
        made: Quantized = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scale = codes, scale
        return made

    codes: Tensor
    scale: Tensor

    def __repr__(self, **_: Any) -> str:
        return "Quantized()"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Quantized:
        return Quantized(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Quantized(func(args[0].codes), func(args[0].scale))
        args, kwargs = _pytree.tree_map_only(Quantized, lambda x: x.codes * x.scale, (args, kwargs or {}))
        return func(*args, **kwargs)


def quantized() -> nn.Parameter:
    return nn.Parameter(
        Quantized(torch.arange(12, dtype=torch.int8).view(3, 4), torch.tensor(0.5)), requires_grad=False
    )


FROZEN: dict[str, Callable[[], Any]] = {
    "int8": lambda: nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False),
    "uint8": lambda: nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False),
    "bool": lambda: nn.Parameter(torch.ones(3, dtype=torch.bool), requires_grad=False),
    "float8": lambda: nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False),
    "float64": lambda: nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False),
    "bfloat16": lambda: nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False),
    "sparse": lambda: nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False),
    "expanded": lambda: nn.Parameter(torch.ones(3, 1).expand(3, 4), requires_grad=False),
    "quantized": quantized,
}


def trained() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3, generator=generator)), nn.Parameter(torch.randn(5, generator=generator))]


def train(optimizer: SOFIM, params: list[nn.Parameter], steps: int = 3) -> list[Tensor]:
    for count in range(steps):
        optimizer.zero_grad()
        sum((p * (i + count + 1)).sin().sum() for i, p in enumerate(params)).backward()  # type: ignore[union-attr]
        optimizer.step()
    found = [p.detach() for p in params]
    for p in params:
        found += [optimizer.state[p][name] for name in ("exp_avg", "step")]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", EAGER)
@pytest.mark.parametrize("kind", FROZEN)
def test_training_goes_on_as_without_them(kind: str, options: str, backend: str) -> None:
    frozen, params, alone = FROZEN[kind](), trained(), trained()
    Quantized.seen.clear()
    optimizer = SOFIM([params[0], frozen, params[1]], backend=backend, **EAGER[options])
    twin = SOFIM(alone, backend=backend, **EAGER[options])
    assert optimizer.backends == {torch.device("cpu"): backend}
    if options == "bfloat16 moment":  # what is rounded how is drawn by a parameter's place
        for made in (optimizer, twin):
            train(made, params if made is optimizer else alone)
    else:
        assert same_bits(train(optimizer, params), train(twin, alone))
    assert frozen not in optimizer.state
    assert frozen.grad is None
    assert Quantized.seen == []


@pytest.mark.parametrize("kind", FROZEN)
def test_whole_steps_are_still_taken_natively(kind: str) -> None:
    params = trained()
    optimizer = SOFIM([FROZEN[kind](), *params], backend="cpu")
    train(optimizer, params, 1)
    taken = optimizer._native_step()
    seen = []
    optimizer._step_in_one_call = lambda *given: seen.append(taken(*given)) or seen[-1]  # type: ignore[func-returns-value]
    train(optimizer, params, 2)
    assert seen == [True, True]


@pytest.mark.parametrize("kind", FROZEN)
def test_packed_steps_leave_them_out(kind: str) -> None:
    from sofim_fused import _C  # type: ignore[attr-defined]

    params = trained()
    optimizer = SOFIM([params[0], FROZEN[kind](), params[1]])
    train(optimizer, params, 1)
    gathered = _C.PackedStep(1024)
    assert gathered.gather(optimizer.param_groups, optimizer.state) is not None
    assert gathered.size == 2
    assert gathered.rows[:, pack.ORDINAL].tolist() == [0, 2]
    gathered.finish(False, False, False)


@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16"}, {"in_backward": True}], ids=str)
@pytest.mark.parametrize("kind", FROZEN)
def test_they_are_saved_loaded_and_copied(kind: str, options: dict[str, Any]) -> None:
    params, others = trained(), trained()
    optimizer = SOFIM([FROZEN[kind](), *params], **options)
    train(optimizer, params)
    saved = optimizer.state_dict()
    assert sorted(saved["state"]) == [1, 2]
    other = SOFIM([FROZEN[kind](), *others], **options)
    other.load_state_dict(saved)
    again = copy.deepcopy(optimizer) if kind != "sparse" else other  # torch copies no sparse parameters
    copied = again.param_groups[0]["params"][1:]
    with torch.no_grad():
        for mine, theirs in zip(others, params, strict=True):
            mine.copy_(theirs)
    expected = train(optimizer, params)
    assert same_bits(expected, train(other, others))
    if kind != "sparse":
        assert same_bits(expected, train(again, copied))
    if kind in ("int8", "uint8", "bool", "float64", "bfloat16"):  # nor does it pickle all of the others
        pickle.loads(pickle.dumps(optimizer)).step()


def test_a_checkpoint_has_no_state_for_what_is_quantized_now() -> None:
    """It was trained when it was saved; there is nothing to put a moment beside."""
    params = trained()
    optimizer = SOFIM(params)
    train(optimizer, params)
    params = trained()
    frozen = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
    other = SOFIM([frozen, params[1]])
    with pytest.raises(ValueError, match=r"state of parameter 0 \(shape \(4, 3\), int8, cpu\): only float32"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
    saved = optimizer.state_dict()
    del saved["state"][0]
    other.load_state_dict(saved)


@pytest.mark.parametrize("kind", ["float8", "float64", "expanded", "quantized", "bfloat16"])
@pytest.mark.parametrize("options", ["plain", "guarded", "in_backward", "in_backward, gradient form"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_gradient_after_all_is_refused_by_name(kind: str, options: str, backend: str, steps: int) -> None:
    frozen, params = FROZEN[kind](), trained()
    settings = dict(EAGER[options])
    if kind == "float64":
        settings["state_dtype"] = torch.bfloat16
    optimizer = SOFIM([*params, frozen], backend=backend, **settings)
    if steps:
        train(optimizer, params, steps)
    optimizer.zero_grad()
    frozen.requires_grad_(True)
    frozen.grad = torch.ones(frozen.shape, dtype=frozen.dtype)
    for p in params if not optimizer._in_backward else ():
        p.grad = torch.ones_like(p)
    before = [*(p.detach().clone() for p in params), *(x.clone() for x in states(optimizer))]
    if kind == "bfloat16" and options != "in_backward, gradient form":  # as any other parameter
        optimizer.step()
        assert frozen in optimizer.state
        return
    words = {
        "float8": "only float32, float64",
        "float64": "state_dtype=torch.bfloat16 is for float32",
        "expanded": "elements may share memory",
        "quantized": "is of type .*, which holds other tensors",
        "bfloat16": "would round it twice",
    }[kind]
    with pytest.raises(ValueError, match=rf"parameter 2.* {words}"):
        optimizer.step()
    assert same_bits(before, [*(p.detach() for p in params), *states(optimizer)])
    frozen.grad = None  # as the message advises
    frozen.requires_grad_(False)
    train(optimizer, params, 1)


def states(optimizer: SOFIM) -> list[Tensor]:
    return [x for known in optimizer.state.values() for x in known.values()]


def test_unfrozen_parameters_are_as_any_other() -> None:
    frozen, params = nn.Parameter(torch.ones(3), requires_grad=False), trained()
    optimizer = SOFIM([*params, frozen], in_backward=True)
    train(optimizer, params, 1)
    frozen.requires_grad_(True)
    train(optimizer, [*params, frozen], 2)
    assert int(optimizer.state[frozen]["step"]) == 2


def test_of_sgd() -> None:
    params = trained()
    sgd = torch.optim.SGD([FROZEN["int8"](), params[0], quantized(), params[1]], lr=0.1, momentum=0.9)
    sum(p.sin().sum() for p in params).backward()  # type: ignore[union-attr]
    sgd.step()
    optimizer = SOFIM.from_sgd(sgd)
    assert set(optimizer.state) == set(params)
    train(optimizer, params)


def test_the_device_of_a_step_is_that_of_what_is_trained() -> None:
    """Frozen weights may lie elsewhere, without memory even; what counts steps must not."""
    params = trained()
    elsewhere = nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)
    optimizer = SOFIM([elsewhere, *params], skip_nonfinite=True)
    train(optimizer, params)
    params[0].grad = torch.full_like(params[0], float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps.device.type == "cpu"
    assert int(optimizer.skipped_steps) == 1
    assert snapshot(optimizer)


def test_shards_of_frozen_integers(tmp_path: Path) -> None:
    """As fully_shard() makes them of quantized weights: on a mesh of one rank here."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        params, alone = trained(), trained()
        sharded = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params]
        frozen = [
            nn.Parameter(distribute_tensor(torch.ones(3, dtype=torch.int8), mesh, [placement]), requires_grad=False)
            for placement in (Shard(0), Replicate())
        ]
        optimizer, twin = SOFIM([frozen[0], *sharded, frozen[1]]), SOFIM(alone)
        for made, some in ((optimizer, sharded), (twin, alone)):
            for _ in range(2):
                made.zero_grad()
                for p in some:
                    p.grad = torch.full_like(p, 0.5)
                made.step()
        for p, q in zip(sharded, alone, strict=True):
            torch.testing.assert_close(p.detach().full_tensor(), q.detach())
        saved = optimizer.state_dict()
        assert sorted(saved["state"]) == [1, 2]
        optimizer.load_state_dict(saved)
        frozen[1].grad = distribute_tensor(torch.ones(3, dtype=torch.int8), mesh, [Replicate()])
        with pytest.raises(ValueError, match=r"parameter 3 .*int8.*: only float32"):
            optimizer.step()
    finally:
        distributed.destroy_process_group()
