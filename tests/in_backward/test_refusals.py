"""What ``in_backward=True`` refuses, and that nothing of the step is lost by it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sofim_fused import SOFIM
from tests.in_backward.support import (
    Pair,
    Reluctant,
    Shared,
    alike,
    backward,
    both_ways,
    hooks,
    in_backward_of,
    loss_of,
    made,
    on_cpu,
    plain,
    shared,
    three_batches,
)
from tests.optimizer.support import small_model, train
from tests.support.problems import give, mixed_problem, same_bits, snapshot
from tests.support.runs import Run, once


@on_cpu
@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}, {"release_grads": "yes"}], ids=str
)
def test_a_refused_optimizer_leaves_no_hooks(options: dict[str, Any], run: Run) -> None:
    """The messages are in tests/optimizer/test_checks.py."""
    p = nn.Parameter(torch.ones(2))
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(options))}="):
        made([p], run, **options)
    assert hooks([p]) == [0]


@on_cpu
@pytest.mark.parametrize("name", ["in_backward", "release_grads"])
def test_a_group_cannot_set_it(name: str, run: Run) -> None:
    with pytest.raises(ValueError, match=f"parameter group 0 sets {name}: pass it to the constructor"):
        plain([{"params": [nn.Parameter(torch.ones(2))], name: True}], run)


@on_cpu
@pytest.mark.parametrize(("numerator", "dtype"), [("gradient", torch.bfloat16), ("nesterov", torch.float16)], ids=str)
def test_a_term_in_the_gradient_with_narrow_parameters(numerator: str, dtype: torch.dtype, run: Run) -> None:
    """At construction, in a group that comes later, and after a cast."""
    wide, narrow = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, dtype=dtype))
    message = (
        rf"parameter {{}} .*\(shape \(3,\), .*16, cpu\): in_backward=True with numerator='{numerator}' would round"
    )
    with pytest.raises(ValueError, match=message.format("1 of group 0")):
        made([wide, narrow], run, numerator=numerator, kahan=True)
    assert hooks([wide, narrow]) == [0, 0]
    optimizer = made([wide], run, numerator=numerator, kahan=False)
    with pytest.raises(ValueError, match=message.format("0 of group 1")):
        optimizer.add_param_group({"params": [narrow]})
    assert len(optimizer.param_groups) == 1
    backward([wide], [torch.ones(2)])
    optimizer.step()  # and it works as before

    later = nn.Parameter(torch.ones(3))
    optimizer = made([later], run, numerator=numerator, master_weight_bits=None)
    later.data = later.data.to(dtype)
    with pytest.raises(ValueError, match=rf"parameter 0 \(shape.*numerator='{numerator}' would round it twice"):
        backward([later], [torch.ones(3, dtype=dtype)])
    assert not optimizer.state
    assert later.tolist() == [1.0] * 3


@on_cpu
@pytest.mark.parametrize("begun", [False, True])
def test_the_gradient_form_loaded_for_narrow_parameters(begun: bool, run: Run) -> None:
    """It is refused whether there is state or not; and where it would act, if it was set in a group."""
    p, wide = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))
    optimizer, other = made([p], run, kahan=False), plain([wide], run, numerator="gradient", kahan=False)
    if begun:
        give([wide], [torch.ones(3)])
        other.step()
    else:
        other.state.clear()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .* numerator='gradient' would round it twice"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["numerator"] == "moment"
    optimizer.param_groups[0]["numerator"] = "gradient"
    with pytest.raises(ValueError, match="numerator='gradient' would round it twice"):
        backward([p], [torch.ones(3, dtype=torch.bfloat16)])
    assert same_bits(before, snapshot(optimizer))


@on_cpu
@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 0.5), ("skip_nonfinite", True)])
def test_a_guard_cannot_come_later(name: str, value: Any, run: Run) -> None:
    """With a loaded state, or set in a group."""
    pair = Pair(run)
    batches = list(pair.gradients(4))
    for grads in batches[:2]:
        pair.backward(grads)
        pair.step()
    before = snapshot(pair.optimizer)
    guarded = SOFIM(mixed_problem(torch.float32).groups, **{name: value})
    with pytest.raises(ValueError, match=rf"in_backward=True with {name}="):
        pair.optimizer.load_state_dict(guarded.state_dict())
    assert pair.optimizer.param_groups[0][name] in (None, False)
    for group in pair.optimizer.param_groups:
        group[name] = value
    with pytest.raises(ValueError, match=rf"in_backward=True with {name}="):
        backward(pair.params, batches[2])
    assert same_bits(before, snapshot(pair.optimizer))
    for group in pair.optimizer.param_groups:
        group[name] = {"max_grad_norm": None, "skip_nonfinite": False}[name]
    for grads in batches[2:]:
        pair.backward(grads)
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"parameter group 1: lr=-1\.0: it must be"),
        ({"lr": torch.tensor([0.1, 0.2])}, r"parameter group 1: lr is a tensor \(shape \(2,\)"),
        ({"momentum": 1.0}, r"parameter group 1: momentum=1\.0"),
        ({"fisher": "group"}, r"parameter group 1: fisher='group', but group 0 has 'model'"),
        ({"rho": "1"}, r"parameter group 1: rho='1': pass a float"),
        ("rho", r"parameter group 1: rho is missing"),
    ],
    ids=str,
)
def test_bad_settings_are_named_in_the_backward_pass(settings: Any, message: str, run: Run) -> None:
    pair = Pair(run)
    batches = list(pair.gradients(4))
    for grads in batches[:2]:
        pair.backward(grads)
        pair.step()
    before = snapshot(pair.optimizer)
    group = pair.optimizer.param_groups[1]
    kept = dict(group)
    if isinstance(settings, str):
        del group[settings]
    else:
        group.update(settings)
    with pytest.raises(ValueError if "pass a" not in message else TypeError, match=message):
        backward(pair.params, batches[2])
    assert same_bits(before, snapshot(pair.optimizer))
    group.update(kept)
    for grads in batches[2:]:
        pair.backward(grads)
        pair.step()
    assert pair.alike()


@on_cpu
def test_bad_settings_in_the_step(run: Run) -> None:
    """What is wrong is named, and a second try takes the step."""
    pair = Pair(run, decay="decoupled")
    for grads in pair.gradients(3):
        pair.backward(grads)
        before = snapshot(pair.optimizer)
        lr = pair.optimizer.param_groups[1]["lr"]
        pair.optimizer.param_groups[1]["lr"] = -1.0
        with pytest.raises(ValueError, match=r"parameter group 1: lr=-1\.0"):
            pair.optimizer.step()
        assert same_bits(before, snapshot(pair.optimizer))
        pair.optimizer.param_groups[1]["lr"] = lr
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("release", [False, True])
def test_sparse_gradients(release: bool, run: Run) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    optimizer = made(model.parameters(), run, release_grads=release)
    with pytest.raises(ValueError, match=r"gradient of parameter 0 of group 0 .* has the layout torch\.sparse_coo"):
        model(torch.tensor([1, 4])).sum().backward()
    assert model[0].weight not in optimizer.state


@on_cpu
def test_a_bad_gradient_by_hand(run: Run) -> None:
    """It is named, and nothing of the step is lost."""
    pair = Pair(run)
    for grads in pair.gradients(3):
        pair.zero_grad()
        backward(pair.params, [g if i % 2 else None for i, g in enumerate(grads)])
        pair.params[4].grad_dtype = None
        pair.params[4].grad = torch.zeros_like(pair.params[4], dtype=torch.float64)
        with pytest.raises(ValueError, match=r"gradient of parameter 1 of group 1 .* is float64"):
            pair.optimizer.step()
        for i, (p, g) in enumerate(zip(pair.params, grads, strict=True)):
            if not i % 2:
                p.grad = g
        give(pair.plain_params, grads)
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("by_hand", [False, True])
def test_settings_after_a_refusal(by_hand: bool, run: Run) -> None:
    """Those of the first gradient that was taken hold, not those of the one that was refused."""
    table, other = (nn.Parameter(torch.ones(4, 2)) for _ in range(2))
    optimizer, twin = made([table], run, numerator="gradient"), plain([other], run, numerator="gradient")
    table.grad = torch.ones(4, 2).to_sparse() if by_hand else None
    loss = nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum()
    with pytest.raises(ValueError, match=r"has the layout torch\.sparse_coo"):
        (optimizer.step if by_hand else loss.backward)()
    for ours in (optimizer, twin):
        ours.param_groups[0].update(lr=0.01, momentum=0.5)
        ours.zero_grad()
    backward([table, other], [torch.full((4, 2), 0.3)] * 2)
    optimizer.step()
    twin.step()
    assert alike(optimizer, twin)


@on_cpu
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("what", ["none", "half"])
def test_a_backward_pass_that_fails(what: str, release: bool, run: Run) -> None:
    """What has come until then can still be stepped with."""
    pair = Pair(run, decay="l2", release=release, numerator="gradient")
    mine = in_backward_of(pair.optimizer)
    if mine._native is not None:
        mine._native = Reluctant(mine._native, what)
        pair.plain._step_in_one_call = (lambda *_: None) if what == "half" else None
    come: list[Tensor] = []
    for p in pair.params:
        p.register_post_accumulate_grad_hook(come.append)

    def fail(_: Tensor) -> None:
        raise KeyError("lost")

    for grads in three_batches(pair):
        come.clear()
        pair.zero_grad()
        handle = pair.params[3].register_hook(fail)
        with pytest.raises(KeyError, match="lost"):
            backward(pair.params, grads)
        handle.remove()
        assert 2 < len(come) < 7
        give(
            pair.plain_params,
            [g if any(p is x for x in come) else None for p, g in zip(pair.params, grads, strict=True)],
        )
        pair.step()
    assert pair.alike()


@on_cpu
@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("amp_fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_scaler_is_refused(unscaled: bool, amp_fused: bool, release: bool, run: Run) -> None:
    model = small_model()
    optimizer = made(model.parameters(), run, release_grads=release, amp_fused=amp_fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="in_backward=True under a GradScaler is impossible"):
        scaler.step(optimizer)
    assert same_bits(weights, [p.detach() for p in model.parameters()])


@on_cpu
def test_a_gradient_scaler_that_is_switched_off(run: Run) -> None:
    def work(optimizer: SOFIM, model: Shared) -> None:
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()

    assert both_ways(run, shared(), work)


@once
@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
def test_distributed_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrapped before the optimizer is made, or after; models that are not replicated may be there too."""
    from torch.nn.parallel import DistributedDataParallel

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        refused = "in_backward=True under DistributedDataParallel is impossible"
        model = small_model()
        replicated = DistributedDataParallel(model)
        with pytest.raises(ValueError, match=refused):
            SOFIM(model.parameters(), in_backward=True)
        assert hooks(list(model.parameters())) == [0] * 4

        later = small_model()
        optimizer = SOFIM(later.parameters(), in_backward=True)
        replicated_later = DistributedDataParallel(later)
        with pytest.raises(ValueError, match=refused):
            replicated_later(torch.ones(2, 4)).sum().backward()
        assert not optimizer.state

        other = small_model()
        train(other, SOFIM(other.parameters(), in_backward=True), 2)
        del replicated, replicated_later
        gc.collect()
        train(model, SOFIM(model.parameters(), in_backward=True), 2)
    finally:
        torch.distributed.destroy_process_group()
