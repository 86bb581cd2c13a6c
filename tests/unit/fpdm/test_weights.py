"""Weights on disk, and the import of published checkpoints."""

import argparse
import hashlib
import json
import pickle
import re

import numpy as np
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
from fpdm.blocks import position_embedding
from fpdm.weights import weights_sha256

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


def unsealed(folder, **fields):
    """The fields of config.json, as somebody sets them who knows nothing of seals: None takes one away."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), "weights_sha256": None, "content_key": None, **fields}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_weights_are_loaded_exactly(tmp_path, name):
    model = network(CONFIGS[name])
    save_pretrained(model.state_dict(), model.config, tmp_path / "weights", extra={"prediction": "v"})
    loaded = load_pretrained(tmp_path / "weights")
    assert loaded.config == read_config(tmp_path / "weights") == model.config
    assert same(loaded, model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert read_extra(tmp_path / "weights") == {"prediction": "v"}
    assert len({path.stat().st_mode for path in (tmp_path / "weights").iterdir()}) == 1  # who reads one reads the other
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
    unsealed(tmp_path)
    with pytest.raises(ValueError, match=f"diffusion_pytorch_model.safetensors: {message}"):
        load_pretrained(tmp_path)


def test_an_unknown_field_of_the_config_is_named(tmp_path):
    save_pretrained(network(CONFIGS["fpdm"]).state_dict(), CONFIGS["fpdm"], tmp_path)
    unsealed(tmp_path, fancy=1)
    with pytest.raises(ValueError, match=r"config.json: unknown field 'fancy'; allowed are condition_dim"):
        load_pretrained(tmp_path)
    unsealed(tmp_path, fancy=None, num_heads=5)
    with pytest.raises(ValueError, match=r"config.json: hidden_size: 32 is not a multiple of num_heads 5"):
        load_pretrained(tmp_path)


def test_a_folder_without_a_seal_is_loaded_and_a_broken_seal_is_named(tmp_path):
    model = network(CONFIGS["fpdm"])
    save_pretrained(model.state_dict(), model.config, tmp_path)
    sealed = json.loads((tmp_path / "config.json").read_text())
    unsealed(tmp_path)
    assert weights_sha256(tmp_path) is None
    assert same(load_pretrained(tmp_path), model)
    for name, value in (("extra", {"prediction": "v"}), ("mlp_ratio", 2.0), ("weights_sha256", "0" * 64)):
        (tmp_path / "config.json").write_text(json.dumps({**sealed, name: value}))
        with pytest.raises(ValueError, match=r"config\.json: changed after it was written"):
            load_pretrained(tmp_path)
    for name in ("weights_sha256", "content_key"):  # half a seal is none that was written
        (tmp_path / "config.json").write_text(json.dumps({key: sealed[key] for key in sealed if key != name}))
        with pytest.raises(ValueError, match=r"config\.json: changed after it was written"):
            read_extra(tmp_path)


def test_a_variant_of_weights_that_were_replaced_is_no_longer_one(tmp_path):
    model = network(CONFIGS["fpdm"])
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    for _ in range(2):  # the same weights once more change nothing
        save_pretrained(model.state_dict(), model.config, tmp_path)
        save_pretrained(half, model.config, tmp_path, variant="fp16")
        save_pretrained(model.state_dict(), model.config, tmp_path)
        assert next(load_pretrained(tmp_path, "fp16").parameters()).dtype == torch.float16
    other = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    save_pretrained(other, model.config, tmp_path)
    with pytest.raises(ValueError, match=r"fp16\.safetensors: changed after it was written"):
        load_pretrained(tmp_path, "fp16")


def test_a_flipped_bit_of_the_weights_or_their_config_is_named(tmp_path):
    model = network(DenoiserConfig(input_size=4, hidden_size=8, num_heads=2, num_classes=1, patch_size=2))
    save_pretrained(model.state_dict(), model.config, tmp_path, {"objective": {"prediction": "v"}})
    random = np.random.default_rng(0)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        path = tmp_path / name
        whole = path.read_bytes()
        bits = random.integers(8 * len(whole), size=100).tolist() + [8 * place + 7 for place in range(0, 200, 7)]
        for bit in bits:
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
                load_pretrained(tmp_path)
            assert "\n" not in str(caught.value)
        path.write_bytes(whole)


WRONG = [None, True, -1, 0, 3.5, 1e308, 2**62, float("nan"), float("inf"), "", "../x", [], [1], {}, {"a": 1}]


@pytest.mark.parametrize("name", ["_class_name", "kind", "hidden_size", "mlp_ratio", "condition_dim", "depth", "extra"])
@pytest.mark.parametrize("value", WRONG, ids=str)
def test_a_wrong_value_in_a_config_is_one_line_or_changes_nothing(tmp_path, name, value):
    model = network(DenoiserConfig(input_size=4, hidden_size=8, num_heads=2, num_classes=1))
    save_pretrained(model.state_dict(), model.config, tmp_path)
    values = {**json.loads((tmp_path / "config.json").read_text()), name: value}
    del values["content_key"]
    values["content_key"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    (tmp_path / "config.json").write_text(json.dumps(values))
    try:
        read_extra(tmp_path)
        loaded = load_pretrained(tmp_path)
    except ValueError as error:
        told = str(error)
        assert "\n" not in told
    else:
        assert same(loaded, model)


def test_a_failed_write_leaves_the_previous_weights_intact(tmp_path, monkeypatch):
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
def test_settings_are_inferred_from_names_and_shapes(name):
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


def test_settings_that_tensors_do_not_show_must_be_stated(tmp_path):
    training_checkpoint(tmp_path / "c.pt", {"lr": 1e-4})
    with pytest.raises(ValueError, match="pre_post_timestep_conditioning: cannot be inferred from these tensors"):
        import_checkpoint(tmp_path / "c.pt", num_heads=4)
    with pytest.raises(ValueError, match="num_heads: cannot be inferred"):
        import_checkpoint(tmp_path / "c.pt", pre_post_timestep_conditioning=False)
    training_checkpoint(tmp_path / "c.pt", {"fixed_point_pre_post_timestep_conditioning": True})
    assert import_checkpoint(tmp_path / "c.pt", num_heads=4)[0].config.pre_post_timestep_conditioning
    with pytest.raises(ValueError, match=r"pre_post_timestep_conditioning: .*c\.pt states that .* with True"):
        import_checkpoint(tmp_path / "c.pt", num_heads=4, pre_post_timestep_conditioning=False)


def test_mismatches_are_reported(tmp_path):
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


def test_a_position_table_of_other_numbers_is_reported_not_dropped_in_silence(tmp_path):
    tensors = dict(network(CONFIGS["dit"]).state_dict())
    tensors["pos_embed"] = tensors["pos_embed"] + 0.1
    torch.save(tensors, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="1 mismatched: pos_embed"):
        import_checkpoint(tmp_path / "c.pt", num_heads=4)


@pytest.mark.parametrize("kind", ["dit", "fpdm"])
def test_checkpoints_of_dit_and_fpdm_load_at_full_size(tmp_path, kind):
    """DiT-XL-2-256x256.pt is a bare state dict; FPDM's trainer wrote {model, ema, opt, args}. Zeros here."""
    config = DenoiserConfig(kind=kind)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Denoiser(config).state_dict().items()}
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    numbers = torch.zeros(max(shape.numel() for shape in shapes.values()))  # once on disk, for all tensors
    bare = {name: numbers[: shape.numel()].view(shape) for name, shape in shapes.items()}
    bare["pos_embed"] = position_embedding(1152, 16)
    content = {
        "model": {f"module.{name}": tensor for name, tensor in bare.items()},
        "ema": bare,
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": {"fixed_point_pre_post_timestep_conditioning": False},
    }
    torch.save(bare if kind == "dit" else content, tmp_path / "c.pt")
    model, report = import_checkpoint(tmp_path / "c.pt")
    assert model.config == config
    assert report.complete
    assert report.source == ("tensors" if kind == "dit" else "ema")


class Payload:
    """What unpickling would call."""

    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.pt", {"model": Payload()}, r"loading it would run (builtins\.)?print; give a .safetensors file"),
        ("c.pt", b"hello world\n", "damaged, or no checkpoint; give a .safetensors file"),
        ("c.safetensors", b"hello world\n", "damaged, or no checkpoint"),
        ("c.pt", b"", "damaged, or no checkpoint"),
        ("c.pt", pickle.dumps(Payload(), 2), "loading it would run"),
        ("c.pt", [torch.zeros(1)], "no state dict, tensors by name"),
        ("c.pt", {"ema": {"a": 1}}, "no state dict, tensors by name, in 'ema'"),
        ("c.pt", {"model": {}}, "weights: .* holds no 'ema'; it holds model"),
        ("c.pt", {"a": torch.zeros(1)}, "tensor 'x_embedder.proj.weight' is missing: these are no weights"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_and_runs_nothing(tmp_path, capsys, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        import_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_checkpoint_cut_anywhere_is_refused(tmp_path, suffix):
    tensors = build_denoiser(CONFIGS["dit"]).state_dict()
    path = tmp_path / f"c.{suffix}"
    torch.save(tensors, path) if suffix == "pt" else save_file(tensors, path)
    whole = path.read_bytes()
    for length in range(1, len(whole), len(whole) // 50):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged, or no checkpoint"):
            import_checkpoint(path, num_heads=4)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "config.json: no JSON"),
        ("config.json", "[]", "config.json: no JSON object"),
        ("config.json", '{"hidden_size": "32"}', "config.json: "),
        ("diffusion_pytorch_model.safetensors", "cut", "diffusion_pytorch_model.safetensors: "),
    ],
)
def test_a_damaged_file_of_a_folder_is_named(tmp_path, file, text, message):
    save_pretrained(network(CONFIGS["dit"]).state_dict(), CONFIGS["dit"], tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)
