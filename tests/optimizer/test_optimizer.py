"""SOFIM as a ``torch.optim.Optimizer``: groups, schedulers, hooks, state, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sofim_fused import SOFIM, backends
from sofim_fused.backends.reference import ReferencePasses
from tests.optimizer.support import saved_and_loaded, small_model, train
from tests.support.oracle import Hyper, Oracle
from tests.support.problems import LAYOUTS, give, make_parameter, mixed_problem, same_bits, snapshot


def test_a_model_learns() -> None:
    model = small_model()
    losses = train(model, SOFIM(model.parameters(), lr=0.5, rho=1.0), 300)
    assert losses[-1] < 0.3 * losses[0]


def test_defaults_are_the_documented_ones() -> None:
    (group,) = SOFIM([nn.Parameter(torch.ones(1))]).param_groups
    assert {name: value for name, value in group.items() if name != "params"} == {
        "lr": 0.5,
        "momentum": 0.9,
        "rho": 1.0,
        "weight_decay": 0.0,
        "decoupled_weight_decay": True,
        "maximize": False,
        "state_dtype": None,
        "kahan": None,
        "master_weight_bits": "auto",
        "diagonal": "identity",
        "beta2": 0.99,
        "eps": 1e-8,
        "numerator": "moment",
        "fisher": "model",
        "max_grad_norm": None,
        "skip_nonfinite": False,
    }


def test_the_papers_example_by_hand() -> None:
    """Two steps of one weight: m̂ = 2 then (0.9·0.2 + 0.1·(-1))/(1 - 0.81), each divided by 1 + m̂²."""
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = SOFIM([p], lr=0.5, momentum=0.9, rho=1.0)
    p.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.step()
    assert p.item() == pytest.approx(1 - 0.5 * 2 / 5, rel=1e-14)
    p.grad = torch.tensor([-1.0], dtype=torch.float64)
    optimizer.step()
    hat = (0.9 * 0.2 - 0.1) / 0.19
    assert p.item() == pytest.approx(0.8 - 0.5 * hat / (1 + hat**2), rel=1e-13)


def test_state_is_a_moment_and_a_count() -> None:
    generator = torch.Generator().manual_seed(0)
    for layout in LAYOUTS:
        p = make_parameter(layout, torch.float32, generator)
        optimizer = SOFIM([p])
        assert p not in optimizer.state
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert set(optimizer.state[p]) == {"exp_avg", "step"}
        moment, step = optimizer.state[p]["exp_avg"], optimizer.state[p]["step"]
        assert moment.shape == p.shape
        assert moment.dtype == torch.float32
        assert layout == "sliced" or moment.stride() == p.stride()
        assert step.shape == ()
        assert step.dtype == torch.int64
        assert int(step) == 1


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_lr_and_rho_as_tensors(shape: tuple[int, ...], kind: torch.dtype) -> None:
    """They are read at each step, so that a captured or compiled program can change them in place."""
    lr, rho = torch.full(shape, 0.25, dtype=kind), torch.full(shape, 0.5, dtype=kind)
    ours, theirs = small_model(torch.float64), small_model(torch.float64)
    with_tensors = SOFIM(ours.parameters(), lr=lr, rho=rho, weight_decay=0.01)
    with_floats = SOFIM(theirs.parameters(), lr=0.25, rho=0.5, weight_decay=0.01)
    train(ours, with_tensors, 3)
    train(theirs, with_floats, 3)
    lr.mul_(0.5)
    rho.add_(1.5)
    with_floats.param_groups[0].update(lr=0.125, rho=2.0)
    train(ours, with_tensors, 3, 3)
    train(theirs, with_floats, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert with_tensors.param_groups[0]["lr"] is lr


def test_one_cycle_and_cyclic_schedulers_cycle_momentum() -> None:
    model = small_model()
    optimizer = SOFIM(model.parameters())
    one_cycle = lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    seen = set()
    for step in range(9):
        train(model, optimizer, 1, step)
        seen.add((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        one_cycle.step()
    assert len(seen) == 9
    assert min(momentum for _, momentum in seen) == pytest.approx(0.85, abs=0.01)

    optimizer = SOFIM(model.parameters())
    cyclic = lr_scheduler.CyclicLR(optimizer, base_lr=0.1, max_lr=0.5, step_size_up=3)
    momenta = []
    for step in range(6):
        train(model, optimizer, 1, step)
        momenta.append(optimizer.param_groups[0]["momentum"])
        cyclic.step()
    assert min(momenta) < max(momenta)


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: lr_scheduler.StepLR(opt, 2),
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
        lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1)),
        lambda opt: lr_scheduler.LinearLR(opt),
    ],
    ids=["StepLR", "CosineAnnealingLR", "LambdaLR", "LinearLR"],
)
@pytest.mark.parametrize("lr", [0.4, torch.tensor(0.4)], ids=["float", "tensor"])
def test_a_schedule_takes_effect(make: Callable[[SOFIM], Any], lr: float | Tensor) -> None:
    """Scheduled, the weights follow the oracle with the learning rate that the scheduler set."""
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = SOFIM([p], lr=copy.deepcopy(lr))
    oracle = Oracle([p.detach()], [Hyper()], [0])
    scheduler = make(optimizer)
    rates = []
    for step in range(6):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        oracle.hypers = [Hyper(lr=rates[-1])]
        p.grad = torch.tensor([0.5, -1.0 + step], dtype=torch.float64)
        oracle.step([p.grad])
        optimizer.step()
        scheduler.step()
    assert len(set(rates)) > 2
    torch.testing.assert_close(p.detach(), oracle.weights[0], rtol=1e-12, atol=0)


def test_a_closure_is_called_with_gradients_enabled() -> None:
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = SOFIM([p])
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 9.0
    assert calls == [True]
    assert p.item() != 3.0
    assert optimizer.step() is None


def test_an_exception_in_a_closure_changes_nothing() -> None:
    model = small_model()
    optimizer = SOFIM(model.parameters())
    train(model, optimizer, 2)
    before = snapshot(optimizer)

    def closure() -> float:
        raise RuntimeError("the loss could not be computed")

    with pytest.raises(RuntimeError, match="could not be computed"):
        optimizer.step(closure)
    assert same_bits(before, snapshot(optimizer))


def test_a_group_added_later_starts_its_own_count() -> None:
    first, second = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = SOFIM([first], fisher="group", lr=0.1)
    oracle = Oracle([first.detach(), second.detach()], [Hyper(lr=0.1), Hyper(lr=0.7, momentum=0.5)], [0, 1])
    grad = torch.tensor([0.3, -0.4], dtype=torch.float64)
    for step in range(6):
        if step == 2:
            optimizer.add_param_group({"params": second, "lr": 0.7, "momentum": 0.5})
        grads: list[Tensor | None] = [grad, grad * step if step >= 2 else None]
        give([first, second], grads)
        optimizer.step()
        oracle.step(grads)
    assert [int(optimizer.state[p]["step"]) for p in (first, second)] == [6, 4]
    torch.testing.assert_close(first.detach(), oracle.weights[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(second.detach(), oracle.weights[1], rtol=1e-13, atol=0)


def test_frozen_and_unused_parameters_stay_as_they_are() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = SOFIM(model.parameters(), weight_decay=0.1)
    before = [p.detach().clone() for p in model[0].parameters()]
    train(model, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, model[0].parameters(), strict=True))
    assert len(optimizer.state) == 2


def test_a_step_without_gradients_does_nothing() -> None:
    model = small_model()
    optimizer = SOFIM(model.parameters(), weight_decay=0.5, max_grad_norm=1.0, skip_nonfinite=True)
    before = snapshot(optimizer)
    optimizer.step()
    assert same_bits(before, snapshot(optimizer))
    assert not optimizer.state


def test_step_hooks_and_zero_grad() -> None:
    model = small_model()
    optimizer = SOFIM(model.parameters())
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, 2)
    assert seen == ["before", "after"] * 2
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_hooks_on_all_optimizers() -> None:
    optimizer = SOFIM(small_model().parameters())
    seen: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda which, *_: seen.append(which)),
        register_optimizer_step_post_hook(lambda which, *_: seen.append(which)),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert seen == [optimizer] * 2


def test_a_profiler_sees_steps() -> None:
    optimizer = SOFIM(small_model().parameters())
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert [event.count for event in profile.key_averages() if event.key == "Optimizer.step#SOFIM.step"] == [1]


def test_named_parameters() -> None:
    model = small_model()
    optimizer = SOFIM(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    train(model, optimizer, 2)
    other = SOFIM(small_model().named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]


def test_the_gradient_scaler_works_as_with_any_optimizer() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer, plain = SOFIM([p]), nn.Parameter(torch.tensor([1.0, 2.0]))
    unscaled = SOFIM([plain])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for factor in (1.0, float("inf"), -2.0):
        optimizer.zero_grad()
        scaler.scale((p.square() * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor != float("inf"):
            unscaled.zero_grad()
            (plain.square() * factor).sum().backward()
            unscaled.step()
    torch.testing.assert_close(p, plain)
    assert int(optimizer.state[p]["step"]) == 2


# Saving and copying


CONFIGURATIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float64, {"numerator": "gradient", "fisher": "group", "rho": torch.tensor(2.0)}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"kahan": False}),
    (torch.float16, {"state_dtype": torch.bfloat16}),
    (torch.float32, {"state_dtype": torch.bfloat16, "max_grad_norm": 0.5, "skip_nonfinite": True}),
    (torch.complex64, {"weight_decay": 0.1, "decoupled_weight_decay": False}),
]
IDS = ["float32", "gradient", "bf16-kahan", "bf16", "fp16-bf16-moment", "bf16-moment-guarded", "complex"]


def run_problem(dtype: torch.dtype, options: dict[str, Any], swap: Callable[[SOFIM, Any], SOFIM]) -> list[Tensor]:
    """Twelve steps, with ``swap(optimizer, problem)`` replacing the optimizer in the middle."""
    problem = mixed_problem(dtype)
    optimizer = SOFIM(problem.groups, **copy.deepcopy(options))
    for step, grads in zip(range(12), problem.gradients(), strict=False):
        if step == 6:
            optimizer = swap(optimizer, problem)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        give(params, grads)
        optimizer.step()
    return snapshot(optimizer)


def reloaded(optimizer: SOFIM, problem: Any) -> SOFIM:
    """A new optimizer with none of the old one's settings, which then loads them."""
    fresh = SOFIM([{"params": group["params"]} for group in problem.groups], lr=9.0, momentum=0.1)
    fresh.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    return fresh


SWAPS: dict[str, Callable[[SOFIM, Any], SOFIM]] = {
    "state_dict": reloaded,
    "deepcopy": lambda optimizer, _: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, _: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize(("dtype", "options"), CONFIGURATIONS, ids=IDS)
def test_a_run_continues_bit_for_bit(dtype: torch.dtype, options: dict[str, Any], swap: str) -> None:
    straight = run_problem(dtype, options, lambda optimizer, _: optimizer)
    assert same_bits(straight, run_problem(dtype, options, SWAPS[swap]))


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float64, None, torch.float64),
    ],
    ids=str,
)
def test_the_moments_dtype_survives_loading(
    dtype: torch.dtype, state_dtype: torch.dtype | None, expected: torch.dtype
) -> None:
    """``Optimizer.load_state_dict`` casts state to the parameter's dtype; the digits must not pass through that."""
    model = small_model(dtype)
    optimizer = SOFIM(model.parameters(), state_dtype=state_dtype)
    train(model, optimizer, 3)
    other = SOFIM(small_model(dtype).parameters())
    seen: list[torch.dtype] = []
    other.register_load_state_dict_post_hook(
        lambda opt: seen.extend(state["exp_avg"].dtype for state in opt.state.values())
    )
    other.load_state_dict(optimizer.state_dict())
    assert seen == [expected] * 4
    for ours, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])
        assert ours["step"].dtype == torch.int64


def test_loading_shares_nothing() -> None:
    model = small_model()
    optimizer = SOFIM(model.parameters())
    train(model, optimizer, 2)
    other = SOFIM(small_model().parameters())
    other.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer)
    theirs = snapshot(other)
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    assert not same_bits(theirs, snapshot(other))
    assert same_bits(before, snapshot(optimizer))


def test_loading_takes_the_parameters_layout() -> None:
    """A moment saved for a contiguous weight serves a channels-last one: kernels walk both in one order."""
    weight = torch.randn(2, 3, 4, 5)
    plain = nn.Parameter(weight.clone())
    optimizer = SOFIM([plain])
    plain.grad = torch.randn_like(plain)
    optimizer.step()
    last = nn.Parameter(plain.detach().clone(memory_format=torch.preserve_format).to(memory_format=torch.channels_last))
    other = SOFIM([last])
    other.load_state_dict(optimizer.state_dict())
    assert other.state[last]["exp_avg"].stride() == last.stride()
    grad = torch.randn_like(plain)
    plain.grad, last.grad = grad, grad.to(memory_format=torch.channels_last)
    optimizer.step()
    other.step()
    torch.testing.assert_close(plain.detach(), last.detach().contiguous())


def test_a_16_bit_checkpoint_serves_a_32_bit_model() -> None:
    model = small_model(torch.bfloat16)
    optimizer = SOFIM(model.parameters())
    train(model, optimizer, 2)
    wide = copy.deepcopy(model).float()
    other = SOFIM(wide.parameters())
    other.load_state_dict(optimizer.state_dict())
    assert all(set(state) == {"exp_avg", "step"} for state in other.state.values())
    train(wide, other, 2)


def test_state_dict_hooks_may_translate() -> None:
    """The check runs on what the user's own hooks made of the dict."""
    model = small_model()
    optimizer = SOFIM(model.parameters())
    train(model, optimizer, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        group["damping"] = group.pop("rho")

    def rename(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{"rho" if k == "damping" else k: v for k, v in g.items()} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    other = SOFIM(small_model().parameters(), rho=3.0)
    other.register_load_state_dict_pre_hook(rename)
    other.load_state_dict(old)
    assert other.param_groups[0]["rho"] == 1.0
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


def test_after_loading_new_groups_follow_the_loaded_method() -> None:
    model = small_model()
    optimizer = SOFIM(model.parameters(), numerator="gradient")
    train(model, optimizer, 1)
    other = SOFIM(small_model().parameters())
    other.load_state_dict(optimizer.state_dict())
    other.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert [group["numerator"] for group in other.param_groups] == ["gradient"] * 2


def test_the_backend_is_not_saved_but_copied() -> None:
    model = small_model()
    optimizer = SOFIM(model.parameters(), backend="reference")
    assert "reference" not in repr(optimizer.state_dict()["param_groups"])
    assert b"reference" not in pickle.dumps(optimizer)
    assert copy.deepcopy(optimizer)._backend == "reference"
    assert pickle.loads(pickle.dumps(optimizer))._backend == "auto"


def test_counters_are_copied_with_the_optimizer() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = SOFIM([p], skip_nonfinite=True)
    p.grad = torch.full((2,), float("nan"))
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 2
    assert int(twin.skipped_steps) == 1
    assert twin.grad_norm is not None


class Native(ReferencePasses):
    """A second backend, better than the reference by its place in the registry."""

    name = "native"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "native"),
        ({"backend": "native"}, "native"),
        ({"backend": "native", "foreach": True}, "native"),
        ({"backend": "reference"}, "reference"),
        ({"foreach": True}, "reference"),
        ({"foreach": False}, "reference"),
        ({"fused": False}, "reference"),
    ],
    ids=str,
)
def test_backends_tell_what_runs(arguments: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_REGISTRY", {"native": lambda device: Native(), **backends._REGISTRY})
    p = nn.Parameter(torch.ones(1))
    optimizer = SOFIM([p], **arguments)
    assert optimizer.backends == {torch.device("cpu"): expected}
    p.grad = torch.ones(1)
    optimizer.step()
    (passes,) = optimizer._plan._passes.values()
    assert passes.name == expected


def test_entries_of_the_user_s_own_survive() -> None:
    """In a parameter's state before its first step, and in a state dict."""
    p = nn.Parameter(torch.ones(2))
    optimizer = SOFIM([p])
    optimizer.state[p]["note"] = torch.tensor([7.0])
    p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[p]["note"].item() == 7.0
    state_dict = optimizer.state_dict()
    state_dict["state"]["run"] = "third"
    other = SOFIM([nn.Parameter(torch.ones(2))])
    other.load_state_dict(state_dict)
    assert other.state[other.param_groups[0]["params"][0]]["note"].item() == 7.0
    assert other.state["run"] == "third"


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}], ids=["plain", "guarded"])
def test_a_first_step_in_inference_mode_spoils_no_later_one(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = SOFIM([p], lr=0.1, **options)
    p.grad = torch.ones(2)
    with torch.inference_mode():
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    assert int(optimizer.state[p]["step"]) == 2


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=["plain", "guarded"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("numerator", ["moment", "gradient", "nesterov"])
def test_a_gradient_in_the_parameter_s_memory(numerator: str, weight_decay: float, options: dict[str, Any]) -> None:
    """As autograd leaves it where a backward pass returns a saved weight: read before that memory is written to."""
    alias, apart = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    results = []
    for p in (alias, apart):
        optimizer = SOFIM([p], lr=0.1, numerator=numerator, weight_decay=weight_decay, **options)
        for _ in range(3):
            p.grad = p.data if p is alias else p.data.clone()
            optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)
