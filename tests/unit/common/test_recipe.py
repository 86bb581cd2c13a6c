"""A recipe is right, or one line says what is wrong with it."""

from pathlib import Path

import pytest

from common.errors import UserError
from common.loading import differences, dump_recipe, load_recipe, parse_recipe
from common.recipe import denoiser_config, node_counts, with_world_size
from pipeline.training.ema import ema_decay

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\ndata: {label_field: cls}", "data.label_field: is for webdataset, parquet, imagenet, and"),
        (
            "name: a\ndata: {source: folder, label_field: cls}",
            "data.label_field: is for webdataset, parquet, imagenet, and data.source is folder, which has `none`",
        ),
        (
            "name: a\ndata: {source: lsun, label_field: none}",
            "data.label_field: is for webdataset, parquet, imagenet, and",
        ),
        (
            "name: a\ndata: {source: folder, image_field: none}",
            "data.image_field: is for webdataset, parquet, imagenet, and",
        ),
        (
            "name: a\ndata: {source: ffhq, image_field: jpg}",
            "data.image_field: is for webdataset, parquet, imagenet, and data.source is ffhq",
        ),
        (
            "name: a\ndata: {source: parquet, follow_links: true}",
            "data.follow_links: is for images in folders, and data.source is parquet",
        ),
        ("name: a\ntrain: {batch_szie: 4}", "train.batch_szie: unknown key; did you mean train.batch_size?"),
        ("name: a\nfoo: 1", "foo: unknown key; allowed: data, demo, "),
        ("name: a\ntrain: {batch_size: 64.5}", "train.batch_size: should be a valid integer; found 64.5"),
        ("name: a\ntrain: {batch_size: true}", "train.batch_size: should be a valid integer; found True"),
        ("name: a\ntrain: {batch_size: 0}", "train.batch_size: should be greater than or equal to 1; found 0"),
        ("name: a\nmodel: {kind: unet}", "model.kind: should be 'fpdm' or 'dit'; found 'unet'"),
        ("seed: 3", "name: missing; every recipe states it"),
        (
            "name: ../out",
            "name: should be at most 100 letters, digits, '.', '_' and '-', beginning with a letter or digit; fo",
        ),
        ("name: a\ntrain: {log: 5}", "train.log: is a section, with the fields every_samples, tensorboard, "),
        ("name: a\ntrain: {ema: {decays: 0.9}}", "train.ema.decays: should be a list, as [1, 2]; found 0.9"),
        ("name: a\ntrain: {optimizer: {betas: [0.9]}}", "train.optimizer.betas: too few values, no number 2"),
        ("name: a\ndata: {resolution: 100}", "data.resolution: 100 is not a multiple of vae.downsampling, 8"),
        ("name: a\nmodel: {patch_size: 3}", "model.patch_size: 3 does not divide the latents' side of 32"),
        ("name: a\nmodel: {size: null, hidden_size: 100, num_heads: 3}", "model.hidden_size: 100"),
        ("name: a\nobjective: {prediction: epsilon}", "objective.zero_terminal_snr: with no signal left"),
        (
            "name: a\nsample: {weights: newest}",
            "sample.weights: should be 'latest' or should be a valid integer; found 'newest'",
        ),
        ("name: a\nsample: {num_steps: 1001}", "sample.num_steps: 1001 is outside 1..1000"),
        ("name: a\nsample: {allocation: calibrated}", "sample.allocation: 'calibrated' compares samples with those of"),
        (
            "name: a\nsample: {allocation: calibrated, sampler: ddim, guidance_scale: 2, guidance_interval: [0.1, 1]}",
            "sample.allocation: 'calibrated' compares ways of equal blocks",
        ),
        *(
            (
                f"name: a\nsample: {{allocation: calibrated, sampler: ddim, {field}: {value}}}",
                f"sample.{field}: allocation 'calibrated' fits a sampler without it; set it to {usual}",
            )
            for field, value, usual in (
                ("solver", "anderson", "picard"),
                ("tolerance", 0.1, "null"),
                ("reuse", "none", "always"),
            )
        ),
        (
            "name: a\nsample: {allocation: list, num_steps: 2, iterations: [0, 2]}",
            "sample.iterations: [0, 2] must be whole numbers of at least 0, and 1 in the first step",
        ),
        (
            "name: a\nsample: {allocation: list, num_steps: 2, iterations: [2, 0], reuse: none}",
            "sample.iterations: a step of none reads out the last one's solution; set reuse to 'always'",
        ),
        (
            "name: a\nsample: {allocation: adaptive, num_steps: 4, iterations: 0.5}",
            "sample.iterations: allocation 'adaptive' gives each step at least 1",
        ),
        ("name: a\nmodel: {kind: dit}\ntrain: {sparse_tokens: 0.5}", "train.sparse_tokens: a DiT has no iterations; s"),
        (
            "name: a\ntrain: {dense_end: 0.1}",
            "train.dense_end: with train.sparse_tokens 1 all of the training is",
        ),
        ("name: a\nsample: {guidance_channels: 5}", "sample.guidance_channels: 5 is outside 1..4"),
        (
            "name: a\nsample: {guidance_interval: [0.9, 0.1]}",
            "sample.guidance_interval: its first bound, 0.9, is above",
        ),
        (
            "name: a\nevaluate: {bootstrap: 1}",
            "evaluate.bootstrap: should be 0 or should be greater than",
        ),
        ("name: a\nseed: 5000000000", "seed: should be less than 4294967296"),
        ("name: a\ntrain: {optimizer: {betas: [0.9, 1.0]}}", "train.optimizer.betas.1: should be less than 1"),
        (
            "name: a\ntrain: {optimizer: {learning_rate: .inf}}",
            "train.optimizer.learning_rate: should be a finite number",
        ),
        (
            "name: a\nobjective: {schedule: flow, prediction: flow, zero_terminal_snr: false, learned_variance: false}",
            "sample.sampler: 'ddpm' does not fit prediction 'flow'",
        ),
        ("name: a\ntrain: {gradient: jfb}", "train.max_grad_iterations: 6 with train.gradient jfb, which has one"),
        ("name: a\ntrain: {max_hours: 0}", "train.max_hours: should be greater than 0"),
        (
            "name: a\nmodel: {kind: dit}\ntrain: {gradient: multi_step}",
            "train.gradient: multi_step, and a DiT has no fixed point; leave it out",
        ),
        ("name: a\nextends: [b.yaml]", "extends: ['b.yaml']; it names one recipe"),
        ("name: a\ntrain: {label_dropout: 1}", "train.label_dropout: should be less than 1"),
        ("- a list", "holds list, but a recipe is a mapping"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_a_wrong_recipe_is_explained_in_one_line(text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        load_recipe("nowhere.yaml")


def test_overrides_replace_single_fields_in_order() -> None:
    recipe = parse_recipe(
        "name: a",
        [
            "train.batch_size=64",
            "train.batch_size=32",
            "train.optimizer.learning_rate=1e-3",
            "train.optimizer.betas=[0.9, 0.95]",
        ],
    )
    assert (recipe.train.batch_size, recipe.train.optimizer.learning_rate, recipe.train.optimizer.betas) == (
        32,
        1e-3,
        (0.9, 0.95),
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_size", "not an override"),
        ("=3", "not an override"),
        ("name.first=3", "name is a value, not a section"),
        ("train.batch_size={", "not readable as a YAML value"),
        ("train.optimizer.learning_rate=fast", "train.optimizer.learning_rate: should be a valid number"),
        ("train.optimizer.betas=0.9,0.99", r"betas: should be a list.*; write \[0.9, 0.99\]"),
        ("train.batch_size=64.0", "train.batch_size: should be a valid integer; found 64.0; write 64"),
        ("train.label_dropout=2.0", "train.label_dropout: should be less than 1; found 2.0$"),
        ("name=a,b", "name: should be at most .*; found 'a,b'$"),
        ("sweep.budgets=[]", "sweep.budgets: is empty; name at least one value"),
        ("sample.iterations=[1, 2]", "sample.iterations: .* only allocation 'list' takes a list"),
        ("sample.guidance_interval=[1, 0]", "guidance_interval: its first bound, 1, is above its second, 0; swap them"),
        ("launch.elastic=1", "launch.elastic: should be a valid boolean"),
        ("data.shards=data/images", "data.shards: data/images is data.images, or in it"),
        ("data.shards=data/images/a/b", "data.shards: data/images/a/b is data.images, or in it"),
        ("model.mlp_ratio=0.0001", "model.mlp_ratio: 0.0001 of 1152 channels leaves none"),
        # What would hang, or fill the memory, while the recipe is read.
        ("sample.num_steps=10000000000", "sample.num_steps: 10000000000 is outside 1..1000"),
        ("objective.num_timesteps=10000000000000", "objective.num_timesteps: should be less than or equal to 100000"),
        ("model.hidden_size=1000000000000", "model.hidden_size: should be less than or equal to 65536"),
        ("model.mlp_ratio=1e300", "model.mlp_ratio: should be less than or equal to 1000"),
        ("model.num_classes=1000000000000", "model.num_classes: should be less than or equal to 10000000"),
        ("sample.num_samples=1000000000000", "sample.num_samples: should be less than or equal to 1000000000"),
        ("train.batch_size=1000000000000", "train.batch_size: should be less than or equal to 10000000"),
    ],
)
def test_a_wrong_override_is_explained(override: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse_recipe("name: a", [override])


NULL_LABEL = "guidance_scale: {} with train.label_dropout 0, whose network never sees the null label"
ONE_CLASS = "guidance_scale: {} with model.num_classes 1: a single class says no more than the null label"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("train.label_dropout=0", "sample.guidance_scale=4"), f"sample.{NULL_LABEL.format(4)}"),
        (("train.label_dropout=0.0", "sample.guidance_scale=0"), f"sample.{NULL_LABEL.format(0)}"),
        (("train.label_dropout=0", "sweep.guidance_scale=[1, 1.5]"), f"sweep.{NULL_LABEL.format(1.5)}"),
        (("model.num_classes=1", "sample.guidance_scale=2"), f"sample.{ONE_CLASS.format(2)}"),
        (("model.num_classes=1", "sweep.guidance_scale=[3]"), f"sweep.{ONE_CLASS.format(3)}"),
        (
            ("sample.guidance_scale=2", "sample.guidance_interval=[0.5, 0.5]"),
            "sample.guidance_interval: [0.5, 0.5] holds none of the 28 steps",
        ),
    ],
)
def test_guidance_that_the_network_cannot_give_is_refused(overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_recipe("name: a", overrides)
    assert expected in str(raised.value)


@pytest.mark.parametrize("others", [("model.num_classes=1",), ("train.label_dropout=0",), ("sample.guidance_scale=2",)])
def test_guidance_is_refused_for_nothing_else(others: tuple[str, ...]) -> None:
    assert parse_recipe("name: a", others)


def test_a_recipe_has_what_it_says_over_what_the_one_says_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\nseed: 3\ntrain: {batch_size: 8, ema: {decays: [0.9]}}\n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/one.yaml").write_text("extends: ../base.yaml\nname: one\ntrain: {ema: {widths: [0.1]}}\n")
    (tmp_path / "two.yaml").write_text("extends: below/one.yaml\nname: two\ntrain: {batch_size: 4}\n")
    recipe = load_recipe(tmp_path / "two.yaml", ["seed=5"])
    assert (recipe.name, recipe.seed, recipe.train.batch_size) == ("two", 5, 4)
    assert (recipe.train.ema.decays, recipe.train.ema.widths) == ((0.9,), (0.1,))


def test_an_average_is_named_by_all_digits_of_its_number() -> None:
    """Training reads the number from the name again, and rounded to 1 an average would never move."""
    train = parse_recipe("name: a", ["train.ema.decays=[0.9999, 0.9999998, 1.0e-5]", "train.ema.widths=[0.05]"]).train
    assert train.ema.names == ["0.9999", "0.9999998", "1e-05", "power-0.05"]
    decays = [ema_decay(name, 512, 0, 512) for name in train.ema.names[:3]]
    assert decays == pytest.approx([0.9999, 0.9999998, 1e-5], rel=1e-9)


def test_a_recipe_that_extends_itself_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\nname: a\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nname: b\n")
    with pytest.raises(UserError, match=r"b\.yaml: extends: a\.yaml extends this recipe in turn"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").unlink()
    with pytest.raises(UserError, match=r"b\.yaml: No such file"):
        load_recipe(tmp_path / "a.yaml")


RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_loads_and_survives_being_written(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem or load_recipe(path.with_stem(recipe.name)).name == recipe.name  # or of that run
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_the_defaults_are_the_papers() -> None:
    default = parse_recipe("name: a")
    assert (default.objective.prediction, default.objective.zero_terminal_snr) == ("v", True)
    assert not default.model.pre_post_timestep_conditioning
    assert (default.train.max_no_grad_iterations, default.train.max_grad_iterations) == (6, 6)
    paper = load_recipe(ROOT / "recipes/paper/imagenet_fpdm.yaml")
    assert (paper.train.max_no_grad_iterations, paper.train.max_grad_iterations) == (12, 12)
    assert paper.objective == default.objective


@pytest.mark.parametrize("name", ["ffhq256", "celebahq256", "lsun_church256"])
def test_defect_c10_an_unconditional_recipe_needs_no_word_about_guidance(name: str) -> None:
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml")
    assert recipe.model.num_classes == 1
    assert recipe.sample.guidance_scale == 1


def test_a_size_sets_the_network_and_single_fields_override_it() -> None:
    recipe = parse_recipe("name: a\nmodel: {size: B, hidden_size: 384, num_heads: 6, num_classes: 10}")
    config = denoiser_config(recipe)
    assert (config.hidden_size, config.num_heads, config.depth) == (384, 6, 12)


def test_ranks_must_divide_the_batch_and_micro_batches_a_ranks_share() -> None:
    recipe = parse_recipe("name: a\ntrain: {batch_size: 64}")
    assert with_world_size(recipe, 4).train.micro_batch_size == 16
    with pytest.raises(ValueError, match=r"train\.batch_size: 64 is not divisible by the 3 ranks; use 63"):
        with_world_size(recipe, 3)
    with pytest.raises(ValueError, match=r"train\.micro_batch_size: 5 does not divide a rank's share of 32"):
        with_world_size(parse_recipe("name: a\ntrain: {batch_size: 64, micro_batch_size: 5}"), 2)


def test_elastic_training_goes_on_with_nodes_that_share_the_batch_in_no_larger_micro_batches() -> None:
    launch = "launch: {nodes: 4, processes: 8, elastic: %s}"
    elastic = parse_recipe(f"name: a\ntrain: {{batch_size: 192}}\n{launch % 'true'}")
    assert node_counts(elastic) == [4, 3, 2, 1]
    assert [with_world_size(elastic, ranks).train.micro_batch_size for ranks in (32, 24, 16, 8)] == [6, 4, 6, 6]
    assert with_world_size(parse_recipe("name: a\ntrain: {batch_size: 192}"), 8).train.micro_batch_size == 24
    assert node_counts(parse_recipe(f"name: a\ntrain: {{batch_size: 256}}\n{launch % 'true'}")) == [4, 2, 1]


def test_what_differs_from_the_defaults_is_all_that_a_recipe_says() -> None:
    recipe = load_recipe(ROOT / "recipes/demo.yaml", ["seed=7", "train.optimizer.betas=[0.8, 0.9]"])
    lines = differences(recipe)
    assert "train.batch_size: 64 (default 512)" in lines
    assert "train.optimizer.betas: [0.8, 0.9] (default [0.9, 0.999])" in lines
    assert "demo.per_class: 1024" in lines
    overrides = [line.partition(" (default ")[0].replace(": ", "=", 1) for line in lines]
    assert parse_recipe("name: a", overrides) == recipe
