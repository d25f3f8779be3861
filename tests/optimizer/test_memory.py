"""What ``python -m sofim_fused.memory`` tells is what training takes: counted on the meta device, and really made."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sofim_fused import SOFIM, AdaSOFIM, checks, memory, shapes

# With one that is stored in 8 bits, and with those that are too small, too narrow, or of too few dimensions.
SHAPES = [(48, 200), (8, 3, 5, 40), (64, 100), (31, 128), (5000,), (7,), (), (0, 300)]
RELEASED = {"in_backward": True, "release_grads": True}
ARGUMENTS: list[dict[str, Any]] = [
    *({"diagonal": diagonal} for diagonal in checks.DIAGONALS),
    {"state_dtype": torch.bfloat16},
    {"state_dtype": torch.float8_e4m3fn},
    {"state_dtype": torch.float8_e4m3fn, "diagonal": "factored"},
    {"state_dtype": torch.float8_e4m3fn, "diagonal": "element"},
    {"kahan": True},
    {"master_weight_bits": None, "kahan": False},
    {"numerator": "nesterov", "max_grad_norm": 1.0},
    RELEASED,
]


def made(arguments: dict[str, Any], dtype: torch.dtype, device: str) -> SOFIM:
    return SOFIM([nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in SHAPES], **arguments)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values() if x is not None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_the_state_is_what_a_step_makes(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    optimizer = made({**arguments, "backend": "reference"}, dtype, "cpu")
    params = optimizer.param_groups[0]["params"]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    use = memory.count(made(arguments, dtype, "meta"))
    assert use.state == state_bytes(optimizer) == sum(use.entries.values())
    sizes = [param.numel() * param.element_size() for param in params]
    assert (use.parameters, use.weights, use.gradients) == (sum(x.numel() for x in params), sum(sizes), sum(sizes))
    assert use.largest == max(sizes)
    assert use.peak == sum(sizes) + use.state + (max(sizes) if "release_grads" in arguments else sum(sizes))


@pytest.mark.parametrize(("new_optimizer", "each"), [(torch.optim.SGD, 4), (torch.optim.AdamW, 8)])
def test_optimizers_of_torch(new_optimizer: Any, each: int) -> None:
    options = {"momentum": 0.9} if each == 4 else {}
    use = memory.count(new_optimizer(memory.parameters(SHAPES), lr=0.1, **options))
    steps = 4 * len(SHAPES) if each == 8 else 0
    assert use.state == each * use.parameters + steps


def test_an_optimizer_is_as_before() -> None:
    optimizer = made(RELEASED, torch.float32, "meta")
    memory.count(optimizer)
    assert not optimizer.state
    assert all(param.grad is None for param in optimizer.param_groups[0]["params"])
    assert memory.count(optimizer) == memory.count(optimizer)


def test_groups_and_frozen_parameters() -> None:
    first, second, frozen = memory.parameters([(64, 64), (32, 128), (100, 100)])
    frozen.requires_grad_(False)
    use = memory.count(
        AdaSOFIM([{"params": [first, frozen]}, {"params": [second], "state_dtype": torch.bfloat16}], diagonal="tensor")
    )
    assert use.weights == 4 * (64 * 64 + 32 * 128 + 100 * 100)
    assert use.gradients == 4 * (64 * 64 + 32 * 128)
    assert use.entries == {"step": 16, "exp_avg": 4 * 64 * 64 + 2 * 32 * 128, "variance": 8}


def test_targets() -> None:
    """Weights of 32 bits in bfloat16, and a moment of 8: bytes per parameter, with all gradients and the largest."""
    arguments: dict[str, Any] = {"state_dtype": torch.float8_e4m3fn}
    for diagonal in ("identity", "factored"):
        for model, released in ((shapes.gpt2_small(), 5.7), ([(2048, 2048)] * 12, 5.25)):
            use = memory.count(
                SOFIM(memory.parameters(model, torch.bfloat16), diagonal=diagonal, **arguments, **RELEASED)
            )
            assert (use.weights + use.gradients + use.state) / use.parameters <= 7.1
            assert use.peak / use.parameters <= released


def test_a_number_for_each_element_takes_as_many_bytes_as_a_moment() -> None:
    params = memory.parameters([(2048, 2048)] * 12)
    use = memory.count(SOFIM(params, diagonal="element", state_dtype=torch.float8_e4m3fn))
    assert use.state == 12 * (8 + 2 * (2048 * 2048 + 4 * 2048 * 16))
    assert use.state / use.parameters == pytest.approx(2.0625, abs=1e-5)


def test_parameters_with_memory_are_refused() -> None:
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 is on cpu, .* under torch.device\('meta'\)"):
        memory.count(SOFIM([*memory.parameters([(2,)]), param]))
    assert torch.equal(param, torch.ones(3))


def test_sharded_parameters_are_refused() -> None:
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        param = nn.Parameter(DTensor.from_local(torch.empty(2, 3, device="meta"), mesh, [Shard(0)], run_check=False))
        with pytest.raises(ValueError, match="parameter 0 of group 0 is a DTensor: count the memory of the model"):
            memory.count(torch.optim.SGD([param]))
    finally:
        distributed.destroy_process_group()


class Tied(nn.Module):
    """With a tied weight, a frozen one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.norm = nn.Embedding(40, 128), nn.Linear(128, 40), nn.BatchNorm1d(128)
        self.head.weight = self.embedding.weight
        self.norm.bias.requires_grad_(False)


def no_module() -> Tensor:
    return torch.ones(2)


def nothing() -> nn.Module:
    return nn.ReLU()


def broken() -> nn.Module:
    raise RuntimeError("no such layer")


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    memory.main(arguments)
    return capsys.readouterr().out


def test_a_module_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(told(capsys, f"{__name__}:Tied", "--json"))["rows"]
    assert [row["dtype"] for row in rows] == ["float32"] * 8 + ["bfloat16"] * 8
    elements = 40 * 128 + 40 + 2 * 128
    for row in rows:
        size = 4 if row["dtype"] == "float32" else 2
        assert row["parameters"] == elements
        assert row["weights"] == size * elements
        assert row["gradients"] == size * (elements - 128)
    sofim = next(row for row in rows if row["optimizer"] == "SOFIM")
    assert sofim["entries"] == {"step": 24, "exp_avg": 4 * (elements - 128)}
    assert sofim["peak"] - sofim["peak_release_grads"] == 4 * (40 + 128)


def test_the_arguments_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--diagonal", "element", "--state-dtype", "float8_e4m3fn", "--master-weight-bits", "none"]
    shown = json.loads(told(capsys, "2*32x128,7", "--dtype", "bfloat16", "--kahan", "false", "--json", *given))
    *_, row = shown["rows"]
    assert row["optimizer"] == (
        "SOFIM(diagonal='element', state_dtype='float8_e4m3fn', master_weight_bits=None, kahan=False)"
    )
    assert row["entries"] == {
        "step": 24, "exp_avg": 2 * 4096 + 4 * 7, "exp_avg_scale": 2 * 4 * 32,
        "variance": 2 * 4096 + 4 * 7, "variance_scale": 2 * 4 * 32,
    }  # fmt: skip
    assert [row["optimizer"] for row in shown["rows"][:-1]] == ["SGD(momentum=0.9)", "AdamW"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "12*2048x2048").splitlines()
    assert shown[0] == "12*2048x2048: 50,331,648 parameters in 12 tensors, the largest of 4,194,304"
    numbers = [line.split()[-7:] for line in shown if line.startswith("SOFIM, 8-bit moment")]
    assert numbers == [
        ["4.00", "4.00", "1.03", "9.03", "0.455", "5.36", "0.27"],
        ["2.00", "2.00", "3.03", "7.03", "0.354", "5.20", "0.262"],
    ]


def test_what_completes_weights_of_16_bits(capsys: pytest.CaptureFixture[str]) -> None:
    def last(*arguments: str) -> list[str]:
        return told(capsys, "32x128", "--dtype", "bfloat16", *arguments).splitlines()[-3:]

    assert last("--diagonal", "row")[-1].endswith("2 bytes that make float32 weights of them.")
    row, _, note = last("--master-weight-bits", "24")
    assert note == "SOFIM's state of bfloat16 weights includes 1 byte, with which they have 24 bits."
    assert row.split()[:4] == ["SOFIM(master_weight_bits=24)", "2.00", "2.00", "5.00"]
    assert "includes" not in last("--master-weight-bits", "none", "--kahan", "false")[-1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["gpt3"], "'gpt3' in MODEL is no shape: take lenet-5, "),
        (["4,"], "'' in MODEL is no shape: take lenet-5, "),
        (["4x0"], "MODEL '4x0' has no parameters"),
        (["no.such:model"], "MODEL 'no.such:model' cannot be imported: No module named 'no'"),
        ([f"{__name__}:no_such"], f"MODEL '{__name__}:no_such' cannot be imported: "),
        ([f"{__name__}:no_module"], f"MODEL: {__name__}:no_module() returned Tensor: it has to return a torch.nn.M"),
        ([f"{__name__}:nothing"], f"MODEL '{__name__}:nothing' has no parameters"),
        ([f"{__name__}:broken"], f"MODEL: {__name__}:broken() raised RuntimeError: no such layer"),
        (["4", "--kahan", "true", "--master-weight-bits", "32"], "kahan=True with master_weight_bits=32"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        memory.main(arguments)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err
