"""Weights on disk, and the import of published checkpoints."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fpdm import (
    Denoiser,
    DenoiserConfig,
    build_denoiser,
    import_checkpoint,
    infer_config,
    load_pretrained,
    read_config,
    read_extra,
    rng,
    save_pretrained,
)

SMALL = {"input_size": 8, "hidden_size": 32, "num_heads": 4, "num_classes": 5}
CONFIGS = {
    "fpdm": DenoiserConfig(**SMALL),
    "fpdm 0-2, timed": DenoiserConfig(**SMALL, pre_depth=0, post_depth=2, pre_post_timestep_conditioning=True),
    "vector": DenoiserConfig(**SMALL, condition_dim=7, patch_size=4, in_channels=3, mlp_ratio=2.0),
    "dit": DenoiserConfig(**SMALL, kind="dit", depth=3, learned_variance=False),
}


def network(config) -> Denoiser:
    model = build_denoiser(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(rng.normal(1, name, torch.arange(len(parameter)), tuple(parameter.shape[1:])))
    return model


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_loaded_exactly(tmp_path, name):
    model = network(CONFIGS[name])
    save_pretrained(model.state_dict(), model.config, tmp_path / "weights", extra={"prediction": "v"})
    loaded = load_pretrained(tmp_path / "weights")
    assert loaded.config == read_config(tmp_path / "weights") == model.config
    assert same(loaded, model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert read_extra(tmp_path / "weights") == {"prediction": "v"}
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_parameters_alone_are_enough_and_the_position_table_is_written_for_other_readers(tmp_path):
    model = network(CONFIGS["fpdm"])
    save_pretrained(dict(model.named_parameters()), model.config, tmp_path)
    assert "pos_embed" in load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert same(load_pretrained(tmp_path), model)


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    model = network(CONFIGS["fpdm"]).bfloat16()
    save_pretrained(model.state_dict(), model.config, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(loaded.x_embedder.proj.weight, model.x_embedder.proj.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("final_layer.linear.bias"), "tensor 'final_layer.linear.bias' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor 'extra' is unknown"),
        (
            lambda t: t.update({"t_embedder.mlp.0.bias": torch.zeros(3)}),
            r"tensor 't_embedder.mlp.0.bias' has shape \(3,\); the config needs \(32,\)",
        ),
    ],
)
def test_a_tensor_that_does_not_match_is_named_in_saving_and_in_loading(tmp_path, change, message):
    model = network(CONFIGS["fpdm"])
    tensors = dict(model.state_dict())
    change(tensors)
    with pytest.raises(ValueError, match=message):
        save_pretrained(tensors, model.config, tmp_path)
    assert not list(tmp_path.iterdir())
    save_pretrained(model.state_dict(), model.config, tmp_path)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=f"diffusion_pytorch_model.safetensors: {message}"):
        load_pretrained(tmp_path)


def test_an_unknown_field_of_the_config_is_named(tmp_path):
    save_pretrained(network(CONFIGS["fpdm"]).state_dict(), CONFIGS["fpdm"], tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "fancy": 1}))
    with pytest.raises(ValueError, match=r"config.json: unknown field 'fancy'; allowed are condition_dim"):
        load_pretrained(tmp_path)
    path.write_text(json.dumps({**values, "num_heads": 5}))
    with pytest.raises(ValueError, match=r"config.json: hidden_size: 32 is not a multiple of num_heads 5"):
        load_pretrained(tmp_path)


def test_a_failed_write_leaves_the_previous_weights_whole(tmp_path, monkeypatch):
    from fpdm import weights

    model = network(CONFIGS["fpdm"])
    save_pretrained(model.state_dict(), model.config, tmp_path)

    def fail(tensors, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(build_denoiser(model.config).state_dict(), model.config, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert same(load_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_told_from_names_and_shapes(name):
    config = CONFIGS[name]
    settings = {"num_heads": 4}
    if config.kind == "fpdm":
        settings["pre_post_timestep_conditioning"] = config.pre_post_timestep_conditioning
    found = infer_config(build_denoiser(config).state_dict(), **settings)
    unused = {"dit": ("pre_depth", "post_depth"), "fpdm": ("depth",)}[config.kind]
    if config.condition_dim is not None:
        unused += ("num_classes",)
    for field in config.__dataclass_fields__:
        assert field in unused or getattr(found, field) == getattr(config, field), field


def test_export_then_import_is_exact(tmp_path):
    model = network(CONFIGS["fpdm"])
    save_pretrained(model.state_dict(), model.config, tmp_path)
    imported, report = import_checkpoint(
        tmp_path / "diffusion_pytorch_model.safetensors", num_heads=4, pre_post_timestep_conditioning=False
    )
    assert same(imported, model)
    assert imported.config == model.config
    assert report.complete
    assert report.source == "tensors"


def training_checkpoint(path, arguments, prefix="module."):
    ema, raw = network(CONFIGS["fpdm"]), build_denoiser(CONFIGS["fpdm"], seed=5)
    content = {
        "model": {prefix + name: tensor for name, tensor in raw.state_dict().items()},
        "ema": ema.state_dict(),
        "opt": {"state": {}, "param_groups": []},
        "args": arguments,
    }
    torch.save(content, path)
    return ema, raw


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_training_checkpoint_gives_its_ema_or_its_raw_weights(tmp_path, prefix):
    arguments = argparse.Namespace(fixed_point_pre_post_timestep_conditioning=False)
    ema, raw = training_checkpoint(tmp_path / "0400000.pt", arguments, prefix)
    assert same(import_checkpoint(tmp_path / "0400000.pt", num_heads=4)[0], ema)
    assert same(import_checkpoint(tmp_path / "0400000.pt", weights="model", num_heads=4)[0], raw)


def test_defect_a9_what_cannot_be_seen_in_the_tensors_must_be_stated(tmp_path):
    training_checkpoint(tmp_path / "c.pt", {"lr": 1e-4})
    with pytest.raises(ValueError, match="pre_post_timestep_conditioning: cannot be told from these tensors"):
        import_checkpoint(tmp_path / "c.pt", num_heads=4)
    with pytest.raises(ValueError, match="num_heads: cannot be told"):
        import_checkpoint(tmp_path / "c.pt", pre_post_timestep_conditioning=False)
    training_checkpoint(tmp_path / "c.pt", {"fixed_point_pre_post_timestep_conditioning": True})
    assert import_checkpoint(tmp_path / "c.pt", num_heads=4)[0].config.pre_post_timestep_conditioning


def test_what_did_not_match_is_reported(tmp_path):
    tensors = dict(network(CONFIGS["fpdm"]).state_dict())
    del tensors["final_layer.linear.bias"]
    tensors["t_embedder.mlp.0.bias"] = torch.zeros(3)
    tensors["ode.weight"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "c.pt")
    options = {"num_heads": 4, "pre_post_timestep_conditioning": False}
    with pytest.raises(ValueError, match=r"1 missing: final_layer.linear.bias; 1 unexpected: ode.weight; 1 mismatched"):
        import_checkpoint(tmp_path / "c.pt", **options)
    model, report = import_checkpoint(tmp_path / "c.pt", strict=False, **options)
    assert (report.missing, report.unexpected) == (["final_layer.linear.bias"], ["ode.weight"])
    assert report.mismatched == ["t_embedder.mlp.0.bias"]
    assert torch.equal(model.x_embedder.proj.weight, tensors["x_embedder.proj.weight"])


def test_code_hidden_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"model": Payload()}, tmp_path / "c.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        import_checkpoint(tmp_path / "c.pt")
