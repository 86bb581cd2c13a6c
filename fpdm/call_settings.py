"""How the diffusers pipeline samples: what an export stores, and what a call changes of it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fpdm.allocation import MEASURED, AllocationKind, allocate
from fpdm.config import DenoiserConfig
from fpdm.fixed_point import Solver
from fpdm.latents import Rounding

FIXED_POINT = (
    *("iterations", "allocation", "block_budget", "reuse", "start_extrapolation", "relaxation", "solver"),
    *("tolerance", "iterate_guidance", "weak_iterate"),
)
# What a sampler was fitted together with; another value takes another sampler. `rounding` alone is of the images.
FITTED_WITH = (
    *(*FIXED_POINT, "num_inference_steps", "guidance_scale", "guidance_rescale", "guidance_interval"),
    *("guidance_channels", "spacing", "spacing_power", "eta", "order", "variance"),
)
PASSED_ON = (
    *("reuse", "start_extrapolation", "relaxation", "iterate_guidance", "weak_iterate", "solver", "tolerance"),
    *("guidance_scale", "guidance_rescale", "guidance_interval", "guidance_channels"),
)


@dataclass(frozen=True, kw_only=True)
class CallSettings:
    """Arguments of a call of the pipeline, all but the sampler's, which the scheduler holds.

    num_inference_steps: steps of the sampler.
    iterations, allocation: as in `fpdm.allocate`. A list goes with "list".
    rounding: of images to 8 bits, see `fpdm.latents.to_uint8`.
    The others as in `fpdm.sample`.
    """

    num_inference_steps: int = 28
    iterations: int | float | list[int] = 8
    allocation: AllocationKind = "constant"
    reuse: bool = True
    start_extrapolation: float | list[float] = 0.0
    relaxation: list[float] | None = None
    solver: Solver = "picard"
    tolerance: float | None = None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: int | None = None
    iterate_guidance: float = 0.0
    weak_iterate: int = 1
    rounding: Rounding = "half_away"

    @classmethod
    def stored(cls, values: Mapping[str, Any] | None) -> "CallSettings":
        """Of JSON values. Raises ValueError naming an unknown field."""
        try:
            return cls(**(values or {}))
        except TypeError as error:
            raise ValueError(f"sampling: {error}; the export is of another version, or was changed") from None

    def unfitted(self) -> "CallSettings":
        """For another sampler than the fitted one: without the numbers that were fitted to its steps."""
        moved_on = self.start_extrapolation
        return replace(self, start_extrapolation=0.0 if isinstance(moved_on, list) else moved_on, relaxation=None)

    def changed(self, network: DenoiserConfig, given: Mapping[str, Any], block_budget: int | None) -> "CallSettings":
        """With what a call gives. Raises ValueError for an argument that would act on nothing."""
        names = {*given, *([] if block_budget is None else ["block_budget"])}
        if network.kind == "dit" and (fixed := [name for name in FIXED_POINT if name in names]):
            raise ValueError(f"{fixed[0]}: this network is a DiT and has no fixed point iteration; leave it out")
        settings = replace(self, **given)
        if "allocation" not in given and ("iterations" in given or block_budget is not None):
            listed = isinstance(settings.iterations, list | tuple) and block_budget is None
            kind = "list" if listed else "constant" if settings.allocation == "list" else settings.allocation
            settings = replace(settings, allocation=kind)
        if settings.tolerance == 0:
            settings = replace(settings, tolerance=None)
        _check_use(settings, given)
        return settings

    def passed_on(self) -> dict[str, Any]:
        """The arguments of `fpdm.sample` that are these settings as they are."""
        return {name: getattr(self, name) for name in PASSED_ON}

    def counts(self, network: DenoiserConfig, num_steps: int, block_budget: int | None, given: Any) -> list[int] | None:
        """Iterations of each step; None for DiT. Raises ValueError as `allocate`."""
        if network.kind == "dit":
            return None
        if self.allocation in MEASURED:
            raise ValueError(
                f"allocation: {self.allocation!r} is measured on the weights; an export holds the iterations that its "
                "recipe's measurement gave. Pass iterations as a list, or fpdm.calibration.allocate_adaptively's"
            )
        if self.allocation == "list" and "iterations" not in given and len(self.iterations) != num_steps:  # type: ignore[arg-type]
            mean = sum(self.iterations) / len(self.iterations)  # type: ignore[arg-type]
            raise ValueError(
                f"num_inference_steps: {num_steps}, but the iterations of this export are measured for "
                f"{len(self.iterations)} steps; pass iterations too, such as iterations={max(1, round(mean))}"  # type: ignore[arg-type]
            )
        iterations = None if block_budget is not None and "iterations" not in given else self.iterations
        counts = allocate(
            self.allocation, num_steps, iterations, block_budget=block_budget, outer_depth=network.blocks(0)
        )
        if given.get("iterate_guidance") and max(counts) <= self.weak_iterate:
            raise ValueError(
                f"weak_iterate: {self.weak_iterate}, and no step has more than {max(counts)} iterations; lower it"
            )
        return counts


def _check_use(settings: CallSettings, given: Mapping[str, Any]) -> None:
    unguided = "there is no guidance with guidance_scale 1"
    for name, idle in (
        ("guidance_rescale", unguided if settings.guidance_scale == 1 else ""),
        ("guidance_interval", unguided if settings.guidance_scale == 1 else ""),
        ("guidance_channels", unguided if settings.guidance_scale == 1 else ""),
        ("weak_iterate", "" if settings.iterate_guidance else "it belongs to iterate_guidance, which is 0"),
        ("start_extrapolation", "it moves starts that reuse gives, and reuse is False" if not settings.reuse else ""),
    ):
        if idle and given.get(name):
            raise ValueError(f"{name}: {idle}; leave it out")
    if settings.iterate_guidance and (settings.tolerance is not None or settings.solver != "picard"):
        raise ValueError(
            "iterate_guidance: reads an iterate of fixed counts of picard; call with tolerance=0 and solver='picard'"
        )


def setting_names() -> list[str]:
    """The names of the arguments."""
    return [field.name for field in fields(CallSettings)]
