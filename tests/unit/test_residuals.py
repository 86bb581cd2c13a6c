"""The benchmark of residuals: when a curve rises, and that its curves are the network's own."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import residuals
from benchmarks.residuals import FLOOR, Step, steps_of, summary
from fpdm import Denoiser, DenoiserConfig, save_pretrained


def test_a_curve_rises_where_an_iteration_is_above_the_least_before_it() -> None:
    assert Step(0.0, [1.0, 0.1, 0.01, 0.01]).rise == 1
    assert Step(0.0, [1.0, 0.1, 0.2, 0.05, 0.08]).rise == pytest.approx(2)  # 0.08 is 1.6 times 0.05
    assert Step(0.0, [1.0, FLOOR / 100, FLOOR / 2]).rise == 1  # rounding
    assert Step(0.0, [1.0, FLOOR / 100, 3 * FLOOR]).rise == pytest.approx(3)


def test_a_summary_says_how_many_timesteps_rise_and_by_how_much() -> None:
    falls, rises = Step(999.0, [1.0, 1e-3]), Step(0.0, [0.016, 0.02])
    assert summary([falls]) == "1 timesteps: at most 1.0e-03 after 2 iterations; rises at none"
    assert summary([falls, rises]).endswith("at most 2.0e-02 after 2 iterations; rises at 1, by 25.0 % at most")


def test_every_timestep_of_every_network_has_its_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"schedule": "linear", "num_timesteps": 1000, "prediction": "v", "learned_variance": False}
    config = DenoiserConfig(input_size=4, hidden_size=16, num_heads=2, num_classes=2, learned_variance=False)
    torch.manual_seed(0)
    weights = {name: 0.1 * torch.randn_like(value) for name, value in Denoiser(config).state_dict().items()}
    for folder, dtype in (("one", torch.float32), ("other", torch.float16)):
        halved = {name: value.to(dtype) for name, value in weights.items()}
        save_pretrained(halved, config, tmp_path / folder, extra={"objective": objective})
    monkeypatch.setattr(sys, "argv", ["residuals.py", str(tmp_path / "one"), str(tmp_path / "other"), "--steps", "3"])
    sys.argv += ["--iterations", "4", "--samples", "2", "--json", str(tmp_path / "found.json")]
    residuals.main()
    found = json.loads((tmp_path / "found.json").read_text())["weights"]
    assert [[step["timestep"] for step in steps] for steps in found.values()] == [[999, 500, 0]] * 2
    assert all(len(step["residuals"]) == 4 for steps in found.values() for step in steps)
    assert capsys.readouterr().out.count("3 timesteps: at most") == 2
    (step, *_) = steps_of(str(tmp_path / "one"), 3, 4, 2)
    assert step.residuals == found[str(tmp_path / "one")][0]["residuals"]
