"""A diffusers pipeline: the denoiser, a diffusers autoencoder and this project's sampler.

from fpdm.pipeline_hf import FPDMPipeline
pipeline = FPDMPipeline.from_pretrained("runs/demo/pipeline")
pipeline([0, 1, 2, 3], num_inference_steps=20, iterations=5).images
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from fpdm.allocation import AllocationKind, allocate
from fpdm.denoiser import Denoiser
from fpdm.diffusion import Diffusion
from fpdm.latents import unscale_latents
from fpdm.samplers import SamplerName, SamplerSettings, adds_noise
from fpdm.sampling import sample, sample_noise
from fpdm.weights import load_pretrained, read_extra, save_pretrained


class FPDMTransformer2DModel(ModelMixin):
    """A denoiser and the diffusion it was trained for, as a component of diffusers' pipelines.

    `label_dropout` is the share of labels that training replaced by the null label; None if unknown.
    """

    def __init__(self, denoiser: Denoiser, diffusion: Diffusion, label_dropout: float | None = None) -> None:
        super().__init__()
        self.denoiser, self.diffusion, self.label_dropout = denoiser, diffusion, label_dropout

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **_: Any
    ) -> "FPDMTransformer2DModel":
        """Loads a folder written by training or by `save_pretrained`.

        Raises ValueError if config.json has no objective or the tensors do not fit it.
        """
        extra = read_extra(folder)
        if (objective := extra.get("objective")) is None:
            raise ValueError(
                f"{folder}: config.json has no extra.objective (what the weights predict); export the weights again"
            )
        denoiser = load_pretrained(folder).to(torch_dtype or torch.float32).eval()
        try:
            return cls(denoiser, Diffusion(**objective), extra.get("label_dropout"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: config.json: extra.objective: {error}") from error

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Weights, config and what they predict, as `fpdm.save_pretrained` writes them."""
        state = dict(self.denoiser.named_parameters())
        known = {} if self.label_dropout is None else {"label_dropout": self.label_dropout}
        extra = {"objective": vars(self.diffusion), **known}
        save_pretrained(state, self.denoiser.config, save_directory, extra)


class FPDMPipeline(DiffusionPipeline):
    """Class labels to images. Raises ValueError for an autoencoder that scales each channel separately."""

    def __init__(
        self, transformer: FPDMTransformer2DModel, vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC
    ) -> None:
        super().__init__()
        if vae.config.get("latents_mean") is not None or vae.config.get("latents_std") is not None:
            raise ValueError(
                "vae: per-channel scaling (latents_mean, latents_std) is not supported; use a VAE with one factor"
            )
        self.register_modules(transformer=transformer, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor,
        *,
        num_inference_steps: int = 28,
        iterations: int | float | Sequence[int] = 8,
        allocation: AllocationKind = "constant",
        sampler: SamplerName = "ddpm",
        sampler_settings: SamplerSettings | None = None,
        reuse: bool | Sequence[bool] = True,
        start_extrapolation: float = 0.0,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        seed: int = 0,
        first_index: int = 0,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draws one image per label.

        Args:
            class_labels: (B,) classes.
            num_inference_steps: steps of the sampler.
            iterations, allocation: fixed point iterations, as in `fpdm.allocate`; ignored for DiT.
            sampler, sampler_settings, reuse, start_extrapolation, guidance_scale, guidance_rescale: as in
                `fpdm.sample`.
            seed, first_index: image i of the batch starts from the noise of sample first_index + i, so it equals the
                sample of that index from `pipeline/sample.py`, whatever the batch size.
            output_type: "pil", "np" or "pt".

        Raises:
            ValueError: as `fpdm.sample` and `fpdm.allocate`; for guidance of a network trained without the null label.
        """
        transformer, vae = cast(FPDMTransformer2DModel, self.transformer), cast(AutoencoderKL, self.vae)
        if guidance_scale != 1 and transformer.label_dropout == 0:
            raise ValueError(
                f"guidance_scale: {guidance_scale:g}, but these weights were trained with label_dropout 0 and never "
                "saw the null label that guidance needs; leave it at 1"
            )
        config = transformer.denoiser.config
        labels = torch.as_tensor(class_labels, device=self._execution_device)
        index = torch.arange(first_index, first_index + len(labels), device=labels.device)
        shape = (config.in_channels, config.input_size, config.input_size)
        counts = None if config.kind == "dit" else allocate(allocation, num_inference_steps, iterations)
        latents = sample(
            transformer.denoiser,
            transformer.diffusion,
            sample_noise(seed, index, shape),
            labels,
            num_steps=num_inference_steps,
            iterations=counts,
            sampler=sampler,
            sampler_settings=sampler_settings,
            step_noise=(lambda step: sample_noise(seed, index, shape, step))
            if adds_noise(sampler, sampler_settings)
            else None,
            reuse=reuse,
            start_extrapolation=start_extrapolation,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
        )  # (B, C, h, w)
        latents = unscale_latents(latents, vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0)
        images = vae.decode(latents.to(vae.dtype)).sample.float()  # (B, 3, H, W)
        return ImagePipelineOutput(VaeImageProcessor().postprocess(images, output_type))
