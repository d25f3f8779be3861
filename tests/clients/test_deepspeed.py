"""DeepSpeed: ZeRO-1 and ZeRO-2 on two ranks, against one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.ranks import Ranks
from sofim_fused import SOFIM, AdaSOFIM
from tests.clients.support import Net, distance, loss_of, trained, weights

STEPS = 4


def config(stage: int, parts: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4 // parts,
        "gradient_accumulation_steps": parts,
        "zero_optimization": {"stage": stage},
        **more,
    }


def engine_of(stage: int, cls: type[SOFIM], parts: int = 1, more: dict[str, Any] | None = None, **options: Any) -> Any:
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29511")
    from sofim_fused.integrations.deepspeed import initialize

    engine, *_ = initialize(Net(), config(stage, parts, **(more or {})), cls=cls, **options)
    return engine


def run(engine: Any, rank: int, steps: range, parts: int = 1) -> None:
    for step in steps:
        for part in range(parts):
            engine.backward(loss_of(engine, step, 2 * part + rank, 2 * parts))
            engine.step()


def sharded(
    rank: int, stage: int, cls: type[SOFIM], parts: int, options: dict[str, Any], more: dict[str, Any]
) -> float:
    engine = engine_of(stage, cls, parts, more, **options)
    run(engine, rank, range(STEPS), parts)
    limit = more.get("gradient_clipping")
    theirs = {**options, **({} if limit is None else {"max_grad_norm": limit})}
    if cls is AdaSOFIM:
        theirs["diagonal"] = "element"  # a flat part of the parameters has no rows and columns
    return distance(weights(engine.module), weights(trained(lambda net: cls(net.parameters(), **theirs), STEPS, parts)))


@pytest.mark.parametrize("stage", [1, 2])
def test_zero(two: Ranks, stage: int) -> None:
    for cls, options, more in (
        (SOFIM, {"max_grad_norm": 0.1}, {}),  # inside the step
        (SOFIM, {}, {"gradient_clipping": 0.1}),  # by DeepSpeed
        (AdaSOFIM, {"max_grad_norm": 0.1}, {}),
    ):
        assert max(two.run(sharded, stage, cls, 1, options, more)) < 1e-4
    assert max(two.run(sharded, stage, SOFIM, 2, {"max_grad_norm": 0.1}, {})) < 1e-4


def unsharded_sums(rank: int) -> None:
    """Without ``shard_group`` the first step is refused: each rank's Fisher matrix would be its own."""
    import deepspeed

    model = Net()
    settings = config(1, zero_allow_untested_optimizer=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=SOFIM(model.parameters()), config=settings)
    with pytest.raises(ValueError, match=r"DeepSpeed \(DeepSpeedZeroOptimizer\).* pass shard_group="):
        run(engine, rank, range(1))


def test_without_the_helper(two: Ranks) -> None:
    two.run(unsharded_sums)


def in_backward(rank: int) -> None:
    with pytest.raises(ValueError, match=r"in_backward=True .*shard_group"):
        engine_of(2, SOFIM, in_backward=True)


def test_in_backward_is_refused(two: Ranks) -> None:
    """DeepSpeed averages gradients over the ranks after the hooks have run."""
    two.run(in_backward)


def resumed(rank: int, folder: str) -> bool:
    engine = engine_of(2, AdaSOFIM, max_grad_norm=0.1)
    run(engine, rank, range(2))
    engine.save_checkpoint(folder)
    run(engine, rank, range(2, 4))
    again = engine_of(2, AdaSOFIM, max_grad_norm=0.1)
    again.load_checkpoint(folder)
    run(again, rank, range(2, 4))
    return all(torch.equal(a, b) for a, b in zip(weights(again.module), weights(engine.module), strict=True))


def test_resuming_gives_the_same_bits(two: Ranks, tmp_path: Path) -> None:
    assert two.run(resumed, str(tmp_path)) == [True, True]


def mixed(rank: int) -> tuple[float, float]:
    engine = engine_of(2, AdaSOFIM, more={"bf16": {"enabled": True}}, max_grad_norm=0.1)
    before = loss_of(lambda x: engine(x.bfloat16()).float(), 0).item()
    for step in [0] * 20:
        engine.backward(loss_of(lambda x: engine(x.bfloat16()).float(), step, rank, 2))
        engine.step()
    return before, loss_of(lambda x: engine(x.bfloat16()).float(), 0).item()


def test_bf16(two: Ranks) -> None:
    for before, after in two.run(mixed):
        assert after < 0.9 * before


def test_what_is_refused() -> None:
    from sofim_fused.integrations.deepspeed import initialize

    with pytest.raises(ValueError, match=r"zero_optimization\.stage=3: take 1 or 2"):
        initialize(Net(), config(3))
    with pytest.raises(ValueError, match="would be clipped twice"):
        initialize(Net(), config(2, gradient_clipping=1.0), max_grad_norm=1.0)
    with pytest.raises(ValueError, match="has an optimizer: leave it out"):
        initialize(Net(), config(2, optimizer={"type": "AdamW"}))
