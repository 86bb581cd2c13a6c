"""The sampling loop: exactness, independence of the batch, guidance, reuse, and what it refuses."""

import pytest
import torch

from fpdm import (
    Denoised,
    DenoiserConfig,
    Diffusion,
    SamplerSettings,
    allocate,
    build_denoiser,
    build_sampler,
    guide,
    require_sound,
    rng,
    sample,
    spaced_timesteps,
)

FLOW = Diffusion(schedule="flow", prediction="flow", learned_variance=False)
PROCESSES = {
    "epsilon": Diffusion(),
    "v": Diffusion(prediction="v"),
    "v zero snr": Diffusion(prediction="v", zero_terminal_snr=True),
    "cosine": Diffusion(schedule="cosine", prediction="v"),
    "clean zero snr": Diffusion(prediction="clean", zero_terminal_snr=True, loss_weight="velocity"),
    "flow": FLOW,
}


class Exact(torch.nn.Module):
    """Knows the clean latents, and so predicts exactly; records what it is asked."""

    def __init__(self, diffusion, clean, null_offset=0.0):
        super().__init__()
        self.diffusion, self.clean, self.null_offset = diffusion, clean, null_offset
        self.config = DenoiserConfig(
            kind="dit", input_size=4, num_classes=3, learned_variance=diffusion.learned_variance
        )
        self.calls = []

    def forward(self, x, t, y, **options):
        self.calls.append((len(x), float(t[0]), y.tolist()))
        clean = self.clean.repeat(len(x) // len(self.clean), 1, 1, 1)
        if self.diffusion.is_flow:
            noise = clean + (x - clean) / (t / 1000)[:, None, None, None]
        else:
            signal, sigma = self.diffusion._signal_and_sigma(t.long())
            noise = (x - signal * clean) / sigma
        output = self.diffusion.target(clean, noise, t.long() if not self.diffusion.is_flow else t)
        output = output + self.null_offset * (y == 3)[:, None, None, None]
        if self.diffusion.learned_variance:
            output = torch.cat([output, torch.zeros_like(output)], dim=1)
        return Denoised(output, None, None)


def noise_of(index, stream="start"):
    return rng.normal(0, stream, index, (4, 4, 4))


def network(**options):
    config = DenoiserConfig(input_size=4, hidden_size=16, num_heads=2, num_classes=3, **options)
    model = build_denoiser(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.15 * rng.normal(1, name, torch.arange(len(parameter)), tuple(parameter.shape[1:])))
    return model


GAUSSIAN_SAMPLERS = ("ddim", "ddpm", "multistep", "dpm++", "unipc")
TRAILING = SamplerSettings(spacing="trailing", spacing_power=1.3, order=3)
SETTINGS = {"ddim": SamplerSettings(eta=0.5), "multistep": TRAILING}
PAIRS = [(process, sampler) for process in PROCESSES if process != "flow" for sampler in GAUSSIAN_SAMPLERS]


@pytest.mark.parametrize(("process", "sampler"), [*PAIRS, ("flow", "flow_euler"), ("flow", "multistep")])
@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_every_sampler_ends_at_the_clean_latents_of_an_exact_model(process, sampler, num_steps):
    diffusion = PROCESSES[process]
    index = torch.arange(2)
    clean = rng.normal(1, "clean", index, (4, 4, 4))
    found = sample(
        Exact(diffusion, clean),
        diffusion,
        noise_of(index),
        index,
        sampler=sampler,
        sampler_settings=TRAILING if sampler == "multistep" else None,
        num_steps=num_steps,
        step_noise=lambda i: noise_of(index, f"step {i}"),
    )
    torch.testing.assert_close(found, clean, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("num_steps", "expected"), [(1, [999]), (2, [0, 999]), (7, [0, 166, 333, 500, 666, 832, 999])])
def test_spaced_timesteps_hold_both_ends_as_published(num_steps, expected):
    assert spaced_timesteps(1000, num_steps) == expected
    assert spaced_timesteps(1000, 1000) == list(range(1000))


def test_spaced_timesteps_are_distinct_ascending_and_end_at_the_last():
    for num_steps in range(1, 1001):
        kept = spaced_timesteps(1000, num_steps)
        assert len(set(kept)) == num_steps
        assert kept == sorted(kept)
        assert kept[-1] == 999


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "multistep", "dpm++", "unipc", "flow_euler"])
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_a_sample_does_not_depend_on_its_batch(sampler, solver, tolerance):
    """Drawn with noise in each step, reuse, and guidance on an interval; with a tolerance some samples stop early."""
    diffusion = FLOW if sampler == "flow_euler" else PROCESSES["v zero snr"]
    model = network(learned_variance=diffusion.learned_variance)
    residuals = []

    def draw(index):
        return sample(
            model,
            diffusion,
            noise_of(index),
            index % 3,
            sampler=sampler,
            sampler_settings=SETTINGS.get(sampler),
            start_extrapolation=0.5,
            guidance_rescale=0.5,
            num_steps=5,
            iterations=[6] * 5,
            reuse=True,
            guidance_scale=2.0,
            guidance_interval=(0.2, 0.9),
            solver=solver,
            tolerance=tolerance,
            with_residuals=True,
            step_noise=lambda i: noise_of(index, f"step {i}"),
            on_step=lambda i, denoised: residuals.append(denoised.residuals),
        )

    together = draw(torch.arange(64))
    stopped = [counts for step in residuals if len(counts := (~step.isnan()).sum(1).unique()) > 1]
    assert bool(stopped) == (tolerance is not None)
    for i in (0, 31, 63):
        alone = draw(torch.tensor([i]))[0]
        assert (alone - together[i]).abs().max() < 1e-5 * together[i].abs().max()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_sample_of_steps_without_iterations_does_not_depend_on_its_batch(guidance_scale):
    model, diffusion, counts = network(), PROCESSES["v zero snr"], [3, 0, 1, 0, 0, 2, 0]
    solutions = []

    def draw(index):
        return sample(
            model,
            diffusion,
            noise_of(index),
            index % 3,
            num_steps=7,
            iterations=counts,
            reuse=True,
            start_extrapolation=0.5,
            guidance_scale=guidance_scale,
            guidance_interval=(0.2, 0.7),
            on_step=lambda i, denoised: solutions.append(denoised.solution),
        )

    together = draw(torch.arange(8))
    first, forecast = solutions[:2]
    assert torch.equal(forecast[: len(first)], first)  # with one solution before it there is no change to move on by
    for i in (0, 7):
        alone = draw(torch.tensor([i]))[0]
        assert (alone - together[i]).abs().max() < 1e-5 * together[i].abs().max()


@pytest.mark.parametrize(
    ("counts", "reuse", "message"),
    [
        ([0, 2], True, r"iterations: step 0 of \[0, 2\] has none and is the first; give it at least 1"),
        ([2, 0], False, "iterations: step 1 of .* has none and does not start at the last step's solution"),
        ([2, 0], [True, False], "iterations: step 1 "),
    ],
)
def test_a_step_without_iterations_needs_a_solution_to_read_out(counts, reuse, message):
    index = torch.arange(2)
    with pytest.raises(ValueError, match=message):
        sample(network(), Diffusion(), noise_of(index), index, num_steps=2, iterations=counts, reuse=reuse)


def test_any_batch_size_can_be_guided_and_the_null_label_is_num_classes():
    index = torch.arange(3)
    model = Exact(Diffusion(), noise_of(index, "clean"))
    sample(model, Diffusion(), noise_of(index), index, num_steps=2, guidance_scale=4.0)
    assert [(size, y) for size, _, y in model.calls] == [(6, [0, 1, 2, 3, 3, 3])] * 2


def test_a_scale_of_one_costs_no_second_half():
    index = torch.arange(3)
    model = Exact(Diffusion(), noise_of(index, "clean"))
    sample(model, Diffusion(), noise_of(index), index, num_steps=2)
    assert [size for size, _, _ in model.calls] == [3, 3]


def test_guidance_is_confined_to_its_interval():
    index = torch.arange(3)
    model = Exact(Diffusion(), noise_of(index, "clean"))
    sample(model, Diffusion(), noise_of(index), index, num_steps=10, guidance_scale=2.0, guidance_interval=(0.3, 0.7))
    assert [t for size, t, _ in model.calls if size == 6] == [666, 555, 444, 333]
    assert [t for size, t, _ in model.calls if size == 3] == [999, 888, 777, 222, 111, 0]


def test_guidance_extrapolates_the_guided_channels_and_keeps_the_conditional_others():
    conditional, unconditional = noise_of(torch.arange(2)), noise_of(torch.arange(2), "other")
    guided = guide(conditional, unconditional, 4.0, 3)
    expected = unconditional + 4 * (conditional - unconditional)
    torch.testing.assert_close(guided[:, :3], expected[:, :3])
    assert torch.equal(guided[:, 3:], conditional[:, 3:])


def test_the_number_of_guided_channels_reaches_the_sample():
    index = torch.arange(2)
    runs = {}
    for channels in (None, 3, 4):
        model = Exact(Diffusion(prediction="v"), noise_of(index, "clean"), null_offset=0.1)
        options = {"num_steps": 3, "guidance_scale": 2.0, "guidance_channels": channels}
        runs[channels] = sample(model, Diffusion(prediction="v"), noise_of(index), index, **options)
    assert torch.equal(runs[None], runs[4])
    assert torch.equal(runs[3][:, :3], runs[4][:, :3])
    assert not torch.equal(runs[3][:, 3], runs[4][:, 3])


def recorded_starts(model):
    """A list that gets the start of every call from now on."""
    starts, forward = [], model.forward

    def spy(*arguments, **options):
        starts.append(options["start"])
        return forward(*arguments, **options)

    model.forward = spy
    return starts


def test_reuse_starts_each_step_at_the_last_solution_where_it_is_asked_for():
    model, diffusion, index = network(), Diffusion(prediction="v"), torch.arange(3)
    starts, solutions = recorded_starts(model), []
    sample(
        model,
        diffusion,
        noise_of(index),
        index,
        num_steps=4,
        iterations=[2] * 4,
        reuse=[True, False, True, True],
        on_step=lambda i, denoised: solutions.append(denoised.solution),
    )
    assert starts[0] is None
    assert starts[1] is None
    assert starts[2] is solutions[1]
    assert starts[3] is solutions[2]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_extrapolated_start_moves_on_by_a_part_of_the_last_change(scale):
    """Under guidance from half of the steps on too: the new null half begins where the conditional one is, unmoved."""
    model, diffusion, index = network(), Diffusion(prediction="v"), torch.arange(3)
    starts, solutions = recorded_starts(model), []
    sample(
        model,
        diffusion,
        noise_of(index),
        index,
        num_steps=5,
        iterations=[2] * 5,
        reuse=True,
        start_extrapolation=0.5,
        guidance_scale=scale,
        guidance_interval=(0.0, 0.5),
        on_step=lambda i, denoised: solutions.append(denoised.solution),
    )
    assert starts[0] is None
    assert starts[1] is solutions[0]
    for i in range(2, 5):
        pair = solutions[i - 1], solutions[i - 2]
        if len(pair[1]) < len(starts[i]):  # a null half that had no solution before the last one
            last = torch.cat([pair[0], pair[0]]) if len(pair[0]) < len(starts[i]) else pair[0]
            assert torch.equal(starts[i], last)
            continue
        last, older = pair
        torch.testing.assert_close(starts[i], last + 0.5 * (last - older))


def test_reuse_goes_together_with_a_guidance_interval():
    model, diffusion, index = network(), Diffusion(prediction="v"), torch.arange(3)
    options = {"num_steps": 8, "reuse": True, "guidance_scale": 3.0, "guidance_interval": (0.3, 0.7)}
    coarse, fine = (sample(model, diffusion, noise_of(index), index, iterations=[k] * 8, **options) for k in (40, 60))
    torch.testing.assert_close(coarse, fine, atol=1e-4, rtol=1e-3)  # at the fixed point the start is forgotten


def test_every_batch_evaluates_the_allocation():
    model, diffusion, index = network(), Diffusion(prediction="v"), torch.arange(2)
    counts = allocate("more_at_noise", 5, 4)
    evaluated = [0]
    model.block_fixed_point.register_forward_hook(lambda *_: evaluated.append(evaluated.pop() + 1))
    for _ in range(2):
        sample(
            model,
            diffusion,
            noise_of(index),
            index,
            num_steps=5,
            iterations=counts,
            on_step=lambda i, denoised: evaluated.append(0),
        )
    assert evaluated == [*counts, *counts, 0]


def test_ddim_with_eta_one_has_the_spread_of_ancestral_sampling():
    """With eta = 1 DDIM's step is DDPM's with the lower of the two variances (Song et al., section 4.1)."""
    diffusion = Diffusion(learned_variance=False)
    ddim = build_sampler(diffusion, "ddim", 10, SamplerSettings(eta=1.0))
    ddpm, wide = (build_sampler(diffusion, "ddpm", 10, SamplerSettings(variance=each)) for each in ("small", "large"))
    index = torch.arange(2)
    x, output, zero = noise_of(index), noise_of(index, "output"), torch.zeros(2, 4, 4, 4)
    for i in range(9):
        torch.testing.assert_close(ddim.step(i, output, x, zero), ddpm.step(i, output, x, zero), rtol=1e-4, atol=1e-5)
        lower = (ddim.step(i, output, x, zero + 1) - ddim.step(i, output, x, zero)).mean()
        upper = (wide.step(i, output, x, zero + 1) - wide.step(i, output, x, zero)).mean()
        assert 0 < lower < upper
        torch.testing.assert_close(
            ddim.step(i, output, x, zero + 1), ddpm.step(i, output, x, zero + 1), rtol=1e-4, atol=1e-5
        )


def test_a_model_and_a_diffusion_that_disagree_on_the_variance_are_refused():
    index = torch.arange(2)
    diffusion = Diffusion(prediction="v", learned_variance=False)
    with pytest.raises(ValueError, match="learned_variance: True in the model, False in the diffusion"):
        sample(network(), diffusion, noise_of(index), index, num_steps=2, iterations=[1, 1])


def test_stochastic_ddim_stays_real_for_any_number_of_steps():
    """At 96 steps rounding makes what is left of the variance negative."""
    x, output = noise_of(torch.arange(1)), torch.zeros(1, 8, 4, 4)
    for num_steps in (1, 2, 28, 96, 1000):
        sampler = build_sampler(PROCESSES["v zero snr"], "ddim", num_steps, SamplerSettings(eta=1.0))
        for i in range(num_steps):
            following = sampler.step(i, output, x, x)
            assert following.dtype == torch.float32
            assert following.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_sample_is_reported_by_its_row(bad):
    samples = noise_of(torch.arange(5))
    samples[3, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"samples: 1 of 5 are non-finite \(rows 3\); metrics of them"):
        require_sound(samples)


def test_a_constant_sample_is_reported_by_its_row():
    samples = noise_of(torch.arange(5))
    samples[[0, 4]] = 0.5
    with pytest.raises(ValueError, match=r"samples: 2 of 5 are constant \(rows 0, 4\)"):
        require_sound(samples)
    require_sound(noise_of(torch.arange(5)))


def test_a_model_that_went_to_nan_is_refused_at_the_end_of_sampling():
    model = network()
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(torch.nan)
    index = torch.arange(2)
    with pytest.raises(ValueError, match="samples: 2 of 2 are non-finite"):
        sample(model, Diffusion(prediction="v"), noise_of(index), index, num_steps=2, iterations=[1, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, "sampler: 'euler' is unknown; choose one of ddpm, ddim"),
        ({"sampler": "flow_euler"}, "sampler: 'flow_euler' does not fit prediction 'v'"),
        ({"sampler": "ddpm"}, "step_noise: sampler 'ddpm' adds noise"),
        ({"sampler_settings": SamplerSettings(eta=0.5)}, "step_noise: sampler 'ddim' adds noise"),
        ({"sampler_settings": SamplerSettings(eta=2.0)}, "eta: 2.0"),
        ({"num_steps": 0}, "num_steps: 0"),
        ({"iterations": None}, "iterations: None for 2 steps"),
        ({"iterations": [1, 2, 3]}, "iterations: 3 values for 2 steps"),
        ({"reuse": [True]}, "reuse: 1 values for 2 steps"),
        ({"guidance_channels": 5}, "guidance_channels: 5 is outside 1..4"),
        ({"guidance_interval": (0.7, 0.3)}, "guidance_interval: "),
    ],
)
def test_settings_that_do_not_fit_are_named(options, message):
    index = torch.arange(2)
    options = {"num_steps": 2, "iterations": [1, 1], **options}
    with pytest.raises(ValueError, match=f"^{message}"):
        sample(network(), Diffusion(prediction="v"), noise_of(index), index, **options)
    with pytest.raises(ValueError, match=r"labels: 1..4 are outside 0..3"):
        sample(
            network(), Diffusion(prediction="v"), noise_of(index), torch.tensor([1, 4]), num_steps=2, iterations=[1, 1]
        )
    with pytest.raises(ValueError, match=r"num_steps: 1000 of 'unipc' repeat a timestep; choose 999 at most"):
        build_sampler(Diffusion(prediction="v"), "unipc", 1000)
    with pytest.raises(ValueError, match="sampler: 'ddim' does not fit prediction 'flow'"):
        build_sampler(FLOW, "ddim", 2)


def test_guidance_by_iterates_moves_the_prediction_away_from_the_weak_iterates():
    model, diffusion, index = network(), Diffusion(prediction="v"), torch.arange(3)
    options = {"num_steps": 1, "iterations": [4]}
    weak, strong = (
        sample(model, diffusion, noise_of(index), index, num_steps=1, iterations=[count]) for count in (2, 4)
    )
    guided = sample(model, diffusion, noise_of(index), index, **options, iterate_guidance=0.5, weak_iterate=2)
    torch.testing.assert_close(guided, strong + 0.5 * (strong - weak))  # one step is linear in the prediction
    short = sample(model, diffusion, noise_of(index), index, **options, iterate_guidance=0.5, weak_iterate=4)
    assert torch.equal(short, strong)  # no iterate comes after the fourth


def test_a_sample_guided_by_iterates_does_not_depend_on_its_batch():
    model = network(learned_variance=False)
    diffusion = Diffusion(prediction="clean", zero_terminal_snr=True, learned_variance=False)

    def draw(index):
        return sample(
            model,
            diffusion,
            noise_of(index),
            index % 3,
            sampler="multistep",
            num_steps=5,
            iterations=[1, 2, 3, 4, 3],
            reuse=True,
            guidance_scale=2.0,
            guidance_interval=(0.2, 0.9),
            iterate_guidance=0.5,
            weak_iterate=2,
        )

    together = draw(torch.arange(16))
    for i in (0, 15):
        alone = draw(torch.tensor([i]))[0]
        assert (alone - together[i]).abs().max() < 1e-5 * together[i].abs().max()
