"""A sampler as numbers is that sampler, and fitted numbers are refused where they do not fit."""

from itertools import product

import pytest
import torch

from fpdm import Diffusion, SamplerSettings, build_sampler, rng
from fpdm.calibration import linear_form
from fpdm.fitted import Coefficients

PROCESSES = {
    "epsilon": Diffusion(prediction="epsilon", learned_variance=False),
    "v": Diffusion(prediction="v", learned_variance=False),
    "clean": Diffusion(prediction="clean", learned_variance=False),
    "zero terminal SNR": Diffusion(prediction="v", zero_terminal_snr=True, learned_variance=False),
    "flow": Diffusion(schedule="flow", prediction="flow", learned_variance=False),
}
SAMPLERS = {
    "ddim": ("ddim", SamplerSettings()),
    **{f"order {order}": ("multistep", SamplerSettings(order=order, spacing="trailing")) for order in (1, 2, 3)},
}


def drawn(sampler, steps):
    """The end of a run whose network is a function of x and t that is not linear."""
    x = rng.normal(0, "start", torch.arange(3), (2, 4, 4)).double()
    for i, t in enumerate(sampler.timesteps):
        x = sampler.step(i, torch.sin(3 * x + t / 300), x, None)
    return x


@pytest.mark.parametrize(
    ("process", "name"),
    [pair for pair in product(PROCESSES, SAMPLERS) if pair != ("flow", "ddim")],  # ddim is of the others
)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_sampler_as_numbers_draws_what_the_sampler_draws(process, name, steps):
    diffusion, (sampler, settings) = PROCESSES[process], SAMPLERS[name]
    own = build_sampler(diffusion, sampler, steps, settings)
    form = linear_form(build_sampler(diffusion, sampler, steps, settings))
    fitted = build_sampler(diffusion, "fitted", steps, SamplerSettings(coefficients=form))
    assert fitted.timesteps == tuple(own.timesteps)
    torch.testing.assert_close(drawn(fitted, steps), drawn(own, steps), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "steps", "coefficients", "message"),
    [
        ("fitted", 2, None, "'fitted' needs the coefficients"),
        ("ddim", 1, ((0.0,), (1.0,), ((1.0,),)), "coefficients: are of sampler fitted, not ddim"),
        ("fitted", 2, ((0.0,), (1.0,), ((1.0,),)), "num_steps: 2, and the sampler was fitted for 1"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(name, steps, coefficients, message):
    if coefficients is not None:
        coefficients = Coefficients(**dict(zip(("timesteps", "kept", "weights"), coefficients, strict=True)))
    with pytest.raises(ValueError, match=message):
        build_sampler(PROCESSES["v"], name, steps, SamplerSettings(coefficients=coefficients))


@pytest.mark.parametrize("weights", [(), ((1.0,), (1.0,)), ((1.0, 1.0), (1.0,))])
def test_each_step_weighs_what_the_network_gave_so_far(weights):
    with pytest.raises(ValueError, match="coefficients: 2 timesteps"):
        Coefficients(timesteps=(9.0, 0.0), kept=(1.0, 1.0), weights=weights)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "a", None])
def test_what_is_no_finite_number_is_refused(bad):
    with pytest.raises(ValueError, match="is no finite number"):
        Coefficients(timesteps=(9.0,), kept=(1.0,), weights=((bad,),))
