"""The implicit layer: solvers, residuals, stopping, and the S-JFB gradient."""

import itertools
import statistics
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fpdm import DenoiserConfig, build_denoiser, rng, sjfb_counts
from fpdm.blocks import unpatchify
from fpdm.fixed_point import growth, solve_implicit

CONFIG = DenoiserConfig(input_size=8, hidden_size=32, num_heads=4, num_classes=5)


def affine(rate):
    """A contraction with a rate (B, 1, 1) for each sample and fixed point 1."""

    def step(x, rows):
        r = rate if rows is None else rate[rows]
        return r * (x - 1) + 1

    return step


def network(scale=0.1):
    model = build_denoiser(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(scale * rng.normal(0, name, torch.arange(len(parameter)), tuple(parameter.shape[1:])))
    return model


def inputs(batch=3):
    index = torch.arange(batch)
    return rng.normal(0, "x", index, (4, 8, 8)), rng.integers(0, "t", index, 1000), rng.integers(0, "y", index, 5)


def gradients(model, **options):
    output = model(*inputs(), **options).output
    return torch.autograd.grad(output.square().sum(), list(model.parameters()))


def test_plain_iteration_applies_the_map_that_many_times():
    start = torch.zeros(2, 3, 4)
    rate = torch.tensor([0.5, 0.9])[:, None, None]
    assert solve_implicit(affine(rate), start, 0).value is not None
    for count in (0, 1, 7):
        value = solve_implicit(affine(rate), start, count).value
        torch.testing.assert_close(value, (1 - rate**count).expand_as(start))


def test_residuals_are_relative_per_sample_and_iteration():
    rate = torch.tensor([0.5, 0.9])[:, None, None]
    residuals = solve_implicit(affine(rate), torch.zeros(2, 3, 4), (2, 2), with_residuals=True).residuals
    k = torch.arange(4)
    expected = [r**k * (1 - r) / (1 - r ** (k + 1)) for r in (0.5, 0.9)]
    torch.testing.assert_close(residuals, torch.stack(expected))


def test_a_sample_stops_at_its_own_tolerance_and_leaves_the_batch():
    seen = []
    rate = torch.tensor([0.1, 0.9, 0.5])[:, None, None]

    def step(x, rows):
        seen.append([0, 1, 2] if rows is None else rows.tolist())
        return affine(rate)(x, rows)

    solution = solve_implicit(step, torch.zeros(3, 2, 2), 12, tolerance=1e-2, with_residuals=True)
    evaluated = (~solution.residuals.isnan()).sum(1).tolist()
    assert evaluated == [3, 12, 7]
    assert seen == [[0, 1, 2]] * 3 + [[1, 2]] * 4 + [[1]] * 5
    for sample, count in enumerate(evaluated):
        alone = solve_implicit(affine(rate[sample : sample + 1]), torch.zeros(1, 2, 2), count).value
        assert torch.equal(solution.value[sample : sample + 1], alone)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_stopping_does_not_depend_on_the_batch(solver):
    model = network()
    x, t, y = inputs(6)
    options = {"iterations": 30, "solver": solver, "tolerance": 1e-3, "with_residuals": True}
    with torch.no_grad():
        together = model(x, t, y, **options)
        counts = (~together.residuals.isnan()).sum(1)
        assert (counts < 30).all()
        for i in range(6):
            alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1], **options)
            assert (~alone.residuals.isnan()).sum() == counts[i]
            torch.testing.assert_close(alone.output[0], together.output[i], rtol=1e-4, atol=1e-5)


def test_a_diverging_sample_is_not_taken_for_finished():
    rate = torch.tensor([0.1, torch.nan])[:, None, None]
    residuals = solve_implicit(affine(rate), torch.zeros(2, 2, 2), 6, tolerance=1e-1, with_residuals=True).residuals
    seen = []
    solve_implicit(lambda x, rows: seen.append(len(x)) or affine(rate)(x, rows), torch.zeros(2, 2, 2), 6, tolerance=0.1)
    assert seen == [2, 2, 1, 1, 1, 1]
    assert residuals[0, 2:].isnan().all()


def test_anderson_reaches_the_fixed_point_in_fewer_iterations_than_the_plain_one():
    # A linear map in four dimensions: Anderson with a window of five solves it almost exactly in five iterations.
    matrix = torch.diag(torch.tensor([0.95, 0.7, -0.6, 0.2], dtype=torch.float64))
    fixed_point = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - matrix, torch.ones(4, dtype=torch.float64))

    def error(solver, count):
        start = torch.zeros(1, 1, 4, dtype=torch.float64)
        value = solve_implicit(lambda x, rows: x @ matrix.T + 1, start, count, solver=solver).value
        return float((value - fixed_point).norm() / fixed_point.norm())

    assert error("anderson", 8) < 1e-3 < 0.5 < error("picard", 8)


@pytest.mark.parametrize("n", [0, 3])
def test_sjfb_is_the_gradient_of_the_last_m_iterations_from_a_constant_start(n):
    model = network()
    start = model(*inputs(), iterations=(n, 0)).solution.detach()
    for found, expected in zip(
        gradients(model, iterations=(n, 2)), gradients(model, iterations=2, start=start), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_sjfb_equals_autograd_through_a_plain_transcription():
    """z = Block(fc2(GELU(fc1[z, injection])), c), everything recomputed in each iteration, start detached."""
    model = network()
    x, t, y = inputs()
    label = model.y_embedder(y)
    c = model.t_embedder(t, torch.float32) + label
    pre, block, post = model.blocks_pre[0], model.block_fixed_point, model.blocks_post[0]
    tokens = model.x_embedder(x) + model.pos_embed
    tokens, _ = pre(tokens, pre.modulation(label))
    fc1, fc2 = model.block_fixed_point_projection_fc1, model.block_fixed_point_projection_fc2

    def iterate(z):
        joined = torch.cat([z, model.block_pre_projection(tokens)], dim=-1)
        hidden = nn.functional.gelu(nn.functional.linear(joined, fc1.weight, fc1.bias), approximate="tanh")
        return block(fc2(hidden), block.modulation(c))[0]

    z = tokens.detach()
    with torch.no_grad():
        for _ in range(3):
            z = iterate(z)
    for _ in range(2):
        z = iterate(z)
    z, _ = post(z, post.modulation(label))
    output = unpatchify(model.final_layer(z, label), CONFIG.patch_size)
    expected = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    for found, wanted in zip(gradients(model, iterations=(3, 2)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient_for_any_counts():
    """So that data parallel training needs no search for unused parameters."""
    model = network()
    for n, m in itertools.product((0, 3), (1, 4)):
        assert all(gradient.abs().max() > 0 for gradient in gradients(model, iterations=(n, m)))


def test_activation_checkpointing_changes_memory_not_gradients():
    model = network()
    plain, saved = (
        gradients(model, iterations=(1, 3)),
        gradients(model, iterations=(1, 3), activation_checkpointing=True),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))
    assert saved_bytes(model, (0, 6), activation_checkpointing=True) < 0.5 * saved_bytes(model, (0, 6))


def saved_bytes(model, iterations, **options):
    """Bytes of distinct storages that the graph keeps for the backward pass, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs(8), iterations=iterations, **options).output
    assert output.requires_grad
    return sum(kept.values())


def test_the_graph_does_not_grow_with_the_iterations_without_gradient():
    model = network()
    assert saved_bytes(model, (12, 1)) == saved_bytes(model, (1, 1))
    assert saved_bytes(model, (0, 6)) > 2 * saved_bytes(model, (0, 1))


PEAK = """
import sys, torch
def peak():  # of this program alone; getrusage's peak remembers the process that started it
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
torch.set_num_threads(1)
from fpdm import DenoiserConfig, build_denoiser
config = DenoiserConfig(input_size=32, hidden_size=192, num_heads=3, num_classes=2)
model = build_denoiser(config)
x, t, y = torch.ones(4, 4, 32, 32), torch.zeros(4), torch.zeros(4, dtype=torch.long)
n, m = int(sys.argv[1]), int(sys.argv[2])
model(x, t, y, iterations=(0, 1)).output.sum().backward()
before = peak()
model(x, t, y, iterations=(n, m)).output.sum().backward()
print(peak() - before)
"""


def test_peak_memory_does_not_grow_with_the_iterations_without_gradient():
    def growth(n, m):
        command = [sys.executable, "-c", PEAK, str(n), str(m)]
        return int(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)

    with_graph = growth(0, 12)
    assert with_graph > 30_000  # KiB; so that the comparison says something
    assert growth(12, 1) < 0.25 * with_graph


def test_counts_are_the_same_on_every_rank_and_as_drawn_in_algorithm_1():
    """Ranks share nothing but (seed, step): another interpreter draws the same 1,000 pairs."""
    code = "from fpdm import sjfb_counts; print([sjfb_counts(3, step, 6, 6) for step in range(1000)])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True).stdout
    assert other.strip() == repr([sjfb_counts(3, step, 6, 6) for step in range(1000)])


def test_counts_have_the_range_and_mean_of_algorithm_1():
    draws = [sjfb_counts(3, step, 6, 4) for step in range(3000)]
    without, with_graph = zip(*draws, strict=True)
    assert set(without) == set(range(7))
    assert set(with_graph) == set(range(1, 5))
    assert statistics.mean(without) == pytest.approx(3, abs=4 * 2 / 3000**0.5)
    assert statistics.mean(with_graph) == pytest.approx(2.5, abs=4 * 1.12 / 3000**0.5)
    assert draws != [sjfb_counts(4, step, 6, 4) for step in range(3000)]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: sjfb_counts(0, 0, -1, 1), "max_no_grad"),
        (lambda: sjfb_counts(0, 0, 0, 0), "max_grad"),
        (lambda: solve_implicit(affine(torch.zeros(1)), torch.zeros(1, 1, 1), -1), "iterations"),
        (lambda: solve_implicit(affine(torch.zeros(1)), torch.zeros(1, 1, 1), 1, solver="broyden"), "solver"),
        (lambda: solve_implicit(affine(torch.zeros(1)), torch.zeros(1, 1, 1), (1, 1), tolerance=0.1), "tolerance"),
    ],
)
def test_impossible_settings_are_named(call, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        call()


def test_an_intermediate_iterate_is_that_of_fewer_iterations_with_its_graph():
    weight = torch.full((), 0.5, requires_grad=True)

    def step(x, rows):
        return weight * x + 1

    start = torch.zeros(1, 1, 1)
    solution = solve_implicit(step, start, (2, 3), intermediate=2, with_residuals=True)
    assert torch.equal(solution.intermediate, solve_implicit(step, start, (2, 2)).value)
    assert torch.equal(solution.value, solve_implicit(step, start, (2, 3)).value)
    assert solution.residuals.shape == (1, 5)
    expected = torch.autograd.grad(solve_implicit(step, start, (2, 2)).value.sum(), weight)
    assert torch.autograd.grad(solution.intermediate.sum(), weight) == expected


@pytest.mark.parametrize(
    ("iterations", "options"), [((2, 3), {}), (3, {}), (4, {"solver": "anderson"}), (4, {"tolerance": 0.1})]
)
def test_an_intermediate_iterate_must_be_followed_by_another_of_a_plain_iteration(iterations, options):
    with pytest.raises(ValueError, match=r"^intermediate: 3 "):
        solve_implicit(lambda x, rows: x, torch.zeros(1, 1, 1), iterations, intermediate=3, **options)


def test_growth_is_what_an_iteration_leaves_of_the_slowest_change_of_each_sample():
    rates = torch.tensor([[0.9, 0.5, -0.2], [1.1, 0.3, 0.3]])  # by sample and channel; one sample moves away
    scale = torch.tensor(1.0, requires_grad=True)
    measured = growth(lambda x, rows: scale * rates[:, None] * (x - 1) + 1, torch.zeros(2, 4, 3))
    assert measured.tolist() == pytest.approx([0.9, 1.1], rel=1e-4)  # 0.5 / 0.9 has died out after 20 iterations
    (slope,) = torch.autograd.grad(measured.sum(), scale)
    assert float(slope) == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("rest", [0.0, 1e4])
def test_growth_of_an_iteration_that_rests_is_finite_and_so_is_its_gradient(rest):
    scale = torch.tensor(0.0, requires_grad=True)
    measured = growth(lambda x, rows: scale * x + rest, torch.full((2, 4, 3), rest))
    assert measured.tolist() == [0, 0]
    assert torch.autograd.grad(measured.sum(), scale)[0].isfinite()


def test_growth_leaves_the_output_as_it_is():
    model = network()
    plain, both = (model(*inputs(), iterations=(1, 2), with_growth=wanted) for wanted in (False, True))
    assert torch.equal(plain.output, both.output)
    assert plain.growth is None
    assert both.growth.shape == (3,)
