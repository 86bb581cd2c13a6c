"""A diffusers pipeline: the denoiser, a diffusers autoencoder and this project's sampler.

from fpdm.pipeline_hf import FPDMPipeline
pipeline = FPDMPipeline.from_pretrained("runs/demo/pipeline")
pipeline(["cat", "robot"], generator=torch.manual_seed(0)).images
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderDC, AutoencoderKL, AutoencoderRAE, AutoencoderTiny
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fpdm import autoencoders
from fpdm.allocation import AllocationKind
from fpdm.call_settings import FITTED_WITH, CallSettings, setting_names
from fpdm.class_names import ClassNames
from fpdm.diffusers_folders import local_folder, write_code
from fpdm.fixed_point import Solver
from fpdm.latents import Rounding, to_uint8, unscale_latents
from fpdm.samplers import SamplerName, Spacing, Variance
from fpdm.sampling import sample, sample_noise
from fpdm.scheduler_hf import ForeignSampler, FPDMScheduler, Generators, OwnSampler
from fpdm.single_file import pipeline_source
from fpdm.transformer_hf import CalledByModule, FPDMTransformer2DModel

OUTPUTS = ("pil", "np", "pt", "latent")
OWN_CLASSES: dict[str, type] = {"FPDMTransformer2DModel": FPDMTransformer2DModel, "FPDMScheduler": FPDMScheduler}
SETTINGS = ("spacing", "spacing_power", "eta", "order", "variance")  # of this project's samplers


class _Interrupted(Exception):
    """A callback asked to stop."""


class _Followed:
    """A sampler that reports each step to the progress bar and to a callback."""

    def __init__(self, pipeline: "FPDMPipeline", sampler: OwnSampler | ForeignSampler, bar: Any, callback: Any) -> None:
        self.timesteps = sampler.timesteps
        self._pipeline, self._sampler, self._bar, self._callback = pipeline, sampler, bar, callback

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """See `fpdm.samplers.Sampler.step`: (B, C, H, W)."""
        sampler = self._sampler
        x = sampler.step(i, output, x, noise)
        self._bar.update()
        if self._callback is not None:
            state = {"latents": sampler.latents}
            returned = self._callback(self._pipeline, i, torch.tensor(self.timesteps[i]), state) or {}
            if "latents" in returned:  # perhaps the same tensor, changed in place
                x = sampler.resume(i, returned["latents"])
        if self._pipeline.interrupt:
            raise _Interrupted
        return x


class FPDMPipeline(DiffusionPipeline):
    """Class labels to images.

    Args:
        transformer: an `FPDMTransformer2DModel`.
        vae: an autoencoder with one scaling factor, or an AutoencoderRAE, which scales by itself; others raise
            ValueError. None: latents are images in [-1, 1].
        scheduler: an `FPDMScheduler`, or one of diffusers' in its place. None: the sampler of the paper.
        id2label: dictionary of the classes' names by number; several of one class are separated by commas.
        sampling: dictionary of what a call does that says nothing else, of the fields of
            `fpdm.call_settings.CallSettings`.
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]
    _callback_tensor_inputs = ("latents",)
    _optional_components = ["vae", "scheduler"]  # noqa: RUF012 # as diffusers reads it; exports of version 0.1 have none

    def __init__(
        self,
        transformer: "FPDMTransformer2DModel | ModelMixin",  # read when it is asked for: diffusers loads classes anew
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | AutoencoderRAE | None,
        scheduler: Any,
        id2label: Any = None,
        sampling: Any = None,
    ) -> None:
        super().__init__()
        if vae is not None:
            self._check_autoencoder(vae.config)
        if scheduler is None:
            scheduler = FPDMScheduler(transformer.diffusion, "flow_euler" if transformer.diffusion.is_flow else "ddpm")
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        if vae is not None:  # as the project decodes: else some pixels round otherwise
            cast(Any, vae).to(memory_format=torch.channels_last)
        self._classes = ClassNames(transformer.denoiser.config, id2label or {})
        self._defaults, self._interrupt = CallSettings.stored(sampling), False
        self.register_to_config(id2label=self._classes.by_number, sampling=asdict(self._defaults))

    @staticmethod
    def _check_autoencoder(config: Any) -> None:
        try:
            autoencoders.scaling(config)
        except ValueError as error:
            raise ValueError(f"vae: {error}") from None

    @classmethod
    def from_pretrained(cls, folder: str | Path, **arguments: Any) -> Any:  # type: ignore[override]
        """Loads a folder or a repository of the hub with this class; the code that it holds is not run.

        Arguments and errors as diffusers'.
        """
        return super().from_pretrained(local_folder(folder, arguments), **arguments)

    @classmethod
    def load_config(cls, *arguments: Any, **settings: Any) -> Any:
        """What model_index.json says, with the classes of this project in the place of the code beside it."""
        loaded = super().load_config(*arguments, **settings)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        index["_class_name"] = cls.__name__
        for name, value in index.items():
            if isinstance(value, list) and (own := OWN_CLASSES.get(value[-1])):
                index[name] = [own.__module__, value[-1]]
        return loaded

    def save_config(self, save_directory: str | Path) -> None:  # type: ignore[override]
        """model_index.json, and the code by which the folder loads where this project is not installed."""
        super().save_config(save_directory)
        write_code(Path(save_directory), pipeline_source(), list(OWN_CLASSES))

    @property
    def labels(self) -> dict[str, int]:
        """Class names and their numbers."""
        return self._classes.numbers

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The numbers of class names. Raises ValueError naming what there is."""
        return [self._classes.number(name) for name in ([label] if isinstance(label, str) else label)]

    def enable_vae_slicing(self) -> None:
        """Decodes one image at a time: less memory."""
        if self.vae is not None:
            self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decodes all images at once."""
        if self.vae is not None:
            self.vae.disable_slicing()

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop after this step, by `pipeline._interrupt = True`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        guidance_scale: float | None = None,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        latents: Tensor | None = None,
        seed: int | None = None,
        first_index: int = 0,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        sampler: SamplerName | None = None,
        spacing: Spacing | None = None,
        spacing_power: float | None = None,
        eta: float | None = None,
        order: int | None = None,
        variance: Variance | None = None,
        iterations: int | float | Sequence[int] | None = None,
        block_budget: int | None = None,
        allocation: AllocationKind | None = None,
        reuse: bool | None = None,
        start_extrapolation: float | Sequence[float] | None = None,
        relaxation: Sequence[float] | None = None,
        solver: Solver | None = None,
        tolerance: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
        iterate_guidance: float | None = None,
        weak_iterate: int | None = None,
        rounding: Rounding | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws one image per label. What is None is as the recipe of the export says (`config.sampling`).

        Args:
            class_labels: numbers or names of classes, one or several; or (B, condition_dim) vectors.
            guidance_scale: 1 is no guidance.
            generator: one, or one an image. By default the noise is another in every call, unless torch's seed is set.
            num_inference_steps: steps of the sampler.
            output_type: "pil", "np" (B, H, W, 3) and "pt" (B, 3, H, W) in 0..1, or "latent" (B, C, h, w), before the
                autoencoder.
            return_dict: False for a tuple.
            latents: (B, C, h, w) standard normal noise to start from.
            seed, first_index: instead of generators: image i of the batch is the sample of index first_index + i that
                `pipeline/sample.py` draws of this seed, whatever the batch.
            callback_on_step_end: called with the pipeline, the step's number, its timestep and {"latents": ...}; what
                it returns under "latents" takes their place.
            callback_on_step_end_tensor_inputs: ["latents"]; there is nothing else to ask for.
            sampler: where the export's is "fitted", only with another, such as "multistep", may steps, iterations,
                guidance and what belongs to them be changed.
            spacing, spacing_power, eta, order, variance: see `fpdm.SamplerSettings`; another sampler begins
                with the usual settings. Of a scheduler of diffusers, eta alone, where it has one.
            iterations, allocation, block_budget: fixed point iterations, as in `fpdm.allocate`.
            reuse, start_extrapolation, relaxation, solver: as in `fpdm.sample`.
            guidance_rescale, guidance_interval, guidance_channels, iterate_guidance, weak_iterate: as in `fpdm.sample`.
            tolerance: as in `fpdm.sample`; 0 for none.
            rounding: of "pil", to 8 bits.

        Raises:
            ValueError: for a class that there is not, for an argument that does not fit or would act on nothing, for
                guidance of a network trained without the null label; and as `fpdm.sample` and `fpdm.allocate`.
        """
        arguments = dict(locals())
        given = {name: arguments[name] for name in setting_names() if arguments[name] is not None}
        network = CalledByModule(cast(FPDMTransformer2DModel, self.transformer))
        fitted = getattr(self.scheduler, "sampler", None) == "fitted" and sampler in (None, "fitted")
        if fitted:
            self._check_fitted(arguments)
        defaults = self._defaults if fitted else self._defaults.unfitted()
        settings = defaults.changed(network.config, given, block_budget)
        self.check_guidance(settings)
        self._check(output_type, rounding, callback_on_step_end_tensor_inputs)
        labels = self._classes.tensor(class_labels).to(self._execution_device)
        changes = {name: arguments[name] for name in ("sampler", *SETTINGS) if arguments[name] is not None}
        own = generator if seed is None else torch.Generator().manual_seed(seed)
        steps = self._steps(settings.num_inference_steps, changes, own)
        num_steps = len(steps.timesteps)
        noise, step_noise = self._noise(len(labels), generator, latents, seed, first_index)
        self._interrupt = False
        with self.progress_bar(total=num_steps) as bar, suppress(_Interrupted):
            sample(
                cast(Any, network),
                self.transformer.diffusion,
                steps.start(noise),
                labels,
                num_steps=num_steps,
                iterations=settings.counts(network.config, num_steps, block_budget, given),
                sampler=_Followed(self, steps, bar, callback_on_step_end),
                step_noise=step_noise if steps.adds_noise else None,
                **settings.passed_on(),
            )
        images = self.decode_latents(steps.latents, output_type, settings.rounding)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)

    def check_guidance(self, settings: CallSettings) -> None:
        """Raises ValueError for guidance of a network that never saw the null label."""
        if settings.guidance_scale != 1 and self.transformer.label_dropout == 0:
            raise ValueError(
                f"guidance_scale: {settings.guidance_scale:g}, but these weights were trained with label_dropout 0 and "
                "never saw the null label that guidance needs; leave it at 1"
            )

    def _check_fitted(self, arguments: dict[str, Any]) -> None:
        for name in FITTED_WITH:
            given, own = arguments[name], getattr(self._defaults, name, None)
            if given is not None and _as_tuple(given) != _as_tuple(own):
                raise ValueError(
                    f"{name}: the sampler of this export is fitted to its own; pass sampler='multistep' too for another"
                )

    def _check(self, output_type: str, rounding: str | None, tensor_inputs: Sequence[str]) -> None:
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: {output_type!r} is unknown; choose one of {', '.join(OUTPUTS)}")
        if rounding is not None and output_type != "pil":
            raise ValueError(f"rounding: is of output_type pil, not {output_type}; leave it out")
        if unknown := sorted(set(tensor_inputs) - set(self._callback_tensor_inputs)):
            raise ValueError(f"callback_on_step_end_tensor_inputs: no {unknown[0]!r}; there are latents alone")

    def _steps(self, num_steps: int, changes: dict[str, Any], generator: Generators) -> OwnSampler | ForeignSampler:
        """The sampler of a call: the scheduler's, with the changes that the call makes."""
        scheduler = self.scheduler
        if type(scheduler).__name__ == FPDMScheduler.__name__:  # not its class: diffusers loads that anew for each
            return OwnSampler(scheduler.changed(**changes), num_steps)
        if unfit := sorted(changes.keys() - {"eta"}):
            raise ValueError(
                f"{unfit[0]}: is of this project's samplers, and the scheduler is a {type(scheduler).__name__}; leave "
                "it out"
            )
        return ForeignSampler(scheduler, self.transformer.diffusion, num_steps, generator, changes.get("eta"))

    def _noise(
        self, batch: int, generator: Generators, latents: Tensor | None, seed: int | None, first_index: int
    ) -> tuple[Tensor, Callable[[int], Tensor]]:
        """What a call starts from, (B, C, h, w), and the noise of its steps."""
        network, device = self.transformer.denoiser.config, self._execution_device
        shape = (network.in_channels, network.input_size, network.input_size)
        if seed is None and first_index:
            raise ValueError("first_index: is of a seed; give seed too, or leave it out")
        if seed is not None and (generator is not None or latents is not None):
            raise ValueError("seed: together with a generator or latents; give one of them")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: {len(generator)} for {batch} images; give one, or one an image")
        if latents is not None and latents.shape != (batch, *shape):
            raise ValueError(f"latents: {tuple(latents.shape)} do not fit, {(batch, *shape)} is needed")
        if seed is not None:
            index = torch.arange(first_index, first_index + batch, device=device)
            return sample_noise(seed, index, shape), lambda step: sample_noise(seed, index, shape, step)

        def drawn(_: int = 0) -> Tensor:
            return randn_tensor((batch, *shape), generator, device, torch.float32)

        return drawn() if latents is None else latents.to(device), drawn

    def decode_latents(self, latents: Tensor, output_type: str, rounding: Rounding) -> Any:
        """Images of latents (B, C, h, w), in the form that `output_type` names."""
        if output_type == "latent":
            return latents
        images = latents.float() if self.vae is None else self._decoded(latents)  # (B, 3, H, W)
        if output_type == "pil":
            pixels = to_uint8(images, rounding).permute(0, 2, 3, 1).cpu().numpy()
            return VaeImageProcessor.numpy_to_pil(pixels / 255)
        return VaeImageProcessor().postprocess(images, output_type)

    def _decoded(self, latents: Tensor) -> Tensor:
        """By the autoencoder: (B, 3, H, W)."""
        vae = cast(AutoencoderKL, self.vae)
        unscaled = unscale_latents(latents, *autoencoders.scaling(vae.config)).to(vae.dtype)
        return autoencoders.decode(vae, unscaled.contiguous(memory_format=torch.channels_last)).float()


def _as_tuple(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(value) if isinstance(value, list) else value
