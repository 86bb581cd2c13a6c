"""This project's samplers as a scheduler of diffusers, and other schedulers as samplers of this project."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fpdm.diffusion import Diffusion
from fpdm.samplers import Sampler, SamplerName, SamplerSettings, adds_noise, build_sampler, usual_settings

Generators = torch.Generator | list[torch.Generator] | None
OWN = "_fpdm"  # of a configuration; private, so that other schedulers take no offence at it
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "clean": "sample", "flow": "flow_prediction"}
NOISE_TOLERANCE = 1e-4  # between two schedules' alphas_cumprod; a zero is 2**-24 in some of diffusers'


class FPDMScheduler(SchedulerMixin, ConfigMixin):
    """A sampler of `fpdm.build_sampler` by name and settings.

    `config` describes the process in diffusers' terms, so that another scheduler can be made of it:
    DPMSolverMultistepScheduler.from_config(scheduler.config).
    """

    config_name = "scheduler_config.json"  # type: ignore[assignment]
    order = 1
    init_noise_sigma = 1.0

    def __init__(self, diffusion: Diffusion, sampler: SamplerName, settings: SamplerSettings | None = None) -> None:
        self.diffusion, self.sampler, self.settings = diffusion, sampler, settings or SamplerSettings()
        self.timesteps = torch.empty(0)
        own = {"objective": asdict(diffusion), "sampler": sampler, "settings": asdict(self.settings)}
        self.register_to_config(**_described(diffusion, self.settings), **{OWN: own})

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **changes: Any
    ) -> Any:
        """By `scheduler.config`; `changes` are `sampler` and fields of `SamplerSettings`.

        Raises ValueError for the configuration of another scheduler, and for an unknown change.
        """
        if OWN not in config:
            raise ValueError("config: of another scheduler; it does not say for what process the network was trained")
        own = config[OWN]
        try:
            scheduler = cls(Diffusion(**own["objective"]), own["sampler"], SamplerSettings.stored(own["settings"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"config: {OWN}: {error}; export the weights again") from None
        scheduler = scheduler.changed(**changes) if changes else scheduler
        return (scheduler, {}) if return_unused_kwargs else scheduler

    def changed(self, sampler: SamplerName | None = None, **settings: Any) -> "FPDMScheduler":
        """With another sampler, whose settings are then the usual ones, or with other settings.

        Raises ValueError for a setting that there is not.
        """
        known = [field.name for field in fields(SamplerSettings)]
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(f"{unknown[0]}: no setting of a sampler; these are sampler, {', '.join(known)}")
        usual = usual_settings(self.diffusion) if sampler == "multistep" else SamplerSettings()
        kept = self.settings if sampler in (None, self.sampler) else usual
        return FPDMScheduler(self.diffusion, sampler or self.sampler, replace(kept, **settings))

    @property
    def adds_noise(self) -> bool:
        """Whether the sampler draws noise in its steps."""
        return adds_noise(self.sampler, self.settings)

    def build(self, num_steps: int) -> Sampler:
        """Raises ValueError as `build_sampler`."""
        return build_sampler(self.diffusion, self.sampler, num_steps, self.settings)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Begins a run of so many steps. Raises ValueError as `build_sampler`."""
        self._steps, self._next = self.build(num_inference_steps), 0
        self.timesteps = torch.tensor(self._steps.timesteps, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """(B, C, H, W), unchanged: the network takes the sample as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised latents (B, C, H, W) at timesteps (B,)."""
        whole = timesteps if self.diffusion.is_flow else timesteps.long()  # as floats some samplers have them
        return self.diffusion.add_noise(original_samples, noise, whole)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The network's output (B, C or 2C, H, W) at `sample` (B, C, H, W) -> the sample at the next timestep.

        Raises ValueError unless timesteps come in order, after `set_timesteps`.
        """
        i = getattr(self, "_next", 0)
        if i >= len(self.timesteps) or float(timestep) != float(self.timesteps[i]):
            raise ValueError(
                f"timestep: {float(timestep):g} is not the next; call set_timesteps, then take all in order"
            )
        self._next = i + 1
        noisy = self.adds_noise and self._next < len(self.timesteps)
        noise = randn_tensor(sample.shape, generator, sample.device, torch.float32) if noisy else None
        moved = self._steps.step(i, model_output.float(), sample.float(), noise)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def __len__(self) -> int:
        return self.diffusion.num_timesteps


def _described(diffusion: Diffusion, settings: SamplerSettings) -> dict[str, Any]:
    """The process by the names of diffusers' schedulers, which clip nothing: latents are no pixels."""
    process: dict[str, Any] = {
        "num_train_timesteps": diffusion.num_timesteps,
        "prediction_type": PREDICTIONS[diffusion.prediction],
    }
    if diffusion.is_flow:
        return process | {"use_flow_sigmas": True}
    spacing = settings.spacing if settings.spacing in ("leading", "trailing") else "linspace"
    return process | {
        "trained_betas": diffusion.gaussian.betas.tolist(),
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
        "timestep_spacing": spacing,
        "clip_sample": False,
    }


class OwnSampler:
    """A sampler of this project for one call; `latents` (B, C, H, W) are the last ones."""

    def __init__(self, scheduler: FPDMScheduler, num_steps: int) -> None:
        """Raises ValueError as `build_sampler`."""
        self._sampler = scheduler.build(num_steps)
        self.timesteps, self.adds_noise = self._sampler.timesteps, scheduler.adds_noise
        self.latents = torch.empty(0)

    def start(self, noise: Tensor) -> Tensor:
        """What the network takes first: the noise (B, C, H, W)."""
        return noise

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """See `Sampler.step`: (B, C, H, W)."""
        self.latents = self._sampler.step(i, output, x, noise)
        return self.latents

    def resume(self, i: int, latents: Tensor) -> Tensor:
        """Goes on after step i from other latents (B, C, H, W); returns what the network takes."""
        self.latents = latents
        return latents


class ForeignSampler:
    """A scheduler of diffusers that somebody put in the place of this project's, for one call.

    It takes the prediction alone: a variance that the network learned is dropped, and so is noise by sample number:
    noise is the generator's. x is the sample as the network takes it, `latents` are of the scheduler's own scale.
    """

    adds_noise = False  # it draws its own

    def __init__(
        self, scheduler: Any, diffusion: Diffusion, num_steps: int, generator: Generators, eta: float | None
    ) -> None:
        """Raises ValueError for a scheduler of another process, and for an eta that it has not."""
        _check_process(scheduler, diffusion)
        known = inspect.signature(scheduler.step).parameters
        if eta is not None and "eta" not in known:
            raise ValueError(f"eta: {type(scheduler).__name__} has none; leave it out")
        arguments = {"eta": eta, "generator": generator}
        self._arguments = {name: value for name, value in arguments.items() if value is not None and name in known}
        scheduler.set_timesteps(num_steps)
        sigmas = torch.as_tensor(getattr(scheduler, "sigmas", 0.0))
        if not sigmas.isfinite().all():
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} has infinite sigmas at pure noise, where the process of "
                "these weights ends (zero_terminal_snr); take another, such as DPMSolverMultistepScheduler"
            )
        self._scheduler, self.timesteps = scheduler, [float(t) for t in scheduler.timesteps]
        self.latents = torch.empty(0)

    def start(self, noise: Tensor) -> Tensor:
        """Standard normal noise (B, C, H, W) -> what the network takes first, of the same shape."""
        self.latents = noise * float(getattr(self._scheduler, "init_noise_sigma", 1.0))
        return self._scaled(0)

    def step(self, i: int, output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """See `Sampler.step`: (B, C, H, W); in order, each i once."""
        prediction, t = output[:, : x.shape[1]], self._scheduler.timesteps[i]
        self.latents = self._scheduler.step(prediction, t, self.latents, **self._arguments).prev_sample
        return self._scaled(i + 1)

    def resume(self, i: int, latents: Tensor) -> Tensor:
        """Goes on after step i from other latents (B, C, H, W); returns what the network takes."""
        self.latents = latents
        return self._scaled(i + 1)

    def _scaled(self, i: int) -> Tensor:
        if i == len(self.timesteps) or not hasattr(self._scheduler, "scale_model_input"):
            return self.latents
        return self._scheduler.scale_model_input(self.latents, self._scheduler.timesteps[i])


def _check_process(scheduler: Any, diffusion: Diffusion) -> None:
    """Raises ValueError where the scheduler's process is not the one that the network was trained for."""
    name, config = type(scheduler).__name__, scheduler.config
    remedy = f"make it of the export's: {name}.from_pretrained(EXPORT, subfolder='scheduler')"
    flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
    if flow != diffusion.is_flow:
        raise ValueError(f"scheduler: {name} {'is' if flow else 'is not'} of flow matching, unlike the network")
    stated = config.get("prediction_type", "flow_prediction" if flow else "epsilon")
    for field, found, wanted in (
        ("prediction_type", stated, PREDICTIONS[diffusion.prediction]),
        ("num_train_timesteps", config.get("num_train_timesteps"), diffusion.num_timesteps),
    ):
        if found != wanted:
            raise ValueError(f"scheduler: {name} has {field} {found!r}, the network {wanted!r}; {remedy}")
    if not flow and hasattr(scheduler, "alphas_cumprod"):
        found = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
        if not torch.allclose(found, diffusion.gaussian.alphas_cumprod, rtol=0, atol=NOISE_TOLERANCE):
            raise ValueError(f"scheduler: {name} has other betas than the network was trained with; {remedy}")
