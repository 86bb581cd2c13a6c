"""The networks: sizes, conditions, and that nothing about an answer is hidden or random."""

import pytest
import torch

from fpdm import SIZES, DenoiserConfig, build_denoiser, count_parameters, rng

SMALL = {"input_size": 8, "hidden_size": 32, "num_heads": 4, "num_classes": 5}

MODERN = [
    {"norm": "rms"},
    {"qk_norm": True},
    {"rope": True},
    {"mlp": "swiglu"},
    {"value_residual": True},
    {"injection": "decay"},
]

# Counted in the published code; the unconditional XL/2 is the paper's "85M".
PUBLISHED_COUNTS = {
    "XL": (674_834_720, 38_689_952, 86_500_256, 134_310_560, 229_931_168, 85_349_408),
    "L": (457_840_672, 30_721_056, 68_500_512, 106_279_968, 181_838_880, 67_477_536),
    "B": (130_315_808, 17_535_776, 38_792_480, 60_049_184, 102_562_592, 38_025_248),
    "S": (32_865_056, 4_639_136, 9_959_072, 15_279_008, 25_918_880, 9_575_456),
}


def scrambled(config, scale=0.1, seed=0):
    """A network without any zero initialisation for errors to hide behind."""
    model = build_denoiser(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draws = rng.normal(seed, name, torch.arange(len(parameter)), tuple(parameter.shape[1:]))
            parameter.copy_(scale * draws)
    return model


def inputs(batch, config, seed=0):
    index = torch.arange(batch)
    shape = (config.in_channels, config.input_size, config.input_size)
    x = rng.normal(seed, "x", index, shape)
    if config.condition_dim is None:
        y = rng.integers(seed, "y", index, config.num_classes)
    else:
        y = rng.normal(seed, "y", index, (config.condition_dim,))
    return x, rng.integers(seed, "t", index, 1000), y


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_published_ones(size):
    counts = [count_parameters(DenoiserConfig(kind="dit", **SIZES[size]))]
    counts += [count_parameters(DenoiserConfig(pre_depth=d, post_depth=d, **SIZES[size])) for d in (0, 1, 2, 4)]
    counts += [count_parameters(DenoiserConfig(num_classes=1, **SIZES[size]))]
    assert tuple(counts) == PUBLISHED_COUNTS[size]


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("condition_dim", [None, 7])
def test_every_patch_size_channel_count_and_condition_gives_an_output_of_the_latents_shape(
    kind, patch_size, condition_dim
):
    for channels, learned in ((4, True), (3, False)):
        config = DenoiserConfig(
            kind=kind,
            depth=2,
            input_size=16,
            patch_size=patch_size,
            hidden_size=32,
            num_heads=4,
            in_channels=channels,
            condition_dim=condition_dim,
            learned_variance=learned,
        )
        output = scrambled(config)(*inputs(3, config), iterations=2).output
        assert output.shape == (3, config.out_channels, 16, 16)
        assert output.isfinite().all()


@pytest.mark.parametrize("condition_dim", [None, 7])
def test_the_condition_and_the_null_condition_change_the_answer(condition_dim):
    config = DenoiserConfig(**SMALL, condition_dim=condition_dim)
    model = scrambled(config)
    x, t, y = inputs(3, config)
    answer = model(x, t, y, iterations=2).output
    for other in ((y + 1) % config.num_classes, config.null_condition(y)):
        assert ((model(x, t, other, iterations=2).output - answer).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_the_null_label_is_the_number_of_classes_for_any_batch():
    config = DenoiserConfig(**SMALL)
    assert config.null_condition(torch.tensor([0, 4, 2])).tolist() == [5, 5, 5]


def test_a_condition_vector_of_the_wrong_shape_is_named():
    config = DenoiserConfig(**SMALL, condition_dim=7)
    x, t, y = inputs(3, config)
    with pytest.raises(ValueError, match=r"y: shape \(3, 1, 7\) does not fit the network, which takes \(3, 7\)"):
        build_denoiser(config)(x, t, y[:, None], iterations=1)


def test_evaluation_is_deterministic_and_equals_training_mode():
    config = DenoiserConfig(**SMALL)
    model = scrambled(config)
    first = model.eval()(*inputs(3, config), iterations=5).output
    assert torch.equal(model.eval()(*inputs(3, config), iterations=5).output, first)
    assert torch.equal(model.train()(*inputs(3, config), iterations=5).output, first)


def test_timestep_conditioning_of_the_outer_layers_is_off_by_default_and_matters():
    off, on = DenoiserConfig(**SMALL), DenoiserConfig(**SMALL, pre_post_timestep_conditioning=True)
    assert not off.pre_post_timestep_conditioning
    answers = [scrambled(config)(*inputs(3, config), iterations=2).output for config in (off, on)]
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_without_timestep_conditioning_only_the_implicit_layer_knows_the_timestep():
    config = DenoiserConfig(**SMALL)
    model = scrambled(config)
    x, t, y = inputs(3, config)
    solution = model(x, t, y, iterations=2).solution
    late, early = (model(x, torch.full_like(t, time), y, iterations=0, start=solution).output for time in (10, 990))
    assert torch.equal(late, early)


def test_calls_share_no_state_and_a_start_of_another_batch_is_refused():
    config = DenoiserConfig(**SMALL)
    model = scrambled(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, t, y = inputs(3, config)
    first = model(x, t, y, iterations=3)
    assert torch.equal(model(x, t, y, iterations=3).output, first.output)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"start: shape \(3, 16, 32\) does not fit this batch, \(2, 16, 32\)"):
        model(x[:2], t[:2], y[:2], iterations=3, start=first.solution)


def test_the_number_of_iterations_is_required_and_can_be_zero():
    config = DenoiserConfig(**SMALL)
    model, given = scrambled(config), inputs(3, config)
    with pytest.raises(ValueError, match="iterations: an FPDM needs a count"):
        model(*given)
    nothing, one = model(*given, iterations=0), model(*given, iterations=1)
    assert torch.equal(model(*given, iterations=2, start=nothing.solution).output, model(*given, iterations=2).output)
    assert not torch.equal(nothing.output, one.output)


def test_starting_at_a_solution_continues_the_iteration():
    config = DenoiserConfig(**SMALL)
    model = scrambled(config)
    given = inputs(3, config)
    halfway = model(*given, iterations=3).solution
    continued = model(*given, iterations=2, start=halfway)
    torch.testing.assert_close(continued.output, model(*given, iterations=5).output)


def test_precomputing_the_injection_changes_nothing():
    config = DenoiserConfig(**SMALL)
    model = scrambled(config)
    x, t, y = inputs(3, config)
    with torch.no_grad():
        label = model.y_embedder(y)
        c = model.t_embedder(t, torch.float32) + label
        tokens = model.x_embedder(x) + model.pos_embed
        tokens, _ = model.blocks_pre[0](tokens, model.blocks_pre[0].modulation(label))
        z, injection = tokens, model.block_pre_projection(tokens)
        for _ in range(4):
            joined = torch.cat([z, injection], dim=-1)
            fc1 = model.block_fixed_point_projection_fc1
            hidden = torch.nn.functional.gelu(joined @ fc1.weight.T + fc1.bias, approximate="tanh")
            block = model.block_fixed_point
            z, _ = block(model.block_fixed_point_projection_fc2(hidden), block.modulation(c))
    torch.testing.assert_close(model(x, t, y, iterations=4).solution, z)


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
@pytest.mark.parametrize("option", MODERN, ids=lambda option: next(iter(option)))
def test_an_option_changes_the_answer_and_leaves_every_published_name(kind, option):
    """Options add parameters; names and shapes of the others stay, but for what the option replaces."""
    plain, config = (
        scrambled(DenoiserConfig(kind=kind, depth=2, **SMALL)),
        DenoiserConfig(kind=kind, depth=2, **SMALL, **option),
    )
    model = scrambled(config)
    assert ("injection" in option and kind == "dit") or not torch.equal(
        model(*inputs(2, config), iterations=3).output, plain(*inputs(2, config), iterations=3).output
    )
    names, published = dict(model.named_parameters()), dict(plain.named_parameters())
    replaced = {
        name for name in published if ("mlp.fc" in name and "mlp" in option) or "block_fixed_point_projection" in name
    }
    assert all(names[name].shape == published[name].shape for name in published.keys() - replaced)
    added = names.keys() - published.keys()
    assert all(
        name.rpartition(".")[2] in {"q_scale", "k_scale", "value_mix", "block_fixed_point_decay"} or "fc1_gated" in name
        for name in added
    )


@pytest.mark.parametrize("start", [0.0, 30.0])
def test_without_the_blocks_changes_decay_converges_to_the_same_point_from_any_start(start):
    config = DenoiserConfig(**SMALL, injection="decay")
    model = build_denoiser(config)  # every modulation is zero, so that the block is the identity
    x, t, y = inputs(2, config)
    begin = torch.full((2, config.num_tokens, config.hidden_size), start)
    answer = model(x, t, y, iterations=40, start=begin, with_residuals=True)
    tokens = model.x_embedder(x) + model.pos_embed
    torch.testing.assert_close(answer.solution, 2 * model.block_pre_projection(tokens))  # z = z / 2 + injection
    assert (answer.residuals[:, 20:].diff() <= 1e-7).all()


def test_values_of_the_first_block_reach_every_later_one():
    config = DenoiserConfig(**SMALL, value_residual=True)
    model, seen = scrambled(config), {}
    for name, module in model.named_modules():
        if name.endswith("attn"):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.update({name: (inputs[1], output[1])})
            )
    model(*inputs(2, config), iterations=2)
    first = seen["blocks_pre.0.attn"][1]
    assert seen["blocks_pre.0.attn"][0] is None
    assert not hasattr(model.blocks_pre[0].attn, "value_mix")  # or ranks would wait for a gradient that never comes
    assert seen["block_fixed_point.attn"][0] is first
    assert seen["blocks_post.0.attn"][0] is first


@pytest.mark.parametrize("option", MODERN, ids=lambda option: next(iter(option)))
def test_a_sample_that_leaves_the_batch_early_answers_as_alone(option):
    config = DenoiserConfig(**SMALL, **option)
    model = scrambled(config)
    x, t, y = inputs(5, config)
    together = model(x, t, y, iterations=30, tolerance=0.02, with_residuals=True)
    assert together.residuals.isnan().any()
    for i in range(5):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1], iterations=30, tolerance=0.02)
        torch.testing.assert_close(together.output[i : i + 1], alone.output, rtol=1e-3, atol=1e-4)


def test_initialisation_is_a_function_of_seed_and_name_and_begins_as_zero_output():
    config = DenoiserConfig(**SMALL)
    state = torch.random.get_rng_state()
    model, again, other = build_denoiser(config, seed=1), build_denoiser(config, seed=1), build_denoiser(config, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = zip(model.state_dict().items(), again.state_dict().values(), strict=True)
    assert all(torch.equal(value, twin) for (_, value), twin in pairs)
    assert not torch.equal(model.x_embedder.proj.weight, other.x_embedder.proj.weight)
    deeper = build_denoiser(DenoiserConfig(**SMALL, post_depth=2), seed=1)
    assert torch.equal(deeper.blocks_post[0].attn.qkv.weight, model.blocks_post[0].attn.qkv.weight)
    assert not model(*inputs(2, config), iterations=3).output.any()
    weight = model.block_fixed_point.mlp.fc1.weight
    assert weight.abs().max() <= (6 / sum(weight.shape)) ** 0.5  # Xavier's bound
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_bfloat16_parameters_take_float32_latents():
    config = DenoiserConfig(**SMALL)
    exact = scrambled(config)(*inputs(2, config), iterations=2).output
    rounded = scrambled(config).bfloat16()(*inputs(2, config), iterations=2).output
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kind": "unet"}, "kind"),
        ({"input_size": 9}, "input_size"),
        ({"num_heads": 5}, "hidden_size"),
        ({"hidden_size": 6, "num_heads": 1}, "hidden_size"),
        ({"pre_depth": -1}, "pre_depth"),
        ({"num_classes": 0}, "num_classes"),
        ({"condition_dim": 0}, "condition_dim"),
        ({"kind": "dit", "depth": 0}, "depth"),
        ({"norm": "batch"}, "norm"),
        ({"mlp": "relu"}, "mlp"),
        ({"injection": "sum"}, "injection"),
        ({"rope": True, "num_heads": 16}, "rope"),
        ({"value_residual": True, "pre_depth": 0}, "value_residual"),
        ({"self_conditioned": True, "kind": "dit", "qk_norm": True}, "self_conditioned"),
    ],
)
def test_a_config_that_cannot_be_names_its_field(options, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        DenoiserConfig(**{**SMALL, **options})


def test_inputs_that_do_not_fit_are_named():
    config = DenoiserConfig(**SMALL)
    model = build_denoiser(config)
    x, t, y = inputs(2, config)
    with pytest.raises(ValueError, match=r"x: shape \(2, 4, 8, 6\)"):
        model(x[..., :6], t, y, iterations=1)
    with pytest.raises(ValueError, match=r"t: shape \(1,\)"):
        model(x, t[:1], y, iterations=1)


def test_blocks_count_the_papers_unit_of_compute():
    assert DenoiserConfig(pre_depth=1, post_depth=2).blocks(8) == 11
    assert DenoiserConfig(kind="dit", depth=28).blocks(8) == 28


ALL_OPTIONS = [{}, {"rope": True, "qk_norm": True, "value_residual": True, "injection": "decay"}]


@pytest.mark.parametrize("options", ALL_OPTIONS)
@torch.no_grad()
def test_iterations_that_see_all_tokens_in_another_order_give_the_same_answer(options):
    config = DenoiserConfig(**SMALL, **options)
    model, arguments = scrambled(config), inputs(3, config)
    order = rng.uniform(0, "order", torch.arange(3), (config.num_tokens,)).argsort(dim=1)
    dense = model(*arguments, iterations=4, tolerance=1e-3)
    shuffled = model(*arguments, iterations=4, tolerance=1e-3, seen=order)
    assert torch.allclose(shuffled.solution, dense.solution, rtol=1e-4, atol=1e-5)
    assert torch.allclose(shuffled.output, dense.output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_sparse_iterations_leave_the_other_tokens_as_they_started_and_pass_their_gradient(options):
    config = DenoiserConfig(**SMALL, **options)
    model, arguments = scrambled(config), inputs(2, config)
    seen = torch.tensor([[0, 3, 5], [7, 2, 1]])
    start = model(*arguments, iterations=0).solution
    answer = model(*arguments, iterations=(1, 2), seen=seen, intermediate=1)
    changed = (answer.solution != start).any(dim=-1)
    assert [row.nonzero()[:, 0].tolist() for row in changed] == [sorted(row) for row in seen.tolist()]
    assert not torch.equal(answer.intermediate, answer.output)
    answer.output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
