"""Fixed Point Diffusion Models: the network, its gradient, objectives, samplers and allocation."""

from fpdm.allocation import allocate, count_blocks
from fpdm.calibration import Calibration, Way, allocate_adaptively, calibrate, measure_residuals
from fpdm.config import SIZES, DenoiserConfig
from fpdm.conversion import fpdm_from_dit
from fpdm.denoiser import Denoised, Denoiser, build_denoiser, count_parameters
from fpdm.diffusion import Diffusion
from fpdm.fitted import Coefficients
from fpdm.fixed_point import sjfb_counts
from fpdm.importing import ImportReport, import_checkpoint, infer_config
from fpdm.samplers import SamplerSettings, build_sampler, spaced_timesteps
from fpdm.sampling import guide, require_sound, sample
from fpdm.weights import assemble, load_pretrained, read_config, read_extra, save_pretrained

__all__ = [
    "SIZES",
    "Calibration",
    "Coefficients",
    "Denoised",
    "Denoiser",
    "DenoiserConfig",
    "Diffusion",
    "ImportReport",
    "SamplerSettings",
    "Way",
    "allocate",
    "allocate_adaptively",
    "assemble",
    "build_denoiser",
    "build_sampler",
    "calibrate",
    "count_blocks",
    "count_parameters",
    "fpdm_from_dit",
    "guide",
    "import_checkpoint",
    "infer_config",
    "load_pretrained",
    "measure_residuals",
    "read_config",
    "read_extra",
    "require_sound",
    "sample",
    "save_pretrained",
    "sjfb_counts",
    "spaced_timesteps",
]
