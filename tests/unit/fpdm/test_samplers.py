"""Samplers against closed forms: spacing, order of convergence on a Gaussian data set, variances, what they refuse."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from fpdm import Denoised, DenoiserConfig, Diffusion, SamplerSettings, build_sampler, guide, sample, spaced_timesteps

FLOW = Diffusion(schedule="flow", prediction="flow", learned_variance=False)
V = Diffusion(prediction="v", learned_variance=False)
ZERO = Diffusion(prediction="v", zero_terminal_snr=True, learned_variance=False)
FINE = Diffusion(num_timesteps=100_000, prediction="v", zero_terminal_snr=True, learned_variance=False)
SPREADS = torch.tensor([0.3, 0.6, 1.5, 3.0], dtype=torch.float64)  # of the data, by channel


def signal_and_sigma(diffusion, t):
    if diffusion.is_flow:
        return 1 - t / diffusion.num_timesteps, t / diffusion.num_timesteps
    abar = float(diffusion.gaussian.alphas_cumprod[int(t)])
    return abar**0.5, (1 - abar) ** 0.5


class Gaussian(torch.nn.Module):
    """The exact denoiser of data N(0, SPREADS**2), channel by channel."""

    config = DenoiserConfig(kind="dit", input_size=4, num_classes=3, learned_variance=False)

    def __init__(self, diffusion, spreads=SPREADS):
        super().__init__()
        self.diffusion, self.spreads = diffusion, spreads

    def forward(self, x, t, y, **options):
        signal, sigma = signal_and_sigma(self.diffusion, float(t[0]))
        variance = (self.spreads**2)[:, None, None]
        clean = signal * variance / (signal**2 * variance + sigma**2) * x
        noise = (x - signal * clean) / sigma
        output = noise - clean if self.diffusion.is_flow else signal * noise - sigma * clean
        return Denoised(output, None, None)


def exact_end(diffusion, x, t):
    """Where the flow of the process takes x at timestep t: marginal standard deviations stay in proportion."""
    signal, sigma = signal_and_sigma(diffusion, t)
    return x * (SPREADS / (signal**2 * SPREADS**2 + sigma**2).sqrt())[:, None, None]


def errors(diffusion, sampler, settings, steps):
    """Relative error of the end of each run, in float64 as far as the sampling loop allows."""
    found = []
    for num_steps in steps:
        run = build_sampler(diffusion, sampler, num_steps, settings)
        model, x = Gaussian(diffusion), torch.ones(1, 4, 1, 1, dtype=torch.float64)
        expected = exact_end(diffusion, x, run.timesteps[0])
        for i, t in enumerate(run.timesteps):
            x = run.step(i, model(x, torch.tensor([t]), None).output, x, None)
        found.append(float(((x - expected) / expected).abs().max()))
    return found


# sigma rises as the square root of the time in the one and as the time in the other: both grids are even in sigma.
@pytest.mark.parametrize(("diffusion", "power"), [(FINE, 2.0), (FLOW, 1.0)], ids=["zero terminal SNR", "flow"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_an_order_is_that_of_its_convergence_from_pure_noise_to_the_data(diffusion, power, order):
    """From 50 steps to 200 the error falls by 4 to the order; a fifth of the exponent is left to higher terms."""
    settings = SamplerSettings(order=order, spacing="trailing", spacing_power=power)
    coarse, fine = errors(diffusion, "multistep", settings, (50, 200))
    assert math.log(coarse / fine, 4) > 0.8 * order


@pytest.mark.parametrize("order", [2, 3])
def test_latents_that_are_replaced_between_the_first_steps_stay_replaced(order):
    """As inpainting does. Here the output is the clean latents, so that a change of x alone is carried on."""
    diffusion = replace(ZERO, prediction="clean")
    x, output, change = torch.randn(3, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    ended = []
    for added in (0.0, 1.0):
        run = build_sampler(diffusion, "multistep", 7, SamplerSettings(order=order))
        moved = run.step(0, output, x, None) + added * change
        ended.append(run.step(1, output.cos(), moved, None))
    first = build_sampler(diffusion, "multistep", 7, SamplerSettings(order=1))
    zero = torch.zeros_like(x)
    first.step(0, zero, zero, None)
    torch.testing.assert_close(ended[1] - ended[0], first.step(1, zero, change, None), rtol=1e-4, atol=1e-5)


def test_first_order_is_ddim_step_by_step():
    ours = build_sampler(ZERO, "multistep", 7, SamplerSettings(order=1, spacing="trailing"))
    ddim = build_sampler(ZERO, "ddim", 7, SamplerSettings(spacing="trailing"))
    assert ours.timesteps == ddim.timesteps
    x = torch.linspace(-2, 2, 64).reshape(1, 4, 4, 4)
    for i in range(7):
        output = x.cos()
        torch.testing.assert_close(ours.step(i, output, x, None), ddim.step(i, output, x, None), rtol=1e-4, atol=1e-5)
        x = ddim.step(i, output, x, None)


def spread_errors(diffusion, sampler, settings, steps):
    """Relative error of the standard deviation at each run's end. All is linear: each noise is followed by itself."""
    found = []
    for num_steps in steps:
        run, model = build_sampler(diffusion, sampler, num_steps, settings), Gaussian(diffusion)
        x, *noises = torch.eye(num_steps + 1, dtype=torch.float64)[:, :, None, None, None].expand(-1, -1, 4, 1, 1)
        for i, t in enumerate(run.timesteps):
            x = run.step(i, model(x, torch.tensor([t]), None).output, x, noises[i])
        found.append(float((x.square().sum(0)[:, 0, 0].sqrt() / SPREADS - 1).abs().max()))
    return found


@pytest.mark.parametrize(("diffusion", "power"), [(FINE, 2.0), (FLOW, 1.0)], ids=["zero terminal SNR", "flow"])
@pytest.mark.parametrize(("order", "eta"), [(1, 1.0), (2, 0.5), (2, 1.0), (3, 0.5), (3, 1.0)])
def test_with_noise_samples_spread_as_the_data_by_first_or_second_order(diffusion, power, order, eta):
    """From 50 steps to 200; extrapolating a path with noise by a third order gains nothing over the second."""
    settings = SamplerSettings(order=order, eta=eta, spacing="trailing", spacing_power=power)
    coarse, fine = spread_errors(diffusion, "multistep", settings, (50, 200))
    assert math.log(coarse / fine, 4) > 0.8 * min(order, 2)


def test_first_order_with_as_much_noise_as_ddpm_is_ddpm_step_by_step():
    ours = build_sampler(ZERO, "multistep", 7, SamplerSettings(order=1, eta=1.0, spacing="trailing"))
    ddpm = build_sampler(ZERO, "ddpm", 7, SamplerSettings(spacing="trailing"))
    x, noise = torch.linspace(-2, 2, 64).reshape(1, 4, 4, 4), torch.linspace(-1, 3, 64).reshape(1, 4, 4, 4).sin()
    for i in range(7):
        expected = ddpm.step(i, x.cos(), x, noise)
        torch.testing.assert_close(ours.step(i, x.cos(), x, noise), expected, rtol=1e-4, atol=1e-5)
        x = expected


@pytest.mark.parametrize("steps", [10, 20, 40])
def test_second_order_is_nearer_to_the_exact_end_than_ddim_at_equal_cost(steps):
    (first,), (second,) = (
        errors(ZERO, "multistep", SamplerSettings(order=order, spacing="trailing"), [steps]) for order in (1, 2)
    )
    assert second < first


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading", "log_snr"])
@pytest.mark.parametrize("diffusion", [V, ZERO], ids=["v", "zero terminal SNR"])
def test_every_spacing_is_distinct_ascending_and_within_range(spacing, diffusion):
    abar = diffusion.gaussian.alphas_cumprod
    for num_steps in (*range(1, 40), 250, 999, 1000):
        kept = spaced_timesteps(1000, num_steps, spacing, noise_to_signal=((1 - abar) / abar).sqrt())
        assert len(kept) == num_steps
        assert kept == sorted(set(kept))
        assert 0 <= kept[0] <= kept[-1] <= 999
        assert kept[-1] == 999 or spacing == "leading"
        assert kept[0] == 0 or spacing == "trailing" or num_steps == 1


@pytest.mark.parametrize("power", [0.5, 1.3, 4.0])
def test_powers_of_trailing_are_distinct_for_any_number_of_steps(power):
    for num_steps in (1, 2, 7, 60, 500, 1000):
        kept = spaced_timesteps(1000, num_steps, "trailing", power)
        assert kept == sorted(set(kept))
        assert kept[-1] == 999
    assert spaced_timesteps(1000, 4, "trailing") == [249, 499, 749, 999]
    assert spaced_timesteps(1000, 4, "trailing", 2.0) == [61, 249, 561, 999]  # 62.5 - 1, rounded to even


def test_leading_begins_at_the_first_timestep():
    assert spaced_timesteps(1000, 4, "leading") == [0, 250, 500, 750]


def test_log_snr_is_even_in_karras_measure():
    abar = V.gaussian.alphas_cumprod
    ratios = ((1 - abar) / abar).sqrt()
    kept = spaced_timesteps(1000, 10, "log_snr", noise_to_signal=ratios)
    roots = ratios.clamp_max(80.0)[kept] ** (1 / 7)
    assert roots.diff().max() < 1.3 * roots.diff()[1:].min()  # timesteps are whole, and coarse near the data


@pytest.mark.parametrize(("variance", "low", "high"), [("small", 0.1, 1.0), ("large", 5.0, 20.0)])
def test_five_steps_of_ddpm_make_a_narrow_channel_too_wide_by_beta_and_too_narrow_by_the_posterior(variance, low, high):
    count = 4000
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(count, 4, 1, 1, generator=generator) for _ in range(6)]
    drawn = sample(
        Gaussian(V, torch.tensor([0.05, 0.3, 1.0, 3.0])),
        V,
        noises[5],
        torch.zeros(count, dtype=torch.long),
        sampler="ddpm",
        sampler_settings=SamplerSettings(variance=variance),
        num_steps=5,
        step_noise=noises.__getitem__,
    )
    assert low < float(drawn[:, 0].std() / 0.05) < high


@pytest.mark.parametrize("steps", [100, 500, 4000])
def test_a_linear_schedule_ends_as_near_to_noise_whatever_its_number_of_timesteps(steps):
    last = float(Diffusion(num_timesteps=steps).gaussian.alphas_cumprod[-1])
    assert last == pytest.approx(float(Diffusion().gaussian.alphas_cumprod[-1]), rel=0.75)
    assert last < 1e-4  # 0.36 with 100 timesteps, if the betas were those of 1000


def test_rescaled_guidance_has_the_conditionals_standard_deviation():
    conditional, unconditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, half, full = (guide(conditional, unconditional, 5.0, 4, rescale) for rescale in (0.0, 0.5, 1.0))
    spread = [each.flatten(1).std(1) for each in (conditional, half, full, plain)]
    torch.testing.assert_close(spread[2], spread[0])
    assert all((a < b).all() for a, b in itertools.pairwise([spread[0], spread[1], spread[3]]))
    torch.testing.assert_close(full / plain, (full / plain)[:, :1, :1, :1].expand_as(full))  # each sample by one factor


@pytest.mark.parametrize(
    ("diffusion", "sampler", "settings", "fault"),
    [
        (V, "multistep", {"order": 4}, "order: 4"),
        (V, "ddim", {"spacing": "even"}, "spacing: 'even'"),
        (V, "ddim", {"spacing_power": 1.3}, "spacing_power: only of spacing 'trailing'"),
        (V, "ddim", {"spacing": "trailing", "spacing_power": 0.0}, "spacing_power: 0.0 must be positive"),
        (V, "dpm++", {"spacing": "trailing"}, "spacing: 'dpm\\+\\+' has one of its own"),
        (V, "ddpm", {"eta": 0.5}, "eta: 0.5 is of samplers ddim and multistep, not ddpm"),
        (V, "ddim", {"order": 3}, "order: 3 is of sampler multistep, not ddim"),
        (V, "ddim", {"variance": "large"}, "variance: is of sampler ddpm"),
        (Diffusion(), "ddpm", {"variance": "large"}, "variance: is of sampler ddpm where none is learned"),
        (V, "ddpm", {"variance": "larg"}, "variance: 'larg' is unknown"),
        (FLOW, "multistep", {}, "spacing: 'linspace' does not fit flow"),
        (FLOW, "ddim", {}, "sampler: 'ddim' does not fit prediction 'flow'"),
    ],
)
def test_a_setting_that_a_sampler_has_not_is_refused_by_name(diffusion, sampler, settings, fault):
    with pytest.raises(ValueError, match=f"^{fault}"):
        build_sampler(diffusion, sampler, 4, SamplerSettings(**settings))
