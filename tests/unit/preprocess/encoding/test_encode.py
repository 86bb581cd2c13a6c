"""Encoding is a pure function of images and settings: no kill, number of workers or batch size changes it."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.recipe import VAE, Data, Model, Recipe
from common.sealed import write_sealed
from fpdm.latents import draw_latents, unscale_latents
from preprocess.encoding import encoder as encoder_module
from preprocess.encoding.encoder import Encoder, fetch_vae, find_vae
from preprocess.encoding.encoding import sample_bytes
from preprocess.images.images import to_tensor
from preprocess.shards import INDEX, SAMPLES, LatentShards, shard_name, verify
from tests.encoding_stage import encode, finished, plan
from tests.json_files import read_json

CLASSES, PER_CLASS, SHARD, SIDE = ("cat", "dog"), 9, 5, 16
COUNT = len(CLASSES) * PER_CLASS


@pytest.fixture
def recipe(tmp_path: Path, tiny_vae: Path) -> Recipe:
    """18 images of two classes, in shards of 5."""
    random = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(PER_CLASS):
            pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    return Recipe(
        name="test",
        data=Data(
            images=str(tmp_path / "images"), shards=str(tmp_path / "shards"), resolution=SIDE, shard_samples=SHARD
        ),
        vae=VAE(path=str(tiny_vae), downsampling=4, batch_size=3),
        model=Model(num_classes=2),
    )


def changed(recipe: Recipe, section: str, **fields: object) -> Recipe:
    return replace(recipe, **{section: replace(getattr(recipe, section), **fields)})


def contents(recipe: Recipe) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(recipe.data.shards).iterdir()}


def truncate(recipe: Recipe, key: str) -> None:
    path = Path(recipe.data.images) / key
    path.write_bytes(path.read_bytes()[:-200])


def image(recipe: Recipe, key: str) -> torch.Tensor:
    return to_tensor(Image.open(Path(recipe.data.images) / key))


def test_shards_hold_every_image_its_mirror_image_and_its_label(recipe: Recipe) -> None:
    encode(recipe)
    shards = LatentShards(recipe.data.shards)
    assert shards.labels.tolist() == [0] * PER_CLASS + [1] * PER_CLASS
    assert shards.class_names == list(CLASSES)
    originals = torch.stack([image(recipe, f"{name}/{index}.png") for name in CLASSES for index in range(PER_CLASS)])
    encoder, everything = Encoder(recipe.vae), np.arange(COUNT)
    for flip, images in ((False, originals), (True, originals.flip(-1))):
        moments = torch.from_numpy(shards.gather(everything, np.full(COUNT, flip))).float()
        assert torch.allclose(moments, encoder.encode(images), rtol=2e-3, atol=2e-3)
    assert not list(verify(recipe.data.shards))


def test_workers_do_not_change_a_byte_and_batches_at_most_the_last_bit(recipe: Recipe, tmp_path: Path) -> None:
    encode(recipe)
    workers = changed(changed(recipe, "launch", cpus_per_process=2), "data", shards=str(tmp_path / "workers"))
    encode(workers)
    assert contents(workers) == contents(recipe)
    batches = changed(changed(recipe, "vae", batch_size=4), "data", shards=str(tmp_path / "batches"))
    encode(batches)
    first, second = (LatentShards(each.data.shards).gather(np.arange(COUNT)) for each in (recipe, batches))
    assert np.abs(first.view(np.int16).astype(int) - second.view(np.int16)).max() <= 1


def test_only_missing_or_damaged_shards_are_encoded(recipe: Recipe) -> None:
    encode(recipe)
    before, folder = contents(recipe), Path(recipe.data.shards)
    kept = (folder / shard_name(0)).stat().st_mtime_ns
    (folder / shard_name(1)).unlink()
    damaged = bytearray(before[shard_name(2)])
    damaged[1000] ^= 1
    (folder / shard_name(2)).write_bytes(damaged)
    (folder / SAMPLES).write_bytes(b"")
    encode(recipe)
    assert contents(recipe) == before
    assert (folder / shard_name(0)).stat().st_mtime_ns == kept


def test_a_flipped_bit_in_a_finished_encoding_is_mended_by_the_same_command(recipe: Recipe) -> None:
    encode(recipe)
    before, folder = contents(recipe), Path(recipe.data.shards)
    for name in (shard_name(1), SAMPLES):
        damaged = bytearray(before[name])
        damaged[-300] ^= 1
        (folder / name).write_bytes(damaged)
    encode(recipe)
    assert contents(recipe) == before


def test_a_finished_encoding_is_not_done_again(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(recipe)
    before = contents(recipe)
    monkeypatch.setattr("preprocess.encoding.encoding.encode_images", None)  # would raise where it is called
    encode(recipe)
    assert contents(recipe) == before


def as_bitmaps(recipe: Recipe) -> Path:
    """The recipe's images in files of one size; returns their folder."""
    folder = Path(recipe.data.images)
    for path in folder.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    assert len({path.stat().st_size for path in folder.rglob("*.bmp")}) == 1
    return folder


def exchange(first: Path, second: Path) -> None:
    """By their names alone; what each says of itself goes with it."""
    first.rename(first.with_suffix(".aside"))
    second.rename(first)
    first.with_suffix(".aside").rename(second)


def test_images_of_one_size_that_were_exchanged_copied_or_written_over_are_named(recipe: Recipe) -> None:
    folder = as_bitmaps(recipe)
    encode(recipe)
    assert finished(recipe)
    before = contents(recipe)
    first, second = folder / "cat/1.bmp", folder / "dog/7.bmp"
    held = first.read_bytes()
    exchange(first, second)
    assert not finished(recipe)
    with pytest.raises(UserError, match=r"data\.images: cat/1\.bmp is another image than the one encoded to .*-000000"):
        encode(recipe)
    exchange(first, second)
    shutil.copy2(second, first)
    with pytest.raises(UserError, match=r"cat/1\.bmp is another image"):
        encode(recipe)
    first.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    with pytest.raises(UserError, match=r"cat/1\.bmp is another image"):
        encode(recipe)
    assert contents(recipe) == before


def test_the_same_images_in_newer_files_are_read_once_more_and_not_encoded(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a data set was copied to another disk."""
    folder = as_bitmaps(recipe)
    truncate(recipe, "cat/2.bmp")
    recipe = changed(recipe, "data", max_rejected=0.2)
    encode(recipe)
    before = contents(recipe)
    shutil.copytree(folder, folder.with_name("same"))  # with the files' times
    assert finished(changed(recipe, "data", images=str(folder.with_name("same"))))
    shutil.copytree(folder, folder.with_name("copy"), copy_function=shutil.copy)
    moved = changed(recipe, "data", images=str(folder.with_name("copy")))
    assert not finished(moved)
    monkeypatch.setattr("preprocess.encoding.encoding.encode_images", None)  # would raise where it is called
    encode(moved)
    assert finished(moved)
    assert not finished(recipe)  # whose files are others
    after = contents(moved)
    assert [name for name in before if before[name] != after[name]] == [
        name for name in before if name.endswith(".json")
    ]
    monkeypatch.setattr("preprocess.encoding.changed_images.open_image", None)
    encode(moved)


def test_a_record_that_says_nothing_of_an_autoencoder_is_one_of_other_settings(recipe: Recipe) -> None:
    encode(recipe)
    path = Path(recipe.data.shards) / "latents-000000.json"
    record = read_json(path)
    del record["content_key"], record["settings"]["vae"]
    write_sealed(path, record)
    with pytest.raises(UserError, match=r"latents-000000\.json was made with another vae\.config_sha256 \(None; now"):
        encode(recipe)


def test_a_shard_copied_over_another_with_its_record_is_made_again(recipe: Recipe) -> None:
    encode(recipe)
    before, folder = contents(recipe), Path(recipe.data.shards)
    for suffix in (".tar", ".samples.npy", ".json"):
        shutil.copy(folder / f"latents-000000{suffix}", folder / f"latents-000001{suffix}")
    encode(recipe)
    assert contents(recipe) == before


def test_a_truncated_image_is_listed_and_the_rest_encoded(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(recipe, "cat/4.png")
    truncate(recipe, "dog/0.png")
    encode(changed(recipe, "data", max_rejected=0.2))
    index = LatentShards(recipe.data.shards).index
    assert [rejection["key"] for rejection in index["rejected"]] == ["cat/4.png", "dog/0.png"]
    assert all("truncated" in rejection["reason"] for rejection in index["rejected"])
    assert (index["found"], index["accepted"]) == (COUNT, COUNT - 2)
    assert "2 rejected: cat/4.png: " in capsys.readouterr().out


def test_too_many_rejected_images_stop_the_run_with_the_list(recipe: Recipe) -> None:
    truncate(recipe, "dog/3.png")
    for _ in range(2):  # the second run finds the first one's shards
        with pytest.raises(
            UserError, match=r"data\.max_rejected: 1 of 18 .* 0\.10% are allowed; dog/3\.png: .*truncated"
        ):
            encode(recipe)
    assert not (Path(recipe.data.shards) / INDEX).exists()
    encode(changed(recipe, "data", max_rejected=0.1))
    assert len(LatentShards(recipe.data.shards)) == COUNT - 1


def test_an_image_that_cannot_be_opened_is_rejected_by_name(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(
        "preprocess.sources.entries.open", refuse, raising=False
    )  # root, as whom tests may run, may read anything
    with pytest.raises(UserError, match=r"cat/0\.png: cannot be opened \(Permission denied"):
        encode(recipe)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e6])
def test_numbers_that_float16_does_not_hold_are_rejected(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    original = Encoder.moments

    def faulty(encoder: Encoder, images: torch.Tensor) -> torch.Tensor:
        moments = original(encoder, images)
        moments[0, 0, 0, 0] = value
        return moments

    monkeypatch.setattr(Encoder, "moments", faulty)
    with pytest.raises(UserError, match=r"cat/0\.png: the VAE's moments are not finite"):
        encode(recipe)


def test_out_of_memory_on_the_device_is_a_user_error(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(encoder: Encoder, images: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(Encoder, "moments", full)
    with pytest.raises(UserError, match=r"vae\.batch_size: the device has no memory for 3 images of 16 px at once"):
        encode(recipe)


def test_another_number_of_classes_is_refused(recipe: Recipe) -> None:
    with pytest.raises(
        UserError, match=r"model\.num_classes: 3, but .* has 2 classes \(cat, dog\); .*set model\.num_classes=2$"
    ):
        plan(changed(recipe, "model", num_classes=3))


@pytest.mark.parametrize(("field", "value"), [("latent_channels", 8), ("downsampling", 8)])
def test_a_vae_that_differs_from_the_recipe_is_rejected(recipe: Recipe, field: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"vae\.{field}: {value} in the recipe, but 4 in "):
        plan(changed(recipe, "vae", **{field: value}))


def test_a_folder_without_a_vae_is_named(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vae\.path: .*images has no config\.json"):
        plan(changed(recipe, "vae", path=recipe.data.images))


@pytest.mark.parametrize("path", ["somebody/some-vae", "no/such/folder"])
def test_a_vae_that_is_not_here_is_planned_and_then_named(
    recipe: Recipe, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    elsewhere = changed(recipe, "vae", path=path)
    assert f"{path} (to be downloaded from the hub)" in "\n".join(plan(elsewhere))
    with pytest.raises(UserError, match=rf"vae\.path: {path} is no folder, .*config\.json.*safetensors"):
        encode(elsewhere)


def test_a_partly_cached_vae_is_fetched_and_the_hubs_error_is_shown(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download was interrupted, or was of other files of the repository."""
    cache, hub = tmp_path / "cache", Path(recipe.vae.path)
    cache.mkdir()
    shutil.copy(hub / "config.json", cache)

    def download(name: str, *, local_files_only: bool, **_: object) -> str:
        if not local_files_only:
            shutil.copytree(hub, cache, dirs_exist_ok=True)
        return str(cache)

    def refuse(name: str, *, local_files_only: bool, **_: object) -> str:
        if not local_files_only:
            raise OSError("401 Client Error.\nAccess to model somebody/vae is restricted.")
        return str(cache)

    settings = replace(recipe.vae, path="somebody/vae")
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert find_vae(settings) is None
    with pytest.raises(UserError, match=r"its download from the hub failed; .* error: 401 Client Error\. Access"):
        fetch_vae(settings)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch_vae(settings) == cache
    assert find_vae(settings) == cache


@pytest.mark.parametrize(("field", "value"), [("crop", "resize"), ("flips", False), ("shard_samples", 6)])
def test_shards_of_other_settings_are_never_overwritten(recipe: Recipe, field: str, value: object) -> None:
    encode(recipe)
    before = contents(recipe)
    with pytest.raises(UserError, match=rf"data\.shards: .*made with another {field}"):
        encode(changed(recipe, "data", **{field: value}))
    assert contents(recipe) == before


def test_shards_of_another_vae_are_never_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    encode(recipe)
    other = shutil.copytree(recipe.vae.path, tmp_path / "other-vae")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"another vae\.config_sha256 \(\w{64}; now \w{64}\); choose another folder"):
        encode(changed(recipe, "vae", path=str(other)))


def test_shards_of_other_images_are_never_overwritten(recipe: Recipe) -> None:
    encode(recipe)
    (Path(recipe.data.images) / "dog/0.png").unlink()
    with pytest.raises(UserError, match="made with another source_fingerprint"):
        encode(recipe)


def test_a_plan_writes_nothing_and_counts_finished_shards(recipe: Recipe) -> None:
    assert "0 finished" in "\n".join(plan(recipe))
    assert not Path(recipe.data.shards).exists()
    encode(recipe)
    (Path(recipe.data.shards) / shard_name(3)).unlink()
    assert "3 finished\nto do: 3 images" in "\n".join(plan(recipe))


def test_the_disk_estimate_is_the_size_of_a_shard(recipe: Recipe) -> None:
    recipe = changed(recipe, "data", shard_samples=COUNT)
    encode(recipe)
    estimate = COUNT * sample_bytes(recipe)
    assert abs((Path(recipe.data.shards) / shard_name(0)).stat().st_size - estimate) <= 2 * 10240


def test_latents_are_drawn_from_the_moments_and_scaled(recipe: Recipe) -> None:
    moments = torch.tensor([1.0, 2.0, 0.5, 0.0]).reshape(1, 4, 1, 1).half()
    normals = torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1)
    latents = draw_latents(moments, normals, scaling_factor=10.0, shift_factor=1.0)
    assert latents.dtype == torch.float32
    assert latents.flatten().tolist() == [10.0, 10.0]
    assert unscale_latents(latents, 10.0, 1.0).flatten().tolist() == [2.0, 2.0]


def test_decoding_undoes_the_scaling(recipe: Recipe) -> None:
    encoder = Encoder(recipe.vae)
    encoder.identity = replace(encoder.identity, scaling_factor=0.5, shift_factor=0.25)
    images = torch.stack([image(recipe, "cat/0.png"), image(recipe, "dog/1.png")])
    moments = encoder.encode(images)
    decoded = encoder.decode(draw_latents(moments, torch.zeros(2, 4, 4, 4), 0.5, 0.25))
    mean = moments.chunk(2, dim=1)[0]
    assert torch.allclose(decoded, encoder.network.decode(mean).sample.clamp(-1, 1), atol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_pass_size_on_a_cpu_changes_no_image(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    encoder = Encoder(recipe.vae)
    images = image(recipe, "cat/0.png").lerp(
        image(recipe, "dog/1.png"), torch.linspace(0, 1, count)[:, None, None, None]
    )
    moments = encoder.moments(images)
    latents = moments[:, : moments.shape[1] // 2]
    decoded = encoder.decode(latents)
    monkeypatch.setattr(encoder_module, "CPU_PIXELS", 2 * 16 * 16)
    seen: list[int] = []
    encoder.network.encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    torch.testing.assert_close(encoder.moments(images), moments)
    torch.testing.assert_close(encoder.decode(latents), decoded)
    assert seen == {0: [0], 1: [1], 7: [2, 2, 2, 1]}[count]


def test_encoding_in_ffcv_format_makes_the_file_after_the_shards(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    ffcv, converted = changed(recipe, "data", format="ffcv"), []
    monkeypatch.setattr("preprocess.beton.convert", lambda folder, processes: converted.append(folder))
    encode(ffcv)
    assert converted == [Path(recipe.data.shards)]
    assert finished(recipe)
    assert not finished(ffcv)


def test_encoding_to_an_address_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"data\.shards: s3://bucket/shards is remote; encode to a local folder"):
        encode(changed(recipe, "data", shards="s3://bucket/shards"))
