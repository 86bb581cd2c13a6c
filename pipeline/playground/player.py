"""Draws one image of an exported pipeline step by step, and tells after each what the network takes it to be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from common.ranks import own_device, share_cores
from fpdm.call_settings import CallSettings
from fpdm.denoiser import Denoised
from fpdm.diffusion import Diffusion
from fpdm.pipeline_hf import FPDMPipeline
from fpdm.samplers import Sampler
from fpdm.sampling import sample, sample_noise


@dataclass(frozen=True)
class Progress:
    """After a step: the image so far, and how its fixed point was reached."""

    step: int  # from 1
    steps: int
    timestep: float
    image: NDArray[np.uint8]  # (H, W, 3)
    residuals: list[float]  # of each iteration of this step, relative; none of a DiT
    blocks: int  # of the image up to this step


class Player:
    """An export, loaded once. It draws without noise in the steps, so that any number of them comes to the same image;
    ddpm alone has noise by nature. For the same reason multistep takes the place of a sampler fitted to its own steps.

    Raises UserError where the folder holds none.
    """

    def __init__(self, folder: Path) -> None:
        share_cores()
        try:
            self.pipeline = FPDMPipeline.from_pretrained(folder).to(own_device(), torch.float32)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: not as pipeline/export.py writes it: {error}; run that again") from None
        self.network = self.pipeline.transformer.denoiser.config
        self.settings = CallSettings.stored(self.pipeline.config["sampling"])
        self.scheduler = self.pipeline.scheduler.changed(eta=0.0)
        if self.scheduler.sampler == "fitted":
            self.settings, self.scheduler = self.settings.unfitted(), self.scheduler.changed("multistep")

    @property
    def class_names(self) -> dict[int, str]:
        """Of every class, by number."""
        named = {number: name for name, number in self.pipeline.labels.items()}
        return {number: named.get(number, f"class {number}") for number in range(self.network.num_classes)}

    def draw(self, label: int, seed: int, given: Mapping[str, Any], show: Callable[[Progress], None]) -> None:
        """Sample 0 of the seed. What `show` raises ends it.

        given: fields of `CallSettings` in place of the export's. Raises ValueError where they do not go together.
        """
        pipeline, blocks = self.pipeline, 0
        device, process = pipeline.device, pipeline.transformer.diffusion
        # As many iterations as are asked for, whatever the export does.
        fixed = {} if self.network.kind == "dit" else {"tolerance": 0.0, "solver": "picard"}
        settings = self.settings.changed(self.network, {**given, **fixed}, None)
        pipeline.check_guidance(settings)
        num_steps = settings.num_inference_steps
        counts = settings.counts(self.network, num_steps, None, given)
        sampler = self.scheduler.build(num_steps)
        index = torch.zeros(1, dtype=torch.int64, device=device)
        shape = (self.network.in_channels, self.network.input_size, self.network.input_size)
        last: Denoised

        def keep(_step: int, denoised: Denoised) -> None:
            nonlocal last
            last = denoised

        def show_step(step: int, clean: Tensor) -> None:
            nonlocal blocks
            each = self.network.blocks(counts[step] if counts else 0)
            each += self.network.post_depth * (last.intermediate is not None)
            blocks += each * len(last.output)  # guidance computes both halves
            residuals = [] if last.residuals is None else last.residuals[0].tolist()
            timestep = sampler.timesteps[step]
            show(Progress(step + 1, num_steps, timestep, self._image(clean), residuals, blocks))

        sample(
            pipeline.transformer.denoiser,
            process,
            sample_noise(seed, index, shape),
            torch.tensor([label], device=device),
            num_steps=num_steps,
            iterations=counts,
            sampler=Watched(sampler, process, show_step),
            step_noise=(lambda step: sample_noise(seed, index, shape, step)) if self.scheduler.adds_noise else None,
            **settings.passed_on(),
            with_residuals=counts is not None,
            on_step=keep,
        )

    def _image(self, latents: Tensor) -> NDArray[np.uint8]:
        """(1, C, h, w) -> (H, W, 3)."""
        return np.asarray(self.pipeline.decode_latents(latents, "pil", self.settings.rounding)[0])


class Watched:
    """A sampler that tells each step's prediction of the clean latents."""

    def __init__(self, sampler: Sampler, process: Diffusion, tell: Callable[[int, Tensor], None]) -> None:
        self.timesteps = sampler.timesteps
        self._sampler, self._process, self._tell = sampler, process, tell

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """See `Sampler.step`: (B, C, H, W)."""
        self._tell(i, self._process.clean(output, x, torch.full((len(x),), self.timesteps[i], device=x.device)))
        return self._sampler.step(i, output, x, noise)
