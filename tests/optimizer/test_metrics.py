"""`sofim_fused.integrations.metrics`, which needs no framework, and what importing the package imports."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from sofim_fused import SOFIM, AdaSOFIM
from sofim_fused.integrations.metrics import find_sofim, metrics, norm_of_gradients


def stepped(optimizer: SOFIM, scale: float = 1.0) -> SOFIM:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, scale)
    optimizer.step()
    return optimizer


def params(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape)) for shape in shapes]


def test_what_there_is_before_and_after_a_step() -> None:
    optimizer = AdaSOFIM(params((3, 4)), lr=torch.tensor(0.25), rho=0.5, max_grad_norm=math.inf)
    assert metrics(optimizer) == {"lr": 0.25, "rho": 0.5, "skipped_steps": 0.0}
    found = metrics(stepped(optimizer))
    assert found.pop("grad_norm") == pytest.approx(math.sqrt(12))
    assert found.pop("signal") == pytest.approx(1.0, rel=1e-5)
    assert found == {"lr": 0.25, "rho": 0.5, "skipped_steps": 0.0}
    assert all(type(value) is float for value in metrics(optimizer).values())
    assert "rho" not in metrics(AdaSOFIM(params((3,))))


def test_a_skipped_step_is_counted() -> None:
    optimizer = stepped(SOFIM(params((3,)), skip_nonfinite=True), math.nan)
    assert metrics(optimizer)["skipped_steps"] == 1
    assert math.isnan(metrics(optimizer)["grad_norm"])


def test_groups_and_blocks_that_differ() -> None:
    one, two = params((3, 4), (2, 2))
    groups = [{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.3}]
    optimizer = stepped(AdaSOFIM(groups, rho=0.5, fisher="group"))
    two.grad = torch.zeros_like(two)
    optimizer.step()
    found = metrics(optimizer)
    assert (found["lr_min"], found["lr_max"], found["rho"]) == (0.1, 0.3, 0.5)
    assert "lr" not in found
    assert found["signal_min"] < found["signal_max"]


@pytest.mark.parametrize("name", ["optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "optim"])
def test_an_optimizer_inside_of_wrappers(name: str) -> None:
    class Wrapper:
        def __init__(self, inside: Any) -> None:
            setattr(self, name, inside)

    class Pretending(Wrapper, SOFIM):
        """As Lightning's wrapper does."""

    sofim = SOFIM(params((3,)))
    assert find_sofim(Wrapper(Pretending(sofim))) is sofim
    assert metrics(Wrapper(sofim)) == metrics(sofim)
    loop = Wrapper(None)
    setattr(loop, name, loop)
    assert find_sofim(loop) is None


def test_another_optimizer() -> None:
    with pytest.raises(TypeError, match=r"metrics\(\) of a SGD: pass a SOFIM, or a framework's wrapper around one"):
        metrics(torch.optim.SGD(params((3,)), lr=0.1))
    assert find_sofim(None) is None
    assert find_sofim(3) is None


def test_a_norm_that_is_only_read() -> None:
    one, two = params((3, 4), (2, 2))
    assert norm_of_gradients([one, two]) is None
    one.grad = torch.full_like(one, 2.0)
    version = one.grad._version
    norm = norm_of_gradients(iter([one, two]))
    assert norm is not None
    assert float(norm) == pytest.approx(math.sqrt(48))
    assert one.grad._version == version


def test_frameworks_are_imported_only_when_asked_for() -> None:
    program = (
        "import sys, sofim_fused; found = [name for name in sys.modules if 'integrations' in name]; "
        "import sofim_fused.integrations.metrics; "
        "names = {'accelerate', 'transformers', 'pytorch_lightning', 'lightning', 'timm', 'deepspeed'}; "
        "print([name for name in found if name.startswith('sofim')], names & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[] set()\n"
