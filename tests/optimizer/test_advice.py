"""What messages and documents advise, followed to the letter: it has to help."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.norms import norms
from sofim_fused import SOFIM
from tests.support.problems import same_bits, snapshot
from tests.support.runs import once

pytestmark = once
BACKENDS = ("cpu", "reference")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "from_sgd.md"


def two(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, dtype=dtype)), nn.Parameter(torch.ones(2, 3, dtype=dtype))]


def step(optimizer: SOFIM, params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()


# A gradient of another dtype than its parameter


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_grad_dtype_that_is_not_the_parameter_s(in_backward: bool, steps: int, backend: str) -> None:
    """Another backward pass would bring the same dtype again."""
    params = two()
    optimizer = SOFIM(params, backend=backend, in_backward=in_backward)
    for _ in range(steps):
        sum(p.sum() for p in params).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    param = params[1]
    param.grad_dtype = torch.bfloat16
    match = r"is bfloat16: it must be float32; set param\.grad_dtype = param\.dtype before backward\(\), or cast the"

    def backward() -> None:
        sum(p.sum() for p in params).backward()  # type: ignore[union-attr]

    if in_backward:
        with pytest.raises(ValueError, match=match):
            backward()
    else:
        backward()
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        # The second remedy.
        param.grad_dtype = None
        assert param.grad is not None
        param.grad = param.grad.to(param.dtype)
        optimizer.step()
    # The first one.
    optimizer.zero_grad()
    param.grad_dtype = param.dtype
    if in_backward:  # the other gradient of that backward pass has entered its moment
        optimizer.step()
    backward()
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_was_assigned_or_whose_parameter_was_cast(backend: str) -> None:
    params = two()
    optimizer = SOFIM(params, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    param = params[0]
    param.data = param.data.double()
    with pytest.raises(ValueError, match=r"is float32: it must be float64; cast it \(param\.grad = param\.grad\.to"):
        optimizer.step()
    assert param.grad is not None
    param.grad = param.grad.to(param.dtype)
    optimizer.step()
    param.data = param.data.float()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32


# State that no longer fits its parameter


def _cast(optimizer: SOFIM, param: nn.Parameter) -> None:
    param.grad = None
    param.data = param.data.double()


def _other_moment(optimizer: SOFIM, _: nn.Parameter) -> None:
    optimizer.param_groups[0]["state_dtype"] = torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [_cast, _other_moment], ids=["cast", "state_dtype"])
def test_state_is_brought_to_where_its_parameter_is_now(change: Callable[..., None], backend: str) -> None:
    params = two()
    optimizer = SOFIM(params, backend=backend)
    step(optimizer, params)
    for p in params:
        change(optimizer, p)
    with pytest.raises(ValueError, match=r"optimizer\.load_state_dict\(optimizer\.state_dict\(\)\) moves and casts"):
        step(optimizer, params)
    moments = [optimizer.state[p]["exp_avg"].double() for p in params]
    optimizer.load_state_dict(optimizer.state_dict())
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 1]
    for p, m in zip(params, moments, strict=True):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), m, rtol=1e-2, atol=0)
    step(optimizer, params)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("data", [lambda p: torch.ones(5), lambda p: p.detach() * (1 + 0j)], ids=["resized", "complex"])
def test_state_that_cannot_be_converted_starts_anew(data: Callable[[Tensor], Tensor], backend: str) -> None:
    params = two()
    optimizer = SOFIM(params, backend=backend)
    step(optimizer, params)
    param = params[0]
    param.grad = None
    param.data = data(param)
    with pytest.raises(ValueError, match=r"delete the parameter's state to start it anew \(del optimizer\.state\["):
        step(optimizer, params)
    with pytest.raises(ValueError, match="saved for another model"):  # so this is not what is advised
        optimizer.load_state_dict(optimizer.state_dict())
    del optimizer.state[param]
    step(optimizer, params)


# SAM keeps its radius under the name rho


def recipe() -> Any:
    """The document's function."""
    (code,) = re.findall(
        r"```python\n(import functools\n.*?def under_sam.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL
    )
    definition = code.partition("\n\nsam = ")[0]
    found: dict[str, Any] = {"SOFIM": SOFIM}
    exec(definition, found)
    return found["under_sam"]


def train_under_sam(optimizer: Any, params: list[nn.Parameter]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = sum((p - 0.3 * i).square().sum() for i, p in enumerate(params))  # type: ignore[assignment]
        loss.backward()
        return loss

    for _ in range(3):
        closure()
        optimizer.step(closure)


def test_under_sam_both_rhos_are_as_given() -> None:
    """SAM by hand: a gradient at w + radius·g/‖g‖, and SOFIM's step with it from w."""
    from pytorch_optimizer import SAM

    if not DOCUMENT.is_file():
        pytest.skip("these are not the sources")
    params, alone = two(), two()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = SAM(params, functools.partial(recipe(), rho=2.0), rho=0.05, lr=0.4, momentum=0.8)
    train_under_sam(optimizer, params)
    assert optimizer.param_groups[0]["rho"] == 0.05  # SAM's, between steps
    twin = SOFIM(alone, lr=0.4, momentum=0.8, rho=2.0)
    for _ in range(3):
        with torch.no_grad():
            grads = [2 * (p - 0.3 * i) for i, p in enumerate(alone)]
            norm = torch.stack([g.norm() for g in grads]).norm() + 1e-12
            for i, (p, g) in enumerate(zip(alone, grads, strict=True)):
                p.grad = 2 * (p + 0.05 * g / norm - 0.3 * i)
        twin.step()
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    other = SOFIM(two(), lr=0.4, momentum=0.8, rho=0.05)
    assert other.param_groups[0]["rho"] != twin.param_groups[0]["rho"]


def test_under_sam_without_more_a_warning_says_whose_rho_it_is() -> None:
    from pytorch_optimizer import SAM

    with pytest.warns(UserWarning, match=r"parameter group 0 has rho=0\.05 beside 'adaptive', as the groups of SAM"):
        optimizer = SAM(two(), SOFIM, rho=0.05, lr=0.4)
    assert optimizer.base_optimizer.param_groups[0]["rho"] == 0.05  # as ever
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SOFIM([{"params": two(), "rho": 0.05}])
        SOFIM([{"params": two(), "adaptive": True}])


def test_states_that_sam_has_looked_for_are_saved_and_loaded() -> None:
    """It asks for ``state[p]`` of every parameter."""
    from pytorch_optimizer import SAM

    if not DOCUMENT.is_file():
        pytest.skip("these are not the sources")
    params = [*two(), nn.Parameter(torch.ones(3))]
    optimizer = SAM(params, functools.partial(recipe(), rho=1.0), rho=0.05, lr=0.4)
    train_under_sam(optimizer, params[:2])
    base = optimizer.base_optimizer
    assert base.state[params[2]] == {}
    before = snapshot(base)
    others = [*two(), nn.Parameter(torch.ones(3))]
    sam = SAM(others, functools.partial(recipe(), rho=1.0), rho=0.05, lr=0.2)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    sam.base_optimizer.load_state_dict(base.state_dict())
    sam.param_groups, sam.state = sam.base_optimizer.param_groups, sam.base_optimizer.state
    assert same_bits(before, snapshot(sam.base_optimizer))
    for made, of in ((optimizer, params), (sam, others)):
        made.param_groups[0]["lr"] = 0.1  # as a scheduler of the wrapper does
        train_under_sam(made, of[:2])
    assert same_bits(snapshot(base), snapshot(sam.base_optimizer))
    assert not same_bits(before, snapshot(base))


# What torch's SGD may hold


def test_a_buffer_that_torch_left_without_values_can_be_zeroed() -> None:
    for remedy in (lambda known: known["momentum_buffer"].zero_(), lambda known: known.update(momentum_buffer=None)):
        params = two()
        sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        step(sgd, params)  # type: ignore[arg-type]
        sgd.state[params[1]]["momentum_buffer"].fill_(float("nan"))
        with pytest.raises(ValueError, match=r"momentum buffer of parameter 1 of group 0 .* holds NaN or infinity"):
            SOFIM.from_sgd(sgd)
        remedy(sgd.state[params[1]])
        step(SOFIM.from_sgd(sgd), params)
        assert all(bool(p.isfinite().all()) for p in params)


def test_numbers_of_sgd_in_tensors() -> None:
    values = {"momentum": 0.5, "weight_decay": 0.25, "dampening": 0.5}  # which float32 holds
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    made = []
    for given in (values, tensors):
        params = two()
        sgd = torch.optim.SGD(params, lr=torch.tensor([0.125]), **given)  # type: ignore[arg-type]
        step(sgd, params)  # type: ignore[arg-type]
        optimizer = SOFIM.from_sgd(sgd, steps=1)
        optimizer.add_param_group({"params": two()})
        step(optimizer, params)
        assert type(optimizer.param_groups[0]["weight_decay"]) is float
        made.append(snapshot(optimizer))
    assert same_bits(*made)


# The norm of a large tensor


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_that_of_float64(backend: str) -> None:
    """Of four million elements; ``python -m bench.norms`` shows it for more, beside clip_grad_norm_."""
    assert norms(1 << 22, backend).off[0] < 1e-6
