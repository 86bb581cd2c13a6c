"""Learning rates depend on samples seen; a bad loss makes every gradient bad; a loss scaler can be restored."""

import json
from types import SimpleNamespace

import pytest
import torch

from pipeline.training.engine import (
    SCALER_STATE,
    propagate_non_finite,
    restore_scaler,
    scaler_state,
)


def test_a_loss_that_is_not_finite_makes_every_gradient_so_and_a_finite_one_changes_none() -> None:
    for bad in (float("nan"), float("inf")):
        weight = torch.ones(3, requires_grad=True)
        propagate_non_finite((weight * torch.tensor([1.0, 1.0, bad])).sum()).backward()
        assert not weight.grad.isfinite().any()
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * torch.tensor([0.1, 0.2, 0.3])).sum()
    assert torch.equal(propagate_non_finite(loss), loss)
    propagate_non_finite(loss).backward()
    assert torch.equal(weight.grad, torch.tensor([0.1, 0.2, 0.3]))


def test_a_restored_loss_scaler_continues_as_the_saved_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 1))  # a rank that logs nothing

    def engine() -> SimpleNamespace:
        scaler = DynamicLossScaler(
            init_scale=2.0**16, scale_window=3, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False
        )
        scaler.raise_error_at_min_scale = False
        return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))

    first, second = engine(), engine()
    for overflow in (False, True, False, True, False):
        first.optimizer.loss_scaler.update_scale(overflow)
    restore_scaler(second, json.loads(json.dumps(scaler_state(first))))
    for overflow in (False, False, True, False):
        first.optimizer.loss_scaler.update_scale(overflow)
        second.optimizer.loss_scaler.update_scale(overflow)
        assert scaler_state(first) == scaler_state(second)
        assert set(scaler_state(first)) == set(SCALER_STATE)
    static = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=loss_scaler.LossScaler(scale=1.0)))
    assert scaler_state(static) == scaler_state(SimpleNamespace(optimizer=SimpleNamespace())) == {}
