"""The denoiser as a model of diffusers, a component of its pipelines."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from fpdm.config import DenoiserConfig
from fpdm.denoiser import Denoised, Denoiser, build_denoiser
from fpdm.diffusers_folders import local_folder
from fpdm.diffusion import Diffusion
from fpdm.fixed_point import Solver
from fpdm.weights import load_pretrained, read_extra, save_pretrained

ITERATIONS = 8  # of a call that names none: the paper's mean


@dataclass
class FPDMTransformer2DModelOutput(BaseOutput):
    """sample (B, C or 2C, H, W), solution (B, T, D), residuals, intermediate: as of `fpdm.denoiser.Denoised`."""

    sample: Tensor
    solution: Tensor | None = None
    residuals: Tensor | None = None
    intermediate: Tensor | None = None


class FPDMTransformer2DModel(ModelMixin, ConfigMixin):
    """A denoiser and the diffusion it was trained for.

    `config` holds the fields of `DenoiserConfig`, `sample_size` and `out_channels` as diffusers names them, and
    `extra`: `objective`, the fields of `Diffusion`, and `label_dropout`, the share of labels that training replaced by
    the null label, where it is known.
    """

    config_name = "config.json"  # type: ignore[assignment]

    def __init__(self, denoiser: Denoiser, diffusion: Diffusion, label_dropout: float | None = None) -> None:
        super().__init__()
        self.denoiser, self.diffusion, self.label_dropout = denoiser, diffusion, label_dropout
        network = denoiser.config
        named = {"sample_size": network.input_size, "out_channels": network.out_channels}
        self.register_to_config(**asdict(network), **named, extra=self._extra())

    def _extra(self) -> dict[str, Any]:
        known = {} if self.label_dropout is None else {"label_dropout": self.label_dropout}
        return {"objective": asdict(self.diffusion), **known}

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Mapping[str, Any], *, seed: int = 0, **changes: Any
    ) -> "FPDMTransformer2DModel":
        """An untrained network by `transformer.config`, or by its config.json; the weights are a function of the seed.

        Raises ValueError naming the field that is impossible or unknown.
        """
        values = {**config, **changes}
        allowed = {field.name for field in fields(DenoiserConfig)}
        if unknown := sorted(set(changes) - allowed - {"extra"}):
            raise ValueError(f"{unknown[0]}: no setting of the network; these are {', '.join(sorted(allowed))}")
        network = DenoiserConfig(**{name: value for name, value in values.items() if name in allowed})
        return cls(build_denoiser(network, seed=seed), *_trained_for(values.get("extra", {}), "config"))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        *,
        subfolder: str = "",
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> "FPDMTransformer2DModel":
        """Loads what training or `save_pretrained` wrote: a folder, or a repository of the hub.

        Args:
            folder, subfolder: where config.json lies.
            variant: such as "fp16": other weights of the folder.
            torch_dtype, dtype: of the parameters; float32 by default.
            others: of the hub, as `revision`. What diffusers passes to all models about memory is not needed.

        Raises:
            ValueError: if config.json has no objective, if a file is not as it was written, or for a device map or
                quantisation.
        """
        for name in ("device_map", "quantization_config"):
            if others.get(name) is not None:
                raise ValueError(f"{name}: not supported for this network; leave it out, and call .to(device)")
        place = local_folder(folder, others) / subfolder
        trained_for = _trained_for(read_extra(place), f"{place}: config.json")
        return cls(load_pretrained(place, variant).to(torch_dtype or dtype or torch.float32).eval(), *trained_for)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, variant: str | None = None, **_: Any
    ) -> None:
        """Weights, config and what they predict, as `fpdm.save_pretrained` writes them."""
        state = dict(self.denoiser.named_parameters())
        save_pretrained(state, self.denoiser.config, save_directory, self._extra(), variant)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        *,
        iterations: int | None = None,
        start: Tensor | None = None,
        solver: Solver = "picard",
        relaxation: float | Tensor | None = None,
        tolerance: float | None = None,
        with_residuals: bool = False,
        activation_checkpointing: bool = False,
        intermediate: int = 0,
        return_dict: bool = True,
    ) -> FPDMTransformer2DModelOutput | tuple[Tensor | None, ...]:
        """The network's prediction, of the kind `diffusion.prediction`.

        Args:
            hidden_states: (B, C, H, W) noised latents.
            timestep: (B,) timesteps.
            class_labels: (B,) classes, num_classes being the null label; or vectors (B, condition_dim).
            iterations: FPDM: 8 by default.
            start, solver, relaxation, tolerance, with_residuals, activation_checkpointing, intermediate: as in
                `fpdm.denoiser.Denoiser.forward`.
            return_dict: False for a tuple of the same.
        """
        denoised: Denoised = self.denoiser(
            hidden_states,
            timestep,
            class_labels,
            iterations=ITERATIONS if iterations is None else iterations,
            start=start,
            solver=solver,
            relaxation=relaxation,
            tolerance=tolerance,
            with_residuals=with_residuals,
            activation_checkpointing=activation_checkpointing,
            intermediate=intermediate,
        )
        answer = denoised[:4]  # the rest is for training
        return FPDMTransformer2DModelOutput(*answer) if return_dict else answer


def _trained_for(extra: Mapping[str, Any], place: str) -> tuple[Diffusion, float | None]:
    """The process, and the share of null labels, if known."""
    if (objective := extra.get("objective")) is None:
        raise ValueError(f"{place} has no extra.objective (what the weights predict); export the weights again")
    try:
        return Diffusion(**objective), extra.get("label_dropout")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: extra.objective: {error}") from error


class CalledByModule:
    """A transformer as `fpdm.sample` calls a network: through the module, whose hooks bring offloaded weights."""

    def __init__(self, transformer: FPDMTransformer2DModel) -> None:
        self.config: DenoiserConfig = transformer.denoiser.config
        self._transformer = transformer

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, **settings: Any) -> Denoised:
        """(B, C, H, W), (B,) and (B,) as `Denoiser.forward`."""
        return Denoised(*self._transformer(x, t, y, return_dict=False, **settings))
