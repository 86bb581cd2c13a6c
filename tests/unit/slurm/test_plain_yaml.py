"""A word in a recipe or a site file is what its field's type says, however YAML 1.1 would read it."""

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.loading import RENAMED, dump_recipe, load_recipe, parse_recipe
from common.recipe import VAE, Data, Evaluate, Recipe, Sample
from slurm.plain_yaml import read_yaml
from slurm.site_file import load_site, sbatch_options


def value_of(recipe: Recipe, dotted: str) -> Any:
    found: Any = recipe
    for part in dotted.split("."):
        found = getattr(found, part)
    return found


def both_ways(dotted: str, text: str) -> list[Recipe]:
    """The recipe that says `dotted: text`, as a file and as an override."""
    name = "" if dotted == "name" else "name: a\n"
    written = f"{dotted.replace('.', ': {')}: {text}{'}' * dotted.count('.')}"
    return [parse_recipe(f"{name}{written}"), parse_recipe("name: a", [f"{dotted}={text}"])]


TEXT = ["2024", "0.9999", "off", "Yes", "n", "true", "010", "0o17", "0x1f", "1e10", "123e456", "0123456", "1_000",
        "1:30", "2024-01-01", "1.0", ".5", "-3", "None", "<<", "="]  # fmt: skip


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("field", ["vae.revision", "sample.ema", "data.shards", "train.log.wandb_project"])
def test_text_is_kept_as_it_is_written(field: str, text: str) -> None:
    for recipe in both_ways(field, text):
        assert value_of(recipe, field) == text
        assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("name", ["2024", "off", "1e3", "007", "true", "2024-01-01", "3.10"])
def test_a_run_is_named_as_it_is_written(name: str) -> None:
    assert [recipe.name for recipe in both_ways("name", name)] == [name, name]


@pytest.mark.parametrize("text", ["null", "~", "Null", ""])
def test_nothing_is_null_where_a_field_may_be_nothing_and_refused_elsewhere(text: str) -> None:
    assert [recipe.vae.revision for recipe in both_ways("vae.revision", text)] == [None, None]
    with pytest.raises(UserError, match=r"data\.shards: should be a valid string; found None"):
        both_ways("data.shards", text)


@pytest.mark.parametrize(
    ("dotted", "text", "expected"),
    [
        ("seed", "10", 10),
        ("seed", "+5", 5),
        ("train.total_samples", "51_200_000", 51_200_000),
        ("sample.weights", "000000000064", 64),  # as the folder of these weights is named
        ("sample.weights", "64", 64),
        ("train.optimizer.learning_rate", "1e-4", 1e-4),
        ("train.optimizer.learning_rate", "1.0E-4", 1e-4),
        ("train.optimizer.learning_rate", ".5", 0.5),
        ("train.optimizer.learning_rate", "1", 1.0),
        ("train.optimizer.betas", "[0.9, 95e-2]", (0.9, 0.95)),
        ("sample.iterations", "[8, 4]", (8, 4)),
        ("data.flips", "no", False),
        ("data.flips", "On", True),
        ("data.flips", "TRUE", True),
        ("name", "'off'", "off"),
        ("name", '"2024"', "2024"),
    ],
)
def test_numbers_are_decimal_and_switches_true_or_false(dotted: str, text: str, expected: object) -> None:
    others = ["sample.num_steps=2", "sample.allocation=list"] if dotted == "sample.iterations" else []
    assert value_of(parse_recipe("name: a", [*others, f"{dotted}={text}"]), dotted) == expected


@pytest.mark.parametrize(
    ("dotted", "text", "expected"),
    [
        ("seed", "010", "seed: should be a valid integer; found '010'; write 10"),
        ("seed", "1_0", "found '1_0'; write 10"),
        ("seed", "_", "should be a valid integer; found '_'"),
        ("seed", "0" + "9" * 5000, "write a decimal number"),
        ("seed", "1:30", "found '1:30'; write a decimal number"),
        ("seed", "0x10", "found '0x10'; write a decimal number"),
        ("seed", "0b1", "found '0b1'; write a decimal number"),
        ("seed", "2024-01-01", "found '2024-01-01'; write a decimal number"),
        ("seed", "1e3", "found 1000.0"),
        ("seed", "yes", "found 'yes'"),
        ("seed", "true", "found True"),
        ("launch.timeout_minutes", "4:00", "found '4:00'; write a decimal number"),
        ("sample.weights", "064", "found '064'; write 64"),
        ("train.optimizer.learning_rate", "1_0.0", "found '1_0.0'; write a decimal number"),
        ("train.optimizer.learning_rate", "'0.1'", "should be a valid number; found '0.1'"),
        ("train.label_dropout", "true", "should be a valid number; found True"),
        ("train.label_dropout", "no", "should be a valid number; found 'no'"),
        ("train.optimizer.learning_rate", "nan", "found 'nan'"),
        ("data.flips", "1", "should be a valid boolean; found 1"),
        ("data.flips", "maybe", "should be a valid boolean; found 'maybe'"),
    ],
)
def test_a_number_written_otherwise_is_refused_with_how_to_write_it(dotted: str, text: str, expected: str) -> None:
    with pytest.raises(UserError) as raised:
        both_ways(dotted, text)
    assert expected in str(raised.value)


@pytest.mark.parametrize("text", ["/a b #c: d", "[x]", "@x", "*x", "a: b", "!x", "x'", "- y", "{x", "%x", "|"])
def test_an_override_of_text_needs_no_quotes_of_yamls(text: str) -> None:
    recipe = parse_recipe("name: a", [f"data.images={text}"])
    assert recipe.data.images == text
    assert parse_recipe(dump_recipe(recipe)) == recipe


# Each level holds the one before it nine times.
BOMB = "l0: &l0 [x, x]\n" + "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 10))
PRINTABLE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(deadline=None, max_examples=50)
@example("\x85", "a\u2028b", "1")
@given(PRINTABLE, PRINTABLE, st.text(string.digits + ".eE_x:-+", min_size=1, max_size=8))
def test_a_written_recipe_is_read_back_whatever_its_text(place: str, word: str, number: str) -> None:
    recipe = Recipe(
        name="a",
        data=Data(images=f"/{place}", held_out=f"x/{word}$HOME$$", cache=f"${{{place}}}"),
        vae=VAE(path=f"s3://x/${place}", revision=number, subfolder=word),
        sample=Sample(ema=number),
        evaluate=Evaluate(reference=f"/{number}"),
    )
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2", "a occurs twice"),
        ("train: {lr: 1}\ntrain: {lr: 2}", "train occurs twice"),
        ("{x: {b: 1, b: 1}}", "b occurs twice"),
        ("[a]: 1\n[a]: 2", "a key that is not plain text"),
        ("? [1]\n: 2", "a key that is not plain text"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !!int 0x10", "0x10 is not a plain int"),
        ("a: !!bool yes", "yes is not a plain bool"),
        ("[" * 5000, "nested too deeply"),
        ("a: 1\n---\na: 2", "expected a single document"),
        ("a: " + "9" * 5000, "is not a plain int"),
        ("a: " + "[" * 100 + "]" * 100, "nested too deeply"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: &a {b: *a}", "nested too deeply"),
        (BOMB, "more than 100,000 values"),
        (BOMB.replace("[*", "{<<: [*").replace("]\n", "]}\n").replace("[x, x]}", "{x: 1}"), "more than 100,000 values"),
        ('a: "\\UFFFFFFFF"', "too large"),
        ("%YAML " + "9" * 5000 + ".1\n---\na", "Exceeds the limit"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as raised:
        read_yaml(text)
    assert "\n" not in str(raised.value)


def test_a_key_twice_in_a_recipe_is_refused_with_its_line() -> None:
    with pytest.raises(UserError, match=r"not readable as YAML: batch_size occurs twice .*line 4"):
        parse_recipe("name: a\ntrain:\n  batch_size: 4\n  batch_size: 8")


def test_anchors_and_merges_are_yamls_and_an_override_of_one_section_changes_no_other() -> None:
    text = "name: a\nvae: &sizes {batch_size: 4}\nevaluate: *sizes\nsample: {<<: *sizes, num_samples: 8}"
    recipe = parse_recipe(text, ["vae.batch_size=2"])
    assert [recipe.vae.batch_size, recipe.evaluate.batch_size, recipe.sample.batch_size] == [2, 4, 4]


def test_a_list_that_names_itself_a_million_times_is_refused_in_a_short_line() -> None:
    levels = "\n".join(f"- &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
    for text in (f"name:\n- &l0 [x]\n{levels}", "name: &a [*a]", "name: a\ntrain: &t {x: *t}"):
        with pytest.raises(UserError) as raised:
            parse_recipe(text)
        assert len(str(raised.value)) < 2000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_size: 64", "batch_size: unknown key; did you mean vae.batch_size or train.batch_size or sample.batch_"),
        ("train: {num_steps: 4}", "train.num_steps: unknown key; did you mean sample.num_steps or sweep.num_steps?"),
        ("learning_rat: 1", "learning_rat: unknown key; did you mean train.optimizer.learning_rate?"),
        ("train: {learning_rate: 1}", "train.learning_rate: unknown key; did you mean train.optimizer.learning_rate?"),
        ("train: {log: {betas: [0, 0]}}", "train.log.betas: unknown key; did you mean train.optimizer.betas?"),
        ("optimizer: {betas: [0, 0]}", "optimizer: unknown key; did you mean train.optimizer?"),
        ("train.batch_size: 4", "train.batch_size: unknown key; write train: {batch_size: ...}"),
        ("train: {log.tensorboard: true}", "train.log.tensorboard: unknown key; write log: {tensorboard: ...}"),
        ("'': 4", ": unknown key; allowed: data, demo"),
        ("trian: {batch_size: 4}", "trian: unknown key; did you mean train?"),
        ("model: {resolution: 4}", "model.resolution: unknown key; did you mean data.resolution?"),
    ],
)
def test_an_unknown_key_is_answered_with_where_the_field_is(text: str, expected: str) -> None:
    with pytest.raises(UserError, match="unknown key") as raised:
        parse_recipe(f"name: a\n{text}")
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("override", "places"),
    [
        ("batch_size=64", "vae.batch_size or train.batch_size or sample.batch_size or evaluate.batch_size"),
        ("betas=[0, 0]", "train.optimizer.betas"),
        ("every_samples=64", "train.checkpoint.every_samples or train.log.every_samples"),
        ("optimizer.learning_rate=1", "train.optimizer"),
        ("seeds=3", "seed"),
    ],
)
def test_an_override_without_its_section_is_answered_with_where_it_belongs(override: str, places: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_recipe("name: a", [override])
    assert str(raised.value).endswith(f": unknown key; did you mean {places}?")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_name_from_before_train_had_sections_is_answered_with_its_new_place(old: str, new: str) -> None:
    expected = rf"train\.{old}: unknown key; did you mean train\.{new}\?$"
    for text, overrides in ((f"name: a\ntrain: {{{old}: 1}}", []), ("name: a", [f"train.{old}=1"])):
        with pytest.raises(UserError, match=expected):
            parse_recipe(text, overrides)
    assert value_of(parse_recipe("name: a"), f"train.{new}") is not None


PLACES = ["runs", "data.images", "data.held_out", "data.shards", "vae.path", "train.deepspeed_config",
          "train.resume_from", "train.initial_weights",
          "evaluate.reference", "evaluate.feature_extractor_weights"]  # fmt: skip


@pytest.mark.parametrize("field", PLACES)
def test_every_place_takes_the_home_folder_and_variables(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk/$odd")
    expected = {"~/x": "/home/me/x", "$DISK/x": "/disk/$odd/x", "a/${DISK}b": "a//disk/$oddb", "./~": "./~",
                "$$DISK/$(x)": "$DISK/$(x)", "$DISK/~": "/disk/$odd/~"}  # fmt: skip
    for text, place in expected.items():
        for recipe in both_ways(field, f"'{text}'"):
            assert value_of(recipe, field) == place
            assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("field", PLACES)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$NOT_SET/x", r"\$NOT_SET/x names a variable that is not set, NOT_SET"),
        ("x/${EMPTY}", "names a variable that is not set, EMPTY"),
        ("${NOT_SET:-/tmp}", r"has a \$\{ without a name"),
        ("~nobody-of-that-name/x", r"no user nobody-of-that-name here; write \./~nobody-of-that-name"),
        ("''", "empty; name a folder or file"),
    ],
)
def test_a_place_that_is_not_known_here_is_named(
    field: str, text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(UserError, match=f"^{field}: .*{expected}|^{field}: {expected}"):
        parse_recipe("name: a", [f"{field}={text}"])


def test_addresses_stay_and_the_cache_is_for_the_machine_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRATCH", raising=False)
    recipe = parse_recipe("name: a", ["data.shards=s3://bucket/$x/~y", "data.cache=$SCRATCH/cache"])
    assert (recipe.data.shards, recipe.data.cache) == ("s3://bucket/$x/~y", "$SCRATCH/cache")
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_a_site_file_is_read_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "account: 00123\nqos: off\nexclusive: yes\nmemory_gb: 4\nsbatch: {mail-type: NONE, nice: 010, hold: true}"
    )
    site = load_site(path)
    assert (site.account, site.qos, site.exclusive, site.memory_gb) == ("00123", "off", True, 4)
    assert sbatch_options(site, site.sbatch) == {"requeue": True, "mail_type": "NONE", "nice": "010", "hold": True}
    path.write_text("account: a\naccount: b")
    with pytest.raises(ValueError, match=r"site\.yaml: not readable as YAML: account occurs twice"):
        load_site(path)


def test_a_recipe_file_with_yamls_words(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: 2024\nvae: {revision: 0123456}\nsample: {ema: 0.9999, weights: 000000000064}\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.vae.revision, recipe.sample.ema, recipe.sample.weights) == (
        "2024",
        "0123456",
        "0.9999",
        64,
    )
