"""DeepSpeed's settings agree with the recipe, generated or the user's."""

import json
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.loading import parse_recipe
from common.recipe import Train, with_world_size
from pipeline.training.deepspeed_config import deepspeed_config


def train_with(*overrides: str) -> Train:
    given = ("train.batch_size=32", "train.micro_batch_size=4", "train.precision=fp32", *overrides)
    return with_world_size(parse_recipe("name: a", given), 2).train


def test_the_generated_settings_add_up() -> None:
    config = deepspeed_config(train_with(), 2)
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
            "has optimizer {'type': 'Adam'}; the recipe's optimizer and learning rate are used",
        ),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "has bf16.bf16_master_weights_and_grads True; averages of"),
        ({"fp16": {"loss_scale": 128}}, "has fp16.loss_scale 128; a fixed scale that overflows"),
        (
            {"zero_optimization": {"cpu_offload": True}},
            "has zero_optimization.cpu_offload True; train.optimizer.offload",
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
        deepspeed_config(train_with(f"train.deepspeed_config={path}"), 2)


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
        deepspeed_config(train_with(f"train.deepspeed_config={path}"), 2)
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
    config = deepspeed_config(train_with(f"train.deepspeed_config={path}"), 2)
    assert "auto" not in json.dumps(config).replace("auto_cast", "")
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["allgather_bucket_size"] == 2e8
    assert config["fp16"] == {"enabled": False, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2}
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (4, 1.0)


def test_a_users_settings_replace_the_generated_ones(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    own = {"train_batch_size": "auto", "zero_optimization": {"stage": 2, "overlap_comm": False}, "wall_clock": True}
    path.write_text(json.dumps(own))
    config = deepspeed_config(train_with(f"train.deepspeed_config={path}"), 2)
    assert config["train_batch_size"] == 32
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert config["wall_clock"] is True
    assert config["train_micro_batch_size_per_gpu"] == 4


def test_muon_with_an_offloaded_optimizer_in_the_users_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    train = train_with(f"train.deepspeed_config={path}", "train.optimizer.name=muon")
    with pytest.raises(UserError, match=r"zero_optimization\.offload_optimizer, which only train\.optimizer"):
        deepspeed_config(train, 2)


@pytest.mark.parametrize("can", [True, False])
def test_fp16_without_a_gpu_is_refused_even_if_the_cpu_supports_it(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: can)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.precision: fp16 needs a GPU"):
        deepspeed_config(train_with("train.precision=fp16"), 2)
    assert deepspeed_config(train_with("train.precision=fp16"), 2, on_gpu=True)["fp16"] == {"enabled": True}
    auto = train_with("train.precision=auto")
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
