"""Steps over several ranks in two native calls: the bits, and the messages, of steps by passes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from bench.ranks import Ranks, all_reduced
from sofim_fused import SOFIM, native, optimizer
from sofim_fused.step import sharded
from sofim_fused.step.plan import Plan
from tests.distributed.support import Net, fsdp, grouped, loss_of, mesh_of, needs_ranks
from tests.support.problems import same_bits

pytestmark = [
    *needs_ranks,
    pytest.mark.skipif(isinstance(native.cpu(), str), reason="the native CPU part was not built"),
]

STEPS = 6
NUMERATORS = ("moment", "gradient", "nesterov")
CASES: list[dict[str, Any]] = [
    {"numerator": numerator, "fisher": fisher, **kind}
    for numerator, fisher in zip(NUMERATORS, ("parameter", "group", "model"), strict=True)
    for kind in ({}, {"max_grad_norm": 0.1}, {"weight_decay": 0.01, "decoupled_weight_decay": False})
]
CASES += [
    {"skip_nonfinite": True, "fisher": "parameter"},
    {"state_dtype": torch.bfloat16, "weight_decay": 0.1, "maximize": True},
    {"dtype": torch.bfloat16, "max_grad_norm": 0.1},
    {"dtype": torch.float64, "numerator": "gradient"},
]
Edit = Callable[[int, nn.Module, SOFIM], object]


@contextlib.contextmanager
def steps_by_passes() -> Iterator[list[bool]]:
    """Lists the steps that are taken by passes; of each, whether it is guarded."""
    found: list[bool] = []
    shares = Plan.shares

    def counted(self: Plan, of: Any, guarded: bool = False) -> Any:
        found.append(guarded)
        return shares(self, of, guarded)

    Plan.shares = counted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Plan.shares = shares  # type: ignore[method-assign]


def taken(rank: int, world: int, options: dict[str, Any], edit: Edit | None, halves: bool) -> Any:
    """Some steps; what has come of them, the sizes of messages, and how many steps were taken by passes."""
    options = dict(options)
    model = fsdp(Net().to(options.pop("dtype", torch.float32)), mesh_of((world,), ("shard",)))
    made = SOFIM(grouped(model), lr=0.1, rho=1.0, **options)
    sharded_step = optimizer.ShardedStep
    if not halves:
        optimizer.ShardedStep = lambda *_: optimizer._no_native_step  # type: ignore[assignment,misc]
    try:

        def work() -> None:
            for step in range(STEPS):
                made.zero_grad()
                dtype = next(model.parameters()).dtype
                with torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else torch.enable_grad():
                    loss = loss_of(model, step, rank, world) if dtype != torch.float64 else in_float64(model, step)
                loss.backward()
                if edit is not None:
                    edit(step, model, made)
                made.step()

        with steps_by_passes() as by_passes:
            sent = all_reduced(work)
    finally:
        optimizer.ShardedStep = sharded_step  # type: ignore[misc]
    entries = [p.detach().to_local() for p in model.parameters()]
    entries += [
        x.to_local() if hasattr(x, "to_local") else x
        for p in model.parameters()
        for _, x in sorted(made.state[p].items())
        if isinstance(x, Tensor)
    ]
    norm = None if made.grad_norm is None else made.grad_norm.clone()
    versions = [p._version for p in model.parameters()]
    return entries, norm, int(made.skipped_steps), versions, sent, by_passes


def in_float64(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    loss: Tensor = model(torch.randn(4, 7, generator=generator, dtype=torch.float64)).square().mean()
    return loss


def compared(rank: int, case: tuple[dict[str, Any], Edit | None]) -> tuple[int, int]:
    """Both ways; how many steps were taken by passes each way."""
    options, edit = case
    world = distributed.get_world_size()
    found = [taken(rank, world, options, edit, halves) for halves in (True, False)]
    ours, theirs = found
    entries, norm, skipped, versions, sent, _ = ours
    others, other_norm, other_skipped, other_versions, other_sent, _ = theirs
    assert same_bits(entries, others), options
    assert norm is None or same_bits([norm], [other_norm])
    assert (skipped, sent) == (other_skipped, other_sent)
    assert versions == other_versions  # by which autograd notices writes
    return len(ours[-1]), len(theirs[-1])


def all_compared(rank: int, cases: list[tuple[dict[str, Any], Edit | None]]) -> list[tuple[int, int]]:
    return [compared(rank, case) for case in cases]


def test_the_bits_of_steps_by_passes(two: Ranks) -> None:
    """The first step makes state, and ranks compare what they are about to do; all others are native."""
    for found in two.run(all_compared, [(options, None) for options in CASES]):
        assert found == [(1, STEPS)] * len(CASES)


def only_one_rank_has_a_gradient(step: int, model: nn.Module, _: SOFIM) -> None:
    for i, p in enumerate(model.parameters()):
        if step > 1 and i == (step + distributed.get_rank()) % 3:
            p.grad = None


def no_gradient_at_all(step: int, model: nn.Module, _: SOFIM) -> None:
    if step == 3 and distributed.get_rank() == 0:
        for p in model.parameters():
            p.grad = None


def state_replaced(step: int, model: nn.Module, made: SOFIM) -> None:
    params = list(model.parameters())
    if step == 2:
        made.load_state_dict(copy.deepcopy(made.state_dict()))
    if step == 3:
        made.state[params[1]]["exp_avg"] = made.state[params[1]]["exp_avg"].clone()
    if step == 4:
        del made.state[params[0]]


def weights_replaced(step: int, model: nn.Module, made: SOFIM) -> None:
    p = next(model.parameters())
    if step == 2:
        p._local_tensor = p._local_tensor.clone()  # type: ignore[attr-defined]
    if step == 3:
        with torch.no_grad():
            p.mul_(0.5)


def memory_replaced(step: int, model: nn.Module, made: SOFIM) -> None:
    p = next(model.parameters())
    if step == 2:
        p._local_tensor.data = p._local_tensor.data.clone()  # type: ignore[attr-defined]


def settings_edited(step: int, model: nn.Module, made: SOFIM) -> None:
    for group in made.param_groups:
        group["lr"] *= 0.5
        if step == 4:
            group["max_grad_norm"] = 0.2


def scaled(step: int, model: nn.Module, made: SOFIM) -> None:
    """As GradScaler does; the second rank alone finds an infinity in the fourth step."""
    made.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
    made.found_inf = torch.tensor(float(step == 3 and distributed.get_rank() == 1))  # type: ignore[attr-defined]


def not_finite(step: int, model: nn.Module, made: SOFIM) -> None:
    grad = next(model.parameters()).grad
    if step == 2 and distributed.get_rank() == 0 and grad is not None:
        grad.to_local().view(-1)[0] = torch.inf


EDITS: list[tuple[dict[str, Any], Edit, int]] = [  # and how many steps are by passes on the first rank
    ({"fisher": "parameter"}, only_one_rank_has_a_gradient, 1),
    ({"fisher": "parameter", "max_grad_norm": 0.1}, only_one_rank_has_a_gradient, 1),
    ({}, no_gradient_at_all, 2),
    ({}, state_replaced, 2),
    ({"numerator": "gradient"}, weights_replaced, 1),
    ({}, memory_replaced, 1),
    ({}, settings_edited, 2),
    ({}, scaled, 1),
    ({"skip_nonfinite": True}, not_finite, 1),
]


def test_whatever_happens_between_steps(two: Ranks) -> None:
    first, _ = two.run(all_compared, [(options, edit) for options, edit, _ in EDITS])
    assert first == [(by_passes, STEPS) for *_, by_passes in EDITS]


def of_whole_parameters(rank: int) -> tuple[list[Tensor], int]:
    """Plain tensors, each on one rank; the memory of some is replaced."""
    torch.manual_seed(rank)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (4,))]
    made = SOFIM(params, lr=0.1, rho=1.0, max_grad_norm=0.1, shard_group=distributed.group.WORLD)
    with steps_by_passes() as by_passes:
        for step in range(STEPS):
            if step == 3:
                params[0].data = params[0].data.clone()
            for p in params:
                p.grad = torch.randn(p.shape)
            made.step()
    return [p.detach() for p in params], len(by_passes)


def test_whole_parameters_on_different_ranks(two: Ranks) -> None:
    found = two.run(of_whole_parameters)
    assert [by_passes for _, by_passes in found] == [1, 1]
    params, grads = [], []
    for rank in range(2):
        torch.manual_seed(rank)
        params += [nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (4,))]
        grads.append([[torch.randn(shape) for shape in ((5, 3), (4,))] for _ in range(STEPS)])
    alone = SOFIM(params, lr=0.1, rho=1.0, max_grad_norm=0.1)
    for step in range(STEPS):
        for p, g in zip(params, [*grads[0][step], *grads[1][step]], strict=True):
            p.grad = g
        alone.step()
    for p, q in zip(params, [*found[0][0], *found[1][0]], strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-6, atol=1e-7)


def after_a_message_that_failed(rank: int) -> None:
    model = fsdp(Net(), mesh_of((distributed.get_world_size(),), ("shard",)))
    made = SOFIM(grouped(model), lr=0.1, rho=1.0, max_grad_norm=0.1)
    for step in range(2):
        loss_of(model, step).backward()
        made.step()
        made.zero_grad()
    before = [p.detach().to_local().clone() for p in model.parameters()]
    total = sharded.reduce.over_ranks

    def fail(*_: Any) -> Any:
        raise RuntimeError("the network is gone")

    loss_of(model, 2).backward()
    sharded.reduce.over_ranks = fail
    try:
        with pytest.raises(RuntimeError, match="the network is gone"):
            made.step()
    finally:
        sharded.reduce.over_ranks = total
    assert same_bits(before, [p.detach().to_local() for p in model.parameters()])
    made.step()
    assert not same_bits(before, [p.detach().to_local() for p in model.parameters()])


def test_a_step_can_be_taken_after_a_message_that_failed(two: Ranks) -> None:
    two.run(after_a_message_that_failed)


def test_halves_by_hand() -> None:
    """What Python must not get wrong is refused, and leaves the object as it was."""
    module = native.cpu()
    assert not isinstance(module, str)
    step = module.Step()
    p = torch.ones(4, requires_grad=True)
    p.grad = torch.ones(4)
    made = SOFIM([p], lr=0.1, rho=1.0)
    assert step.begin_sharded(made.param_groups, made.state, False, [0], 1) is None  # no state yet
    made.step()
    groups = made.param_groups
    with pytest.raises(RuntimeError, match="no step was begun"):
        step.finish_sharded(torch.zeros(1, 1, dtype=torch.float64), None, None, None)
    for class_of, classes, message in (([], 1, "a class for each"), ([1], 1, "not below"), (["0"], 1, "int")):
        with pytest.raises((ValueError, TypeError), match=message):
            step.begin_sharded(groups, made.state, False, class_of, classes)
    blocks, squares = step.begin_sharded(groups, made.state, True, [1], 2)
    assert blocks.shape == (2, 6, 1)
    assert squares.tolist() == [0.0, 4.0]
    assert step.begin_sharded(groups, made.state, True, [0], 1) is None, "one step at a time"
    assert step(groups, made.state, None, None) is None
    with pytest.raises(RuntimeError, match="blocks"):
        step.finish_sharded(blocks, squares[1], None, None)
    step.begin_sharded(groups, made.state, True, [1], 2)
    with pytest.raises(TypeError, match="totals"):
        step.finish_sharded(3, squares[1], None, None)
    assert step.begin_sharded(groups, made.state, True, [0], 1) is not None
    step.cancel_sharded()
    step.cancel_sharded()
    assert step(groups, made.state, None, None) is True
