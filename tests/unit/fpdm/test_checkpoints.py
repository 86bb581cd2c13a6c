"""Checkpoints as people have them: diffusers' names, half precision, wrappers, values beside tensors; and no code."""

import argparse
import collections
import datetime
import json
import os
import pathlib
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from fpdm import Denoiser, DenoiserConfig, build_denoiser, import_checkpoint, infer_config, rng, save_pretrained
from fpdm.diffusers_dit import rename
from fpdm.weights import tensor_shapes

PUBLISHED = Path(__file__).parents[2] / "published"
WEIGHTS = "diffusion_pytorch_model.safetensors"
DIT = DenoiserConfig(kind="dit", depth=2, input_size=8, hidden_size=32, num_heads=4, num_classes=5)
FPDM = DenoiserConfig(input_size=8, hidden_size=32, num_heads=4, num_classes=5)
T, LABELS = torch.tensor([0, 1, 10, 500, 777, 999]), torch.tensor([0, 1, 2, 3, 4, 5])  # 5 is the null label


def network(config: DenoiserConfig) -> Denoiser:
    model = build_denoiser(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.1 * rng.normal(1, name, torch.arange(len(parameter)), tuple(parameter.shape[1:])))
    return model


def same(first: Denoiser, second: Denoiser) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def diffusers_network() -> DiTTransformer2DModel:
    """diffusers' own class with its random weights, in which each block has another embedder."""
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    sizes |= {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiTTransformer2DModel(**sizes)


def converted(model: Denoiser) -> DiTTransformer2DModel:
    """A DiT as diffusers' script converts it: one embedder copied into each block."""
    target, found = diffusers_network(), {}
    ours = model.state_dict()
    for name in target.state_dict():
        block = name.split(".")[1] if name.startswith("transformer_blocks.") else ""
        part = name.rpartition(".")[2]
        for theirs, here in {
            "pos_embed.proj.": "x_embedder.proj.",
            "timestep_embedder.linear_1.": "t_embedder.mlp.0.",
            "timestep_embedder.linear_2.": "t_embedder.mlp.2.",
            "class_embedder.embedding_table.": "y_embedder.embedding_table.",
            "norm1.linear.": f"blocks.{block}.adaLN_modulation.1.",
            "attn1.to_out.0.": f"blocks.{block}.attn.proj.",
            "ff.net.0.proj.": f"blocks.{block}.mlp.fc1.",
            "ff.net.2.": f"blocks.{block}.mlp.fc2.",
            "proj_out_1.": "final_layer.adaLN_modulation.1.",
            "proj_out_2.": "final_layer.linear.",
        }.items():
            if theirs in name:
                found[name] = ours[here + part]
        for position, letter in enumerate("qkv"):
            if f"attn1.to_{letter}." in name:
                found[name] = ours[f"blocks.{block}.attn.qkv.{part}"].chunk(3)[position]
    target.load_state_dict(found)
    return target


def outputs(model: torch.nn.Module, t: torch.Tensor) -> torch.Tensor:
    x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(next(model.parameters()).dtype)
    with torch.no_grad():
        if isinstance(model, Denoiser):
            return model(x, t, LABELS).output
        return model.eval()(x, timestep=t, class_labels=LABELS).sample


def test_a_diffusers_network_computes_the_same_here(tmp_path: Path) -> None:
    theirs = diffusers_network()
    theirs.save_pretrained(tmp_path)
    ours, report = import_checkpoint(tmp_path)
    assert ours.config.self_conditioned
    assert report.complete
    assert str(report).endswith("computed as diffusers computes it")
    # Angles reach 999 in float32, whose last bit there is 999 times float32's epsilon.
    torch.testing.assert_close(outputs(ours, T), outputs(theirs, T), rtol=0, atol=999 * torch.finfo(torch.float32).eps)
    # In float64 at t = 0, where the embedding is exact, nothing but float64's rounding is left: 1e4 operations of it.
    first, second = (outputs(model.double(), torch.zeros_like(T)) for model in (ours, theirs))
    torch.testing.assert_close(first, second, rtol=0, atol=1e4 * torch.finfo(torch.float64).eps)


def test_a_dit_converted_to_diffusers_names_is_the_same_dit(tmp_path: Path) -> None:
    model = network(DIT)
    theirs = converted(model)
    theirs.save_pretrained(tmp_path)
    imported, report = import_checkpoint(tmp_path)
    assert imported.config == DIT
    assert same(imported, model)
    assert "computed as DiT" in str(report)
    as_diffusers, _ = import_checkpoint(tmp_path, self_conditioned=True)
    bound = 999 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(outputs(as_diffusers, T), outputs(theirs, T), rtol=0, atol=bound)
    assert (outputs(imported, T) - outputs(theirs, T)).abs().max() > 10 * bound  # the two are not one function


def test_the_published_dit_finds_a_place_for_every_tensor() -> None:
    """facebook/DiT-XL-2-256 at its real shapes."""
    config = json.loads((PUBLISHED / "DiT-XL-2-256/transformer/config.json").read_text())
    with torch.device("meta"):
        theirs = DiTTransformer2DModel.from_config({**config, "_class_name": "DiTTransformer2DModel"})
    zero = torch.zeros(1, dtype=torch.float16)
    tensors = rename({name: zero.expand(tensor.shape) for name, tensor in theirs.state_dict().items()})
    found = infer_config(tensors, input_size=32)
    assert found == DenoiserConfig(kind="dit")  # XL/2
    expected = tensor_shapes(found)
    del expected["pos_embed"]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected


def test_the_published_configuration_of_dit_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    """It names the class as it was called then, and leaves out what has a default."""
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    published = json.loads((PUBLISHED / "DiT-XL-2-256/transformer/config.json").read_text())
    converted(network(DIT)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**published, **sizes, "num_embeds_ada_norm": 5}))
    imported, _ = import_checkpoint(tmp_path)
    assert imported.config == DIT


def pipeline_folder(folder: Path) -> Path:
    shutil.move(folder, folder.parent / "moved")
    shutil.move(folder.parent / "moved", folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    return folder


def variant(folder: Path) -> Path:
    save_file({k: v.half() for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS.replace(".s", ".fp16.s"))
    (folder / WEIGHTS).unlink()
    return folder


def shards(folder: Path) -> Path:
    tensors = load_file(folder / WEIGHTS)
    files = {name: f"diffusion_pytorch_model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / WEIGHTS).unlink()
    return folder


def pickled(folder: Path) -> Path:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


@pytest.mark.parametrize("form", [lambda folder: folder / WEIGHTS, pipeline_folder, variant, shards, pickled])
def test_a_folder_of_diffusers_is_read_in_every_form(tmp_path: Path, form) -> None:
    model = network(DIT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    converted(model).save_pretrained(tmp_path / "dit")
    imported, _ = import_checkpoint(form(tmp_path / "dit"))
    assert imported.config == DIT
    assert same(imported, model)


def test_a_folder_of_this_project_is_read_with_its_config(tmp_path: Path) -> None:
    model = network(FPDM)
    save_pretrained(model.state_dict(), FPDM, tmp_path)
    imported, _ = import_checkpoint(tmp_path)
    assert imported.config == FPDM
    assert same(imported, model)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"activation_fn": "geglu"}, {}, "activation_fn is 'geglu' in its config; only 'gelu-approximate' can be"),
        ({"norm_eps": 1e-3}, {}, "norm_eps is 0.001 in its config; only 1e-05 can be computed here"),
        (
            {"_class_name": "PixArtTransformer2DModel"},
            {},
            "is an PixArt.*; .* DiTTransformer2DModel can be read here",
        ),
        ({}, {"num_heads": 2}, "num_heads: .* states that it was trained with 4, not 2"),
        ({}, {"self_conditioned": False}, r"self_conditioned: blocks\.1\.\S+ differs from block 0's"),
    ],
)
def test_a_configuration_of_another_network_is_named(tmp_path: Path, change, settings, message) -> None:
    diffusers_network().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        import_checkpoint(tmp_path, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("widened", [False, True])
def test_other_precisions_are_widened_and_the_position_table_is_ours(tmp_path: Path, dtype, widened: bool) -> None:
    """Also where a half-precision file was written as float32 again."""
    model = network(DIT)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    torch.save({name: tensor.float() if widened else tensor for name, tensor in state.items()}, tmp_path / "c.pt")
    imported, report = import_checkpoint(tmp_path / "c.pt", num_heads=4)
    assert report.complete
    assert torch.equal(imported.pos_embed, model.pos_embed)
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in imported.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("change", ["shifted", "scaled", "transposed"])
def test_a_position_table_that_is_off_by_more_than_its_rounding_is_refused(tmp_path: Path, dtype, change: str) -> None:
    state = network(DIT).state_dict()
    table = state["pos_embed"]
    other = {
        "shifted": table + 16 * torch.finfo(dtype).eps,
        "scaled": table * (1 + 16 * torch.finfo(dtype).eps),
        "transposed": table.roll(16, dims=2),
    }[change]
    torch.save({**state, "pos_embed": other.to(dtype)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="1 mismatched: pos_embed"):
        import_checkpoint(tmp_path / "c.pt", num_heads=4)


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


OTHER = {"vae.conv.weight": torch.zeros(2, 2), "loss.scale": torch.zeros(1)}
WRAPPED = {
    "bare": lambda ema, raw: ema,
    "ema and model": lambda ema, raw: {"ema": ema, "model": raw, "opt": {}},
    "model_ema and model": lambda ema, raw: {"model_ema": ema, "model": raw, "epoch": 3},
    "ema_state_dict": lambda ema, raw: {"ema_state_dict": ema, "model_state_dict": raw},
    "timm": lambda ema, raw: {"state_dict": raw, "state_dict_ema": ema, "arch": "dit"},
    "state_dict": lambda ema, raw: {"state_dict": ema, "epoch": 3},
    "nested": lambda ema, raw: {"checkpoint": {"ema": {"state_dict": prefixed("module.", ema)}, "model": raw}},
    "ema of a module": lambda ema, raw: {"ema": {"module": ema}, "model": {"module": raw}},
    "lightning": lambda ema, raw: {"state_dict": prefixed("model.", ema) | OTHER, "pytorch-lightning_version": "2"},
    "lightning net": lambda ema, raw: {"state_dict": prefixed("net._orig_mod.", ema)},
    "lightning both": lambda ema, raw: {"state_dict": prefixed("ema.", ema) | prefixed("model.", raw) | OTHER},
    "ema-pytorch": lambda ema, raw: prefixed("ema_model.", ema) | prefixed("online_model.", raw),
    "compiled blocks": lambda ema, raw: {name.replace(".attn.", "._orig_mod.attn."): ema[name] for name in ema},
    "wrapped twice": lambda ema, raw: {"ema": prefixed("_orig_mod.module.", ema)},
}


@pytest.mark.parametrize("config", [DIT, FPDM], ids=["dit", "fpdm"])
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_and_prefixes_in_any_nesting_are_taken_off(tmp_path: Path, name: str, config: DenoiserConfig) -> None:
    ema, raw = network(config), build_denoiser(config, seed=5)
    content = WRAPPED[name](dict(ema.state_dict()), dict(raw.state_dict()))
    torch.save(content, tmp_path / "c.pt")
    settings = {"num_heads": 4} | ({"pre_post_timestep_conditioning": False} if config.kind == "fpdm" else {})
    imported, report = import_checkpoint(tmp_path / "c.pt", **settings)
    assert same(imported, ema)
    assert ("left out" in str(report)) == (name in ("lightning", "lightning both", "ema-pytorch"))
    if {"ema and model", "lightning both", "timm", "ema of a module", "nested"} & {name}:
        assert same(import_checkpoint(tmp_path / "c.pt", weights="model", **settings)[0], raw)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda state: {"model": state}, "weights: .* holds no 'ema'; it holds model; choose 'model' instead"),
        (lambda state: {"state_dict": state, "ema_weights": [state]}, "keeps averages as 'ema_weights', which is not"),
        (
            lambda state: prefixed("model.", state) | {"model_ema.xembedder": torch.zeros(1)},
            "keeps averages as 'model_ema.xembedder', which is not read; choose 'model' instead",
        ),
        (lambda state: prefixed("a.", state) | prefixed("b.", state), "holds networks under 'a.', 'b.': keep the one"),
        (lambda state: prefixed("module.", state) | state, "tensor 'pos_embed' is duplicated"),
        (lambda state: {"shadow_params": list(state.values()), "decay": 0.1}, "no state dict, .* holds shadow_params"),
        (lambda state: {"state_dict": {}}, "no state dict, tensors by name"),
        (lambda state: state | {"blocks.999999999.attn.qkv.bias": torch.zeros(1)}, "block blocks.2 is missing, but"),
        (lambda state: state | {f"blocks.{'9' * 9999}.x": torch.zeros(1)}, "block blocks.2 is missing, but blocks.999"),
    ],
)  # fmt: skip
def test_files_without_exactly_one_network_are_one_line(tmp_path: Path, content, message: str) -> None:
    torch.save(content(dict(network(DIT).state_dict())), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=message) as caught:
        import_checkpoint(tmp_path / "c.pt", num_heads=4)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_block_number_beyond_all_bounds_makes_no_blocks(tmp_path: Path) -> None:
    state = {**network(FPDM).state_dict(), "blocks_pre.999999999.attn.qkv.bias": torch.zeros(96)}
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"block blocks_pre\.1 is missing, but blocks_pre\.999999999 is there"):
        import_checkpoint(tmp_path / "c.pt", num_heads=4, pre_post_timestep_conditioning=False)
    with pytest.raises(ValueError, match="depth: 999999999 blocks; at most 1000"):
        DenoiserConfig(kind="dit", depth=999999999)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"num_attention_heads": ' + "9" * 5000 + "}", '{"_class_name": "\\u001b[2J"}', "\xff", "1"]
)
def test_a_configuration_that_is_none_is_one_short_line(tmp_path: Path, text: str) -> None:
    diffusers_network().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        import_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_tensors_of_no_dimensions_where_three_are_put_together_are_one_line(tmp_path: Path) -> None:
    scalars = {f"transformer_blocks.0.attn1.to_{part}.weight": torch.zeros(()) for part in "qkv"}
    torch.save({**diffusers_network().state_dict(), **scalars}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: not a supported DiT or FPDM checkpoint \(RuntimeError: zero"):
        import_checkpoint(tmp_path / "c.pt", num_heads=4)


def test_names_of_tensors_in_a_report_are_printable_and_short(tmp_path: Path) -> None:
    left_out = {"\x1b[2J" + "x" * 10**5: torch.zeros(1)}
    torch.save(prefixed("m.", network(DIT).state_dict()) | left_out, tmp_path / "c.pt")
    report = str(import_checkpoint(tmp_path / "c.pt", num_heads=4)[1])
    assert "1 left out: \\x1b[2Jxxx" in report
    assert report.isprintable()
    assert len(report) < 400


def test_a_wrapper_that_holds_itself_is_no_checkpoint(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["ema"] = content
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="no state dict"):
        import_checkpoint(tmp_path / "c.pt")


INERT = {
    "path": pathlib.Path("/results/run"),
    "pure path": pathlib.PureWindowsPath("C:\\runs"),
    "numpy scalars": [np.float32(0.5), np.float64(0.5), np.int64(3), np.bool_(True), np.uint8(7)],
    "numpy arrays": (np.arange(3), np.zeros((2, 2), dtype=np.float32)),
    "random state": np.random.RandomState(0).get_state(),
    "dates": [datetime.datetime.now(datetime.UTC), datetime.date(2024, 1, 1), datetime.timedelta(seconds=3)],
    "namespace": argparse.Namespace(lr=1e-4, out=pathlib.Path("x"), when=datetime.time(3)),
    "simple namespace": types.SimpleNamespace(a=1),
    "collections": [collections.defaultdict(list, a=[1]), collections.OrderedDict(a=1), collections.deque([1])],
    "torch": [torch.device("cpu"), torch.float16, torch.Size([1, 2])],
    "plain": {"a": {1, 2}, "b": complex(1, 2), "c": b"bytes", "d": None, "e": (1, "x")},
}


@pytest.mark.parametrize("name", INERT)
def test_values_beside_the_tensors_do_not_matter(tmp_path: Path, name: str) -> None:
    model = network(DIT)
    torch.save({"ema": model.state_dict(), "args": INERT[name], "more": [INERT[name]]}, tmp_path / "c.pt")
    assert same(import_checkpoint(tmp_path / "c.pt", num_heads=4)[0], model)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray", "pathlib", "pathlib._local"])
def test_values_as_other_versions_write_them_do_not_matter(tmp_path: Path, module: str) -> None:
    """numpy 1 and 2 pickle the same function by two names; so does Python 3.13 for paths."""
    model, path = network(DIT), tmp_path / "c.pt"
    value = pathlib.Path("x") if module.startswith("pathlib") else np.float64(0.5)
    here = value.__reduce__()[0].__module__
    torch.save({"ema": model.state_dict(), "best": value}, path, _use_new_zipfile_serialization=False)
    written = f"c{here}\n".encode()
    assert written in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(written, f"c{module}\n".encode()))
    assert same(import_checkpoint(path, num_heads=4)[0], model)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda path: Call(os.system, f"touch '{path}'"), "system"),
        (lambda path: Call(touch, path), "touch"),
        (lambda path: Call(eval, f"open({path!r}, 'w')"), "eval"),
        (lambda path: Call(open, path, "w"), "open"),
        (lambda path: Call(getattr, pathlib.Path(path), "touch"), "getattr"),
        (lambda path: Call(pathlib.Path.touch, pathlib.Path(path)), "(getattr|touch)"),
        (lambda path: Call(np.save, path, 1), "save"),
        (lambda path: torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (lambda path: network(DIT), r"fpdm\.denoiser\.Denoiser"),
    ],
)
def test_files_that_would_run_code_are_refused_and_nothing_runs(tmp_path: Path, make, name: str) -> None:
    marker = tmp_path / "it ran"
    torch.save({"ema": network(DIT).state_dict(), "args": make(str(marker))}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=rf"loading it would run \S*{name}; give a .safetensors file, or") as caught:
        import_checkpoint(tmp_path / "c.pt", num_heads=4)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to(torch.int64), "is int64"),
        (lambda tensor: tensor.to(torch.complex64), "is complex64"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "is float8_e4m3fn"),
        (lambda tensor: tensor.to_sparse(), "is sparse_coo"),
        (lambda tensor: tensor.to_sparse_csr(), "is sparse_csr"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "is a quantized tensor"),
        (lambda tensor: tensor.to("meta"), r"holds no numbers \(meta\)"),
        (lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[1][:3]]), "is nested"),
        (lambda tensor: torch.zeros(1).expand(10**12, 32), "claims 32,000,000,000,000 numbers, and holds fewer"),
    ],
)
def test_tensors_that_are_no_weights_are_refused_by_name(tmp_path: Path, change, message: str) -> None:
    state = dict(network(DIT).state_dict())
    state["final_layer.linear.weight"] = change(state["final_layer.linear.weight"])
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=rf"tensor 'final_layer\.linear\.weight' {message}; save it as dense float32"):
        import_checkpoint(tmp_path / "c.pt", num_heads=4)


@pytest.mark.parametrize(
    "options",
    [
        {"rope": True, "norm": "rms", "qk_norm": True, "value_residual": True, "injection": "decay"},
        {"mlp": "swiglu", "hidden_size": 48, "mlp_ratio": 3.0},
    ],
)
def test_our_own_folders_are_imported_with_every_option_of_their_network(tmp_path, options):
    config = DenoiserConfig(**{"input_size": 8, "hidden_size": 32, "num_heads": 2, "num_classes": 3, **options})
    model = build_denoiser(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * rng.normal(0, name, torch.arange(len(parameter)), tuple(parameter.shape[1:])))
    save_pretrained(dict(model.named_parameters()), config, tmp_path / "weights", {"objective": {}})
    imported, report = import_checkpoint(tmp_path / "weights")
    assert report.complete
    assert imported.config == config
    x, t, y = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([3, 700]),
        torch.tensor([0, 3]),
    )
    assert torch.equal(imported(x, t, y, iterations=2).output, model(x, t, y, iterations=2).output)
