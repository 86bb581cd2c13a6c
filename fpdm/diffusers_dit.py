"""DiT in diffusers' names (DiTTransformer2DModel): its settings, and its tensors under the names of the paper's code.

diffusers gives each block an embedder of timesteps and labels; the paper's code has one. Where all blocks hold the same
one, the network is the paper's, converted, as facebook/DiT-XL-2-256 is. It is then computed as the paper's code does,
which is how it was trained: diffusers itself spaces the timesteps' frequencies and one epsilon otherwise.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpdm.diffusers_folders import read_configuration

CLASS = "DiTTransformer2DModel"
# What the network here computes; with other values it would be another function.
_COMPUTED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
    "norm_type": "ada_norm_zero",
}
_NAMES = (
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"pos_embed\.pos_embed$", "pos_embed"),
    (r"transformer_blocks\.(\d+)\.norm1\.emb\.timestep_embedder\.linear_1\.", r"blocks.\1.t_embedder.mlp.0."),
    (r"transformer_blocks\.(\d+)\.norm1\.emb\.timestep_embedder\.linear_2\.", r"blocks.\1.t_embedder.mlp.2."),
    (r"transformer_blocks\.(\d+)\.norm1\.emb\.class_embedder\.", r"blocks.\1.y_embedder."),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])\.", r"blocks.\1.attn.\2."),  # put together below
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"proj_out_2\.", "final_layer.linear."),
)
_EMBEDDER = re.compile(r"blocks\.0\.([ty]_embedder\..*)")
_OTHER_EMBEDDER = re.compile(r"blocks\.\d+\.([ty]_embedder\..*)")


def read_settings(folder: Path) -> dict[str, Any]:
    """What config.json says that the tensors' shapes do not. Raises ValueError where it says another network."""
    _, stated = read_configuration(folder, (CLASS,))
    for name, value in _COMPUTED.items():
        if stated[name] != value:
            raise ValueError(f"{folder}: {name} is {stated[name]!r} in its config; only {value!r} can be computed here")
    return {"num_heads": stated["num_attention_heads"], "input_size": stated["sample_size"]}


def is_named_so(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors (by name) have diffusers' names."""
    return any(name.startswith(("transformer_blocks.", "proj_out_")) for name in tensors)


def rename(tensors: Mapping[str, Tensor], self_conditioned: bool | None = None) -> dict[str, Tensor]:
    """The same tensors under the names of `fpdm.Denoiser`; a name that is none of diffusers' is left as it is.

    Args:
        tensors: by diffusers' names.
        self_conditioned: as in DenoiserConfig; None: unless all blocks hold the same embedder.

    Raises:
        ValueError: where the embedders differ and must not.
    """
    named = {_renamed(name): tensor for name, tensor in tensors.items()}
    for first in [name for name in named if name.endswith((".attn.q.weight", ".attn.q.bias"))]:
        parts = [first.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(name in named and named[name].shape == named[first].shape for name in parts):
            named[first.replace(".attn.q.", ".attn.qkv.")] = torch.cat([named[name] for name in parts])
            for name in parts:
                del named[name]
    if self_conditioned:
        return named
    shared = {match[1]: tensor for name, tensor in named.items() if (match := _EMBEDDER.fullmatch(name))}
    owners = {name: match[1] for name in named if (match := _OTHER_EMBEDDER.fullmatch(name))}
    for name, part in owners.items():
        if part not in shared or not torch.equal(named[name], shared[part]):
            if self_conditioned is None:
                return named
            raise ValueError(f"self_conditioned: {name} differs from block 0's, so that it must be True")
    return {name: tensor for name, tensor in named.items() if name not in owners} | shared


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name)
    return name
