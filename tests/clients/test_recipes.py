"""skorch and ignite need nothing but SOFIM's class; docs/frameworks.md shows these lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from sofim_fused import SOFIM, AdaSOFIM
from sofim_fused.integrations.metrics import metrics
from tests.clients.support import Net, batch, distance, same_bits, trained, weights


def data() -> tuple[np.ndarray, np.ndarray]:
    x, y = (torch.cat(parts) for parts in zip(*(batch(step) for step in range(4)), strict=True))
    return x.numpy(), y.numpy()


def test_skorch(tmp_path: Path) -> None:
    from skorch import NeuralNetRegressor
    from skorch.callbacks import Callback

    class Log(Callback):
        def on_batch_end(self, net: NeuralNetRegressor, training: bool = False, **_: object) -> None:
            if training:
                for name, value in metrics(net.optimizer_).items():
                    net.history.record_batch(f"sofim/{name}", value)

    def fresh() -> NeuralNetRegressor:
        return NeuralNetRegressor(
            Net,
            optimizer=AdaSOFIM,
            optimizer__weight_decay=0.0,
            optimizer__max_grad_norm=1.0,
            lr=4e-3,
            max_epochs=1,
            batch_size=8,
            train_split=None,
            callbacks=[Log()],
            verbose=0,
        )

    net = fresh()
    net.fit(*data())
    plain = trained(lambda model: AdaSOFIM(model.parameters(), weight_decay=0.0, max_grad_norm=1.0), 4)
    assert same_bits(weights(net.module_), weights(plain))
    assert len(net.history[-1, "batches", :, "sofim/grad_norm"]) == 4
    files = {"f_params": str(tmp_path / "weights.pt"), "f_optimizer": str(tmp_path / "optimizer.pt")}
    net.save_params(**files)
    again = fresh().initialize()
    again.load_params(**files)
    for one in (net, again):
        one.partial_fit(*data())
    assert same_bits(weights(net.module_), weights(again.module_))


def test_ignite(tmp_path: Path) -> None:
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver

    model = Net()
    optimizer = SOFIM(model.parameters(), max_grad_norm=0.1)
    # Ignite divides the loss by the number of batches that make a step.
    trainer = create_supervised_trainer(model, optimizer, nn.MSELoss(), gradient_accumulation_steps=2)
    seen: list[dict[str, float]] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda: seen.append(metrics(optimizer)))
    saver = Checkpoint({"model": model, "optimizer": optimizer}, DiskSaver(str(tmp_path)), filename_prefix="last")
    trainer.add_event_handler(Events.COMPLETED, saver)
    halves = [(x, y) for step in range(4) for x, y in zip(*(half.chunk(2) for half in batch(step)), strict=True)]
    trainer.run(halves, max_epochs=1)
    plain = trained(lambda net: SOFIM(net.parameters(), max_grad_norm=0.1), 4, parts=2)
    assert distance(weights(model), weights(plain)) < 1e-6
    assert len(seen) == 4
    (file,) = tmp_path.iterdir()
    saved = torch.load(file, weights_only=True)
    again = Net()
    other = SOFIM(again.parameters(), max_grad_norm=0.1)
    Checkpoint.load_objects({"model": again, "optimizer": other}, saved)
    for one, its in ((model, optimizer), (again, other)):
        create_supervised_trainer(one, its, nn.MSELoss()).run(halves, max_epochs=1)
    assert same_bits(weights(model), weights(again))
