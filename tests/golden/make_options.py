"""Write the vectors of this project's own network options, one small network each: tests/golden/options/*.safetensors.

    python tests/golden/make_options.py

They hold the options as they were when the files were made; `compare.py` reads them as it does the published ones. Make
them anew only where an option is meant to compute something else.
"""

from pathlib import Path

import torch
from compare import OPTIONS, gradients
from safetensors.torch import save_file

from fpdm import DenoiserConfig, build_denoiser, rng

FOLDER = Path(__file__).parent / "options"
SIZES = {"hidden_size": 16, "num_heads": 2, "input_size": 4, "patch_size": 2, "in_channels": 4, "num_classes": 3}


def write(option: str, value: str) -> None:
    config = DenoiserConfig(**SIZES, learned_variance=False, **{option: OPTIONS[option](value)})
    model = build_denoiser(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = torch.arange(len(parameter))
            parameter.add_(0.1 * rng.normal(0, name, rows, tuple(parameter.shape[1:])))  # none is left at zero
    index, shape = torch.arange(4), (4, 4, 4)
    entries = {f"param.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    entries |= {
        "in.x": rng.normal(0, "x", index, shape),
        "in.t": torch.tensor([0, 300, 650, 999]),
        "in.y": torch.tensor([0, 1, 2, 3]),
        "in.grad_target": rng.normal(0, "target", index, shape),
    }
    with torch.no_grad():
        for count in (1, 4):
            inputs = (entries[f"in.{name}"] for name in ("x", "t", "y"))
            entries[f"out.eval.k{count}"] = model(*inputs, iterations=count).output
    entries |= dict(gradients(model, entries))
    metadata = {name: str(number) for name, number in SIZES.items()}
    metadata |= {"depth": "", "pre_depth": "1", "post_depth": "1", "mlp_ratio": "4.0", "learn_sigma": "False"}
    metadata |= {"pre_post_timestep_conditioning": "False", option: value}
    FOLDER.mkdir(exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in entries.items()}
    save_file(tensors, FOLDER / f"{option}.safetensors", metadata=metadata)


if __name__ == "__main__":
    for option, value in {
        **{"norm": "rms", "qk_norm": "True", "rope": "True"},
        **{"mlp": "swiglu", "value_residual": "True", "injection": "decay"},
    }.items():
        write(option, value)
