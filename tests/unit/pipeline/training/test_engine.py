"""DeepSpeed's settings agree with the recipe, generated or the user's; learning rates depend on samples seen."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from common.loading import parse_recipe
from common.recipe import Recipe, with_world_size
from pipeline.training.engine import (
    SCALER_STATE,
    deepspeed_config,
    learning_rate,
    propagate_non_finite,
    restore_scaler,
    scaler_state,
)


def recipe_with(*overrides: str) -> Recipe:
    given = ("train.batch_size=32", "train.micro_batch_size=4", "train.precision=fp32", *overrides)
    return with_world_size(parse_recipe("name: a", given), 2)


def test_the_generated_settings_add_up() -> None:
    config = deepspeed_config(recipe_with(), 2)
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 32


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train_batch_size": 64}, "has train_batch_size 64, the recipe and the ranks make it 32"),
        ({"gradient_accumulation_steps": 1}, "has gradient_accumulation_steps 1, the recipe and the ranks make it 4"),
        ({"zero_optimization": {"stage": 3}}, "has zero_optimization.stage 3, the recipe and the ranks make it 2"),
        ({"bf16": {"enabled": True}}, "has bf16.enabled True, the recipe and the ranks make it False"),
        ({"gradient_clipping": 0.1}, "has gradient_clipping 0.1, the recipe and the ranks make it 1.0"),
        (
            {"optimizer": {"type": "Adam"}},
            "has optimizer {'type': 'Adam'}; the recipe's AdamW and learning rate are used",
        ),
        ({"bf16": {"check_grad_overflow": False}}, "has bf16.check_grad_overflow False; a gradient that is not finite"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "has zero_optimization.compute_grad_norm False"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "has data_types.grad_accum_dtype 'fp32'"),
        ({"torch_autocast": {"enabled": True}}, "has torch_autocast.enabled True; train.precision says it: remove it"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "has zero_optimization.offload_optimizer.dev",
        ),
        ({"zero_optimization": 2}, "has zero_optimization 2; DeepSpeed takes an object there"),
        (
            {"zero_optimization": {"offload_optimizer": "cpu"}},
            "has zero_optimization.offload_optimizer 'cpu'; DeepSpeed",
        ),
        ({"zero_optimization": {"reduce_bucket": 5}}, "DeepSpeed does not take .*reduce_bucket Extra inputs"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, "DeepSpeed does not take .*reduce_bucket_size"),
        ({"elasticity": {"enabled": True}}, "DeepSpeed does not take .*removed"),
        ({"tensor_parallel": {"autotp_size": 2}}, "has tensor_parallel .*; ranks share the batch, not the network"),
        ({"fp16": {"enabled": "true"}}, "has fp16.enabled 'true', the recipe and the ranks make it False"),
        ([1, 2], "holds no JSON object"),
    ],
)
def test_a_users_settings_that_contradict_the_recipe_are_refused(given: object, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(given))
    with pytest.raises(UserError, match=expected):
        deepspeed_config(recipe_with(f"train.deepspeed_config={path}"), 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"a": 1,}', "not readable as JSON"), ("// c", "not readable as JSON"), ("", "not readable as JSON"),
     ('{"bf16": {}, "bf16": {}}', r"\(bf16 stands twice\)"), ("[" * 100_000, "not readable as JSON")],
)  # fmt: skip
def test_a_settings_file_that_is_not_json_is_an_error_that_suggests_no_deletion(
    text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as raised:
        deepspeed_config(recipe_with(f"train.deepspeed_config={path}"), 2)
    assert "delete" not in str(raised.value)


def test_auto_and_settings_published_for_another_trainer_are_accepted(tmp_path: Path) -> None:
    """Except optimizer and scheduler, which are refused by name. "auto" takes the recipe's value."""
    path = tmp_path / "own.json"
    own = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "auto_cast": "auto"},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": "auto",
            "offload_optimizer": None,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "allgather_bucket_size": 2e8,
            "stage3_prefetch_bucket_size": "auto",
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    path.write_text(json.dumps(own))
    config = deepspeed_config(recipe_with(f"train.deepspeed_config={path}"), 2)
    assert "auto" not in json.dumps(config).replace("auto_cast", "")
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["allgather_bucket_size"] == 2e8
    assert config["fp16"] == {"enabled": False, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2}
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (4, 1.0)


def test_a_users_settings_replace_the_generated_ones(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    own = {"train_batch_size": "auto", "zero_optimization": {"stage": 2, "overlap_comm": False}, "wall_clock": True}
    path.write_text(json.dumps(own))
    config = deepspeed_config(recipe_with(f"train.deepspeed_config={path}"), 2)
    assert config["train_batch_size"] == 32
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert config["wall_clock"] is True
    assert config["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize("can", [True, False])
def test_fp16_without_a_gpu_is_refused_even_if_the_cpu_supports_it(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: can)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.precision: fp16 needs a GPU"):
        deepspeed_config(recipe_with("train.precision=fp16"), 2)
    assert deepspeed_config(recipe_with("train.precision=fp16"), 2, on_gpu=True)["fp16"] == {"enabled": True}
    auto = recipe_with("train.precision=auto")
    assert [deepspeed_config(auto, 2, on_gpu)["bf16"]["enabled"] for on_gpu in (True, False, None)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("train.zero_stage=0", "train.precision=fp16"), r"train\.zero_stage: at 0 DeepSpeed does not scale the loss"),
        (("train.zero_stage=0", "train.optimizer.offload=true"), r"train\.optimizer\.offload: ZeRO stage 0"),
        (("train.zero_stage=3", "train.compile=true"), r"train\.compile: not with zero_stage 3"),
        (("train.ema.decays=[]",), r"train\.ema\.decays: sampling needs an average"),
        (("train.ema.widths=[0.3]",), r"train\.ema\.widths"),
    ],
)
def test_incompatible_settings_are_refused(overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse_recipe("name: a", overrides)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("cosine", [0.5, 0.75, 0.5, 0]), ("linear", [0.5, 2 / 3, 0.5, 0])],
)
def test_learning_rates_warm_up_and_fall_with_samples_seen(decay: str, expected: list[float]) -> None:
    settings = (
        "train.total_samples=960",
        "train.batch_size=32",
        "train.optimizer.learning_rate=1.0",
        "train.optimizer.warmup_samples=64",
    )
    recipe = parse_recipe("name: a", (*settings, f"train.optimizer.learning_rate_decay={decay}"))
    assert [learning_rate(recipe, samples) for samples in (0, 320, 480, 960)] == pytest.approx(expected)


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
