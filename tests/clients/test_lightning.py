"""Lightning: its Trainer's clipping, accumulation, mixed precision, checkpoints and loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from sofim_fused import SOFIM, AdaSOFIM
from sofim_fused.integrations.lightning import SOFIMCallback
from tests.clients.support import Net, batch, distance, same_bits, trained, weights

STEPS = 4


class Module(LightningModule):
    def __init__(self, cls: type[SOFIM] = SOFIM, **options: Any) -> None:
        super().__init__()
        self.net = Net()
        self.cls, self.options = cls, options
        self.losses: list[float] = []

    def training_step(self, inputs: list[Tensor]) -> Tensor:
        x, y = (x.chunk(self.trainer.world_size)[self.trainer.global_rank] for x in inputs)
        loss = (self.net(x) - y).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> SOFIM:
        return self.cls(self.net.parameters(), **self.options)


def loader(parts: int = 1) -> DataLoader[Any]:
    """The batches of tests.clients.support, in order."""
    return DataLoader([(x, y) for step in range(STEPS) for x, y in zip(*batch(step), strict=True)], 8 // parts)  # type: ignore[arg-type]


def fit(module: Module, out: Path, parts: int = 1, checkpoint: str | None = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accumulate_grad_batches": parts,
        "default_root_dir": str(out),
        "callbacks": [SOFIMCallback()],
    }
    trainer = Trainer(**(settings | options))
    trainer.fit(module, loader(parts), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return trainer


@pytest.mark.parametrize("cls", [SOFIM, AdaSOFIM])
def test_weights_are_those_of_a_loop(tmp_path: Path, cls: type[SOFIM]) -> None:
    module = Module(cls)
    fit(module, tmp_path)
    assert same_bits(weights(module.net), weights(trained(lambda net: cls(net.parameters()), STEPS)))


@pytest.mark.parametrize("options", [{}, {"release_grads": True}], ids=["kept", "released"])
def test_accumulation_in_backward(tmp_path: Path, options: dict[str, Any]) -> None:
    module = Module(in_backward=True, **options)
    fit(module, tmp_path, parts=2)
    plain = weights(trained(lambda net: SOFIM(net.parameters()), STEPS, parts=2))
    assert distance(weights(module.net), plain) < 1e-6
    assert options or same_bits(weights(module.net), plain)
    without = Module(in_backward=True)
    with pytest.raises(RuntimeError, match="accumulate_grads"):
        fit(without, tmp_path, parts=2, callbacks=[])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping(tmp_path: Path, precision: Any) -> None:
    """``gradient_clip_val`` is used in the step: in mixed precision Lightning itself would refuse to clip."""
    module = Module()
    trainer = fit(module, tmp_path, precision=precision, gradient_clip_val=0.1)
    assert trainer.gradient_clip_val == 0.1
    outside = Module(amp_fused=False)
    fit(outside, tmp_path, precision=precision, gradient_clip_val=0.1, callbacks=[])
    assert distance(weights(module.net), weights(outside.net)) < 1e-4
    unclipped = Module()
    fit(unclipped, tmp_path, precision=precision)
    assert distance(weights(unclipped.net), weights(outside.net)) > 1e-2
    if precision == "bf16-mixed":
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(Module(), tmp_path, precision=precision, gradient_clip_val=0.1, callbacks=[SOFIMCallback(clip=False)])


@pytest.mark.parametrize("options", [{"in_backward": True}, {"max_grad_norm": 0.1}], ids=["in_backward", "clipped"])
def test_resuming_gives_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    """At the end of an epoch: within one, Lightning would begin again with the first batches."""
    whole = Module(AdaSOFIM, **options)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, tmp_path, callbacks=[SOFIMCallback(), saving], enable_checkpointing=True, max_epochs=2)
    resumed = Module(AdaSOFIM, **options)
    callbacks = [SOFIMCallback(), ModelCheckpoint(tmp_path / "more")]
    checkpoint = str(tmp_path / "epoch=0.ckpt")
    fit(resumed, tmp_path, checkpoint=checkpoint, callbacks=callbacks, enable_checkpointing=True, max_epochs=2)
    assert len(resumed.losses) == STEPS
    assert same_bits(weights(resumed.net), weights(whole.net))


def test_what_is_logged(tmp_path: Path) -> None:
    from pytorch_lightning.loggers import TensorBoardLogger

    module = Module(AdaSOFIM, rho=0.5)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = fit(module, tmp_path, gradient_clip_val=1.0, logger=logger, log_every_n_steps=2)
    (sofim,) = trainer.optimizers
    shown = trainer.callback_metrics
    assert float(shown["sofim/signal"]) == pytest.approx(float(sofim.signal), rel=1e-6)
    assert float(shown["sofim/grad_norm"]) == pytest.approx(float(sofim.grad_norm), rel=1e-6)
    assert (float(shown["sofim/lr"]), float(shown["sofim/rho"])) == (pytest.approx(4e-3), 0.5)
    assert float(shown["sofim/skipped_steps"]) == 0
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert [event.step for event in events.Scalars("sofim/signal")] == [1, 3]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in_backward=True with Trainer\(gradient_clip_val=0\.1\)"):
        fit(Module(in_backward=True), tmp_path, gradient_clip_val=0.1)

    class Other(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    with pytest.raises(TypeError, match="SOFIMCallback with SGD: return a SOFIM"):
        fit(Other(), tmp_path)


def test_ddp_with_two_processes(tmp_path: Path) -> None:
    """Lightning starts the other process itself."""
    module = Module()
    fit(module, tmp_path, devices=2, strategy="ddp_spawn", use_distributed_sampler=False)
    assert distance(weights(module.net), weights(trained(lambda net: SOFIM(net.parameters()), STEPS))) < 1e-6
