"""Forward processes, targets and losses against their definitions."""

import math

import pytest
import torch

from fpdm import Diffusion, rng

SHAPE = (4, 6, 6)


def tensors(batch=4, seed=0):
    index = torch.arange(batch)
    return rng.normal(seed, "x0", index, SHAPE), rng.normal(seed, "noise", index, SHAPE)


def test_the_linear_schedule_is_that_of_ddpm():
    gaussian = Diffusion().gaussian
    torch.testing.assert_close(gaussian.betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    assert float(gaussian.alphas_cumprod[-1]) == pytest.approx(4.0358e-5, rel=1e-4)


def test_zero_terminal_snr_ends_at_exactly_no_signal_and_begins_as_before():
    plain = Diffusion(prediction="v").gaussian.alphas_cumprod
    zero = Diffusion(prediction="v", zero_terminal_snr=True).gaussian.alphas_cumprod
    assert zero[-1] == 0
    assert float(zero[0]) == pytest.approx(float(plain[0]), abs=1e-12)
    assert (zero.diff() < 0).all()


def test_the_cosine_schedule_follows_nichol_and_dhariwal():
    diffusion = Diffusion(schedule="cosine")
    abar = diffusion.gaussian.alphas_cumprod

    def f(time):
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 400, 900):
        assert float(abar[t]) == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-9)
    assert float(diffusion.gaussian.betas.max()) <= 0.999 + 1e-12


def test_timesteps_of_training_cover_every_integer_and_flow_is_continuous():
    u = torch.tensor([0.0, 0.4999, 1 - 2.0**-24])
    assert Diffusion().timesteps(u).tolist() == [0, 499, 999]
    flow = Diffusion(schedule="flow", prediction="flow", learned_variance=False).timesteps(u)
    assert flow.is_floating_point()
    torch.testing.assert_close(flow, u * 1000)


@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_plain_v_loss_is_the_mean_squared_error_of_v(t):
    diffusion = Diffusion(prediction="v", zero_terminal_snr=True, learned_variance=False)
    x0, noise = tensors()
    output = rng.normal(9, "output", torch.arange(4), SHAPE)
    abar = float(diffusion.gaussian.alphas_cumprod[t])
    v = abar**0.5 * noise - (1 - abar) ** 0.5 * x0
    loss = diffusion.loss(output, x0, noise, torch.full((4,), t))
    torch.testing.assert_close(loss["loss"], (output - v).square().mean(dim=(1, 2, 3)))


def test_the_last_timestep_is_trained_unless_the_published_weight_is_chosen():
    x0, noise = tensors()
    last = torch.full((4,), 999)
    plain = Diffusion(prediction="v", zero_terminal_snr=True, learned_variance=False)
    assert (plain.loss(torch.zeros_like(x0), x0, noise, last)["loss"] > 0.5).all()
    published = Diffusion(prediction="v", zero_terminal_snr=True, learned_variance=False, loss_weight="p2")
    assert (published.loss(torch.zeros_like(x0), x0, noise, last)["loss"] == 0).all()


def test_the_published_weight_is_that_of_the_released_code():
    """Printed values of its weight of the v error: t = 0, 250, 500, 750, 900, 990."""
    x0, noise = tensors(6)
    t = torch.tensor([0, 250, 500, 750, 900, 990])
    options = {"prediction": "v", "zero_terminal_snr": True, "learned_variance": False}
    weighted = Diffusion(**options, loss_weight="p2").loss(torch.zeros_like(x0), x0, noise, t)["mse"]
    plain = Diffusion(**options).loss(torch.zeros_like(x0), x0, noise, t)["mse"]
    torch.testing.assert_close(
        weighted / plain, torch.tensor([0.010, 0.360, 0.072, 0.0026, 0.0001, 0.0]), atol=5e-4, rtol=0.02
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v", "clean"])
def test_min_snr_weighs_by_the_clipped_signal_to_noise_ratio(prediction):
    x0, noise = tensors()
    t = torch.tensor([5, 200, 600, 990])
    options = {"prediction": prediction, "learned_variance": False}
    ratio = (
        Diffusion(**options, loss_weight="min_snr").loss(torch.zeros_like(x0), x0, noise, t)["loss"]
        / Diffusion(**options).loss(torch.zeros_like(x0), x0, noise, t)["loss"]
    )
    abar = Diffusion(**options).gaussian.alphas_cumprod[t]
    snr = abar / (1 - abar)
    expected = snr.clamp_max(5) / {"epsilon": snr, "v": snr + 1, "clean": 1}[prediction]
    torch.testing.assert_close(ratio, expected.float())


def test_under_the_weight_velocity_clean_predictions_have_the_loss_of_the_velocity_they_imply():
    """From where sigma is 0.1 on; nearer to the data the weight stays at 100."""
    x0, noise = tensors()
    t = torch.tensor([40, 200, 600, 999])
    options = {"zero_terminal_snr": True, "learned_variance": False}
    velocity = Diffusion(prediction="v", **options)
    clean = Diffusion(prediction="clean", loss_weight="velocity", **options)
    output = 0.5 * x0 + 0.1 * noise
    signal, sigma = velocity._signal_and_sigma(t)
    assert float(sigma.min()) > 0.1
    implied = (signal * velocity.add_noise(x0, noise, t) - output) / sigma
    expected = velocity.loss(implied, x0, noise, t)["loss"]
    torch.testing.assert_close(clean.loss(output, x0, noise, t)["loss"], expected, rtol=1e-4, atol=1e-6)
    first = clean.loss(output, x0, noise, torch.zeros_like(t))["loss"]
    torch.testing.assert_close(first, 100 * (output - x0).square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_weight_velocity_is_of_clean_predictions_alone(prediction):
    with pytest.raises(ValueError, match=r"^loss_weight: 'velocity' weighs clean predictions"):
        Diffusion(prediction=prediction, loss_weight="velocity")


def test_flow_interpolates_straight_and_predicts_the_difference():
    diffusion = Diffusion(schedule="flow", prediction="flow", learned_variance=False)
    x0, noise = tensors(3)
    t = torch.tensor([0.0, 250.0, 999.9])
    x = diffusion.add_noise(x0, noise, t)
    torch.testing.assert_close(x[0], x0[0])
    torch.testing.assert_close(x[1], 0.75 * x0[1] + 0.25 * noise[1])
    torch.testing.assert_close(diffusion.loss(noise - x0, x0, noise, t)["loss"], torch.zeros(3))


def test_the_variational_term_is_the_divergence_of_the_two_normals():
    """Against torch.distributions, in float64 from the definitions."""
    diffusion = Diffusion()
    x0, noise = tensors()
    t = torch.tensor([1, 100, 500, 999])
    output = 0.5 * rng.normal(9, "output", torch.arange(4), (8, 6, 6))
    abar = diffusion.gaussian.alphas_cumprod
    now, before = abar[t][:, None, None, None], abar[t - 1][:, None, None, None]
    beta = 1 - now / before
    x = now.sqrt() * x0 + (1 - now).sqrt() * noise
    clean = (x - (1 - now).sqrt() * output[:, :4]) / now.sqrt()
    variance = beta * (1 - before) / (1 - now)
    log_variance = (output[:, 4:] + 1) / 2 * beta.log() + (1 - output[:, 4:]) / 2 * variance.log()

    def posterior(x0):
        return (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * x) / (1 - now)

    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(posterior(x0.double()), variance.sqrt()),
        torch.distributions.Normal(posterior(clean), (0.5 * log_variance).exp()),
    ).mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(diffusion.loss(output, x0, noise, t)["vb"], divergence.float(), rtol=1e-3, atol=1e-6)


def test_at_the_first_timestep_the_variational_term_is_the_likelihood_of_the_bin():
    diffusion = Diffusion()
    x0, noise = tensors()
    x0 = x0.clamp(-0.99, 0.99)
    t = torch.zeros(4, dtype=torch.long)
    output = torch.cat([noise, torch.ones_like(noise)], dim=1)  # the right mean, the greatest variance
    vb = diffusion.loss(output, x0, noise, t)["vb"]
    beta = float(diffusion.gaussian.betas[0])
    normal = torch.distributions.Normal(0, beta**0.5)
    bits = -math.log2(float(normal.cdf(torch.tensor(1 / 255)) - normal.cdf(torch.tensor(-1 / 255))))
    torch.testing.assert_close(vb, torch.full((4,), bits), rtol=0.02, atol=0)


def test_the_variational_term_trains_the_variance_alone():
    diffusion = Diffusion()
    x0, noise = tensors()
    output = rng.normal(9, "output", torch.arange(4), (8, 6, 6)).requires_grad_()
    vb = diffusion.loss(output, x0, noise, torch.tensor([0, 1, 500, 999]))["vb"].sum()
    (gradient,) = torch.autograd.grad(vb, output)
    assert not gradient[:, :4].any()
    assert gradient[:, 4:].abs().amax(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("zero", [False, True])
def test_losses_are_finite_at_every_timestep(zero):
    for schedule in ("linear", "cosine"):
        diffusion = Diffusion(schedule=schedule, prediction="v", zero_terminal_snr=zero)
        x0, noise = tensors(1)
        x0, noise = x0.expand(1000, -1, -1, -1), noise.expand(1000, -1, -1, -1)
        output = torch.cat([noise, noise.clamp(-1, 1)], dim=1)
        assert all(term.isfinite().all() for term in diffusion.loss(output, x0, noise, torch.arange(1000)).values())


def test_a_bfloat16_output_is_widened_before_anything_is_computed_from_it():
    x0, noise = tensors()
    output = torch.cat([noise, noise], dim=1).bfloat16()
    t = torch.tensor([1, 10, 100, 999])
    wide = Diffusion().loss(output.float(), x0, noise, t)
    for name, term in Diffusion().loss(output, x0, noise, t).items():
        assert term.dtype == torch.float32
        assert torch.equal(term, wide[name])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"schedule": "sigmoid"}, "schedule"),
        ({"prediction": "x0"}, "prediction"),
        ({"loss_weight": "p3"}, "loss_weight"),
        ({"num_timesteps": 1}, "num_timesteps"),
        ({"schedule": "flow"}, "prediction"),
        ({"prediction": "flow", "learned_variance": False}, "prediction"),
        ({"schedule": "flow", "prediction": "flow"}, "learned_variance"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"loss_weight": "p2"}, "loss_weight"),
    ],
)
def test_settings_that_do_not_go_together_are_named(options, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        Diffusion(**options)


def test_an_output_without_its_variance_is_named():
    x0, noise = tensors()
    with pytest.raises(ValueError, match="output: 4 channels, but learned_variance True on 4-channel latents needs 8"):
        Diffusion().loss(x0, x0, noise, torch.zeros(4, dtype=torch.long))
