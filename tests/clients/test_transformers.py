"""Hugging Face's Trainer, with its own means: the optimizer's class and arguments, callbacks, checkpoints."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import Trainer, TrainingArguments

from bench.ranks import Ranks
from sofim_fused import SOFIM, AdaSOFIM
from sofim_fused.integrations.metrics import find_sofim
from sofim_fused.integrations.transformers import SOFIMCallback, attach, optimizer_cls_and_kwargs
from tests.clients.support import distance, language_model, rows, same_bits, weights


def trainer_of(out: Path, attached: bool = True, cls: type[SOFIM] = AdaSOFIM, **options: Any) -> Trainer:
    ours = options.pop("ours", {})
    callbacks = options.pop("callbacks", [])
    settings: dict[str, Any] = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    args = TrainingArguments(output_dir=str(out), **(settings | options))
    trainer = Trainer(
        language_model(),
        args,
        train_dataset=rows(),
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, cls, **ours),
    )
    if attached:
        attach(trainer)
    return trainer


def trained(out: Path, **options: Any) -> list[Tensor]:
    trainer = trainer_of(out, **options)
    trainer.train()
    return weights(trainer.model)


@pytest.mark.parametrize("cls", [SOFIM, AdaSOFIM])
def test_weights_are_those_of_a_loop(tmp_path: Path, cls: type[SOFIM]) -> None:
    """Bit for bit, with the batches that the Trainer took."""
    trainer = trainer_of(tmp_path, cls=cls, weight_decay=0.1)
    taken: list[Any] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda features: taken.append(collate(features)) or taken[-1]  # type: ignore[func-returns-value]
    model = copy.deepcopy(trainer.model)
    before = weights(model)
    trainer.train()
    groups = [
        {
            "params": [param for name, param in model.named_parameters() if _is_decayed(name) is decayed],
            "weight_decay": 0.1 if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    optimizer = cls(groups, **trainer.optimizer_cls_and_kwargs[1])
    for inputs in taken[:4]:
        optimizer.zero_grad()
        # The Trainer divides by the number of labels, of which the first of a row is never predicted.
        model(**copy.deepcopy(inputs), num_items_in_batch=inputs["labels"].numel()).loss.backward()
        optimizer.step()
    assert same_bits(weights(trainer.model), weights(model))
    assert not same_bits(before, weights(model))


def _is_decayed(name: str) -> bool:
    return not name.endswith("bias") and "ln_" not in name


def test_clipping_in_the_step_is_the_trainers(tmp_path: Path) -> None:
    ours = trained(tmp_path, cls=SOFIM, learning_rate=0.5, ours={"max_grad_norm": 0.1})
    theirs = trained(tmp_path, cls=SOFIM, learning_rate=0.5, max_grad_norm=0.1)
    unclipped = trained(tmp_path, cls=SOFIM, learning_rate=0.5)
    assert distance(ours, theirs) < 1e-4  # the Trainer divides by the norm plus 1e-6
    assert distance(unclipped, theirs) > 1e-2


@pytest.mark.parametrize("options", [{}, {"cls": SOFIM, "ours": {"release_grads": True}}], ids=["adaptive", "released"])
def test_accumulation_in_backward_is_that_of_plain_steps(tmp_path: Path, options: dict[str, Any]) -> None:
    """Five batches, two to a step: the last step has one."""
    common: dict[str, Any] = {"gradient_accumulation_steps": 2, "num_train_epochs": 1.0, "max_steps": -1}
    common["cls"] = options.get("cls", AdaSOFIM)

    def run(**ours: Any) -> list[Tensor]:
        trainer = trainer_of(tmp_path, ours=ours, **common)
        trainer.train_dataset = rows(18)
        trainer.train()
        assert trainer.state.global_step == 3
        return weights(trainer.model)

    taken = run(in_backward=True, **options.get("ours", {}))
    assert distance(taken, run()) < 1e-6
    assert options or same_bits(taken, run())


def test_the_trainers_norm_does_not_disturb_in_backward(tmp_path: Path) -> None:
    """With max_grad_norm=0 transformers 5.23 still "clips" to infinity, which writes to each gradient."""
    trainer = trainer_of(tmp_path, ours={"in_backward": True})
    trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "loss" in line]
    plain = trainer_of(tmp_path)
    plain.train()
    assert norms == [line["grad_norm"] for line in plain.state.log_history if "loss" in line]
    unattached = trainer_of(tmp_path, attached=False, ours={"in_backward": True})
    with pytest.raises(RuntimeError, match=r"was .* between backward\(\) and step\(\)"):
        unattached.train()


def test_bf16(tmp_path: Path) -> None:
    def losses(**options: Any) -> Tensor:
        trainer = trainer_of(tmp_path, ours={"max_grad_norm": 1.0}, **options)
        trainer.train()
        return torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])

    mixed, full = losses(bf16=True), losses()
    assert not torch.equal(mixed, full)
    torch.testing.assert_close(mixed, full, rtol=1e-2, atol=0)


@pytest.mark.parametrize("in_backward", [False, True])
def test_resuming_gives_the_same_bits(tmp_path: Path, in_backward: bool) -> None:
    common: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "ours": {"in_backward": in_backward, **({} if in_backward else {"max_grad_norm": 1.0})},
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = trained(tmp_path / "whole", **common)
    resumed = trainer_of(tmp_path / "whole", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert same_bits(weights(resumed.model), whole)


def test_what_is_logged(tmp_path: Path) -> None:
    """In the Trainer's history and in TensorBoard: of each step, and not later ones."""
    trainer = trainer_of(
        tmp_path, lr_scheduler_type="linear", report_to=["tensorboard"], ours={"max_grad_norm": 1.0, "rho": 0.5}
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    names = {"sofim/lr", "sofim/rho", "sofim/skipped_steps", "sofim/grad_norm", "sofim/signal"}
    assert all(names <= set(line) for line in lines)
    assert len(lines) == 4
    for line in lines:
        assert line["sofim/grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
        assert line["sofim/rho"] == 0.5
    sofim = find_sofim(trainer.optimizer)
    assert sofim is not None
    assert sofim.signal is not None
    assert lines[-1]["sofim/signal"] == sofim.signal.item()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    shown = events.Scalars("train/sofim/signal")
    assert [event.step for event in shown] == [1, 2, 3, 4]
    assert shown[-1].value == pytest.approx(sofim.signal.item(), rel=1e-6)


def test_skipped_steps_are_logged(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, attached=False, callbacks=[SOFIMCallback()], ours={"skip_nonfinite": True})
    handle = trainer.model.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
    trainer.train()
    handle.remove()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["sofim/skipped_steps"] for line in lines] == [1, 2, 3, 4]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in_backward=True with TrainingArguments\(max_grad_norm=1\.0\)"):
        trainer_of(tmp_path, max_grad_norm=1.0, ours={"in_backward": True})
    with pytest.raises(ValueError, match="would be clipped twice"):
        trainer_of(tmp_path, max_grad_norm=1.0, ours={"max_grad_norm": 1.0})
    with pytest.raises(ValueError, match=r"call attach\(trainer\)"):
        trainer_of(tmp_path, attached=False, callbacks=[SOFIMCallback()], ours={"in_backward": True}).train()
    late = trainer_of(tmp_path, ours={"in_backward": True})
    late.args.max_grad_norm = 1.0
    before = weights(late.model)
    with pytest.raises(ValueError, match=r"set max_grad_norm=0 there"):
        late.train()
    assert same_bits(weights(late.model), before)
    other = Trainer(
        language_model(),
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1),
        train_dataset=rows(),
        callbacks=[SOFIMCallback()],
    )
    with pytest.raises(TypeError, match=r"SOFIMCallback with a AcceleratedOptimizer: pass optimizer_cls_and_kwargs="):
        other.train()


def on_two_ranks(rank: int, out: str) -> list[Tensor]:
    os.environ.update(MASTER_ADDR="localhost", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])
    trainer = trainer_of(Path(out), per_device_train_batch_size=2, ddp_backend="gloo", ours={"max_grad_norm": 1.0})
    assert trainer.args.world_size == 2
    trainer.train()
    return weights(trainer.model)


def test_two_processes(two: Ranks, tmp_path: Path) -> None:
    """Halves of the same batches, under DistributedDataParallel."""
    one = trained(tmp_path, ours={"max_grad_norm": 1.0})
    first, second = two.run(on_two_ranks, str(tmp_path))
    assert same_bits(first, second)
    model = torch.cat([weight.flatten() for weight in first])
    assert float((model - torch.cat([weight.flatten() for weight in one])).norm() / model.norm()) < 1e-4


def test_a_model_with_lora_adapters(tmp_path: Path) -> None:
    """PEFT: the frozen weights stay as they are, and the adapters are trained, in the backward pass too."""
    from peft import LoraConfig, get_peft_model

    def run(**ours: Any) -> tuple[list[Tensor], list[Tensor]]:
        trainer = trainer_of(tmp_path, ours=ours)
        torch.manual_seed(1)
        trainer.model = get_peft_model(trainer.model, LoraConfig(r=2, target_modules=["c_attn"]))
        trainer.model_wrapped = trainer.model
        frozen = [param for param in trainer.model.parameters() if not param.requires_grad]
        before = copy.deepcopy(frozen)
        trainer.train()
        assert same_bits(frozen, before)
        adapters = [param.detach() for param in trainer.model.parameters() if param.requires_grad]
        assert all(float(param.norm()) > 0 for param in adapters)
        sofim = find_sofim(trainer.optimizer)
        assert sofim is not None
        assert len(sofim.state) == len(adapters) == 2
        return adapters, frozen

    assert same_bits(run()[0], run(in_backward=True)[0])
