"""The FFCV file holds what the shards hold; training reads the same stream from either."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.loading import load_recipe
from common.recipe import diffusion
from pipeline.training.data import Stream
from preprocess import beton
from preprocess.from_data import open_latents
from preprocess.shards import INDEX, LatentShards, Sample, verify, write_index, write_shard

SHAPE, COUNT, SHARD = (8, 4, 4), 70, 32

READ_BY_FFCV = """
import sys
import numpy as np, torch
from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import Squeeze, ToTensor, View

numbers = [NDArrayDecoder(), ToTensor(), View(torch.float16)]
pipelines = {"moments": numbers, "moments_flip": numbers, "label": [IntDecoder(), ToTensor(), Squeeze()]}
found = {}
for order in (OrderOption.QUASI_RANDOM, OrderOption.SEQUENTIAL):
    loader = Loader(sys.argv[1], 16, num_workers=1, order=order, seed=0, drop_last=False, pipelines=pipelines)
    batches = [[field.clone() for field in batch] for batch in loader]
    for name, parts in zip(pipelines, zip(*batches)):
        found[f"{order.name}.{name}"] = torch.cat(parts).numpy()
np.savez(sys.argv[2], **found)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and the FFCV file made of them. Where FFCV is absent the tests do not run, which is a failure in CI."""
    if find_spec("ffcv") is None:
        reason = "needs ffcv: scripts/setup.sh --ffcv"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("shards")
    write(folder)
    command = [sys.executable, "preprocess/beton.py", "--config", str(recipe(folder))]
    subprocess.run(command, check=True, timeout=120)
    return folder


def recipe(folder: Path) -> Path:
    path = folder.parent / "recipe.yaml"
    path.write_text(f"name: a\ndata: {{shards: {folder}}}\nmodel: {{num_classes: 3}}\n")
    return path


def write(folder: Path) -> None:
    samples = [made(position) for position in range(COUNT)]
    parts = [samples[start : start + SHARD] for start in range(0, COUNT, SHARD)]
    settings = {"flips": True, "shard_samples": SHARD, "vae": {"scaling_factor": 1.0, "shift_factor": 0.0}}
    records = [write_shard(folder, number, part, settings) for number, part in enumerate(parts)]
    write_index(folder, records, SHAPE, ["a", "b", "c"])


def made(position: int) -> Sample:
    moments = np.abs(np.random.default_rng(position).normal(size=(2, *SHAPE))).astype(np.float16)
    return Sample(position, f"{position}.png", position % 3, 8, 8, moments[0], moments[1])


def test_ffcvs_own_loader_reads_back_equal_numbers_in_quasi_random_order(folder: Path, tmp_path: Path) -> None:
    path = folder / beton.FOLDER / beton.BETON
    command = [sys.executable, "-c", READ_BY_FFCV, str(path), str(tmp_path / "read.npz")]
    subprocess.run(command, check=True, timeout=200)  # FFCV waits for ever where it fails
    read = np.load(tmp_path / "read.npz")
    shards, everything = LatentShards(folder), np.arange(COUNT)
    expected = {
        "moments": shards.gather(everything),
        "moments_flip": shards.gather(everything, everything >= 0),
        "label": shards.labels,
    }
    assert all(np.array_equal(read[f"SEQUENTIAL.{name}"], right) for name, right in expected.items())
    # The order is FFCV's own: a sample is recognised by its numbers, of which no two are alike.
    order = [int((expected["moments"] == one).all((1, 2, 3)).argmax()) for one in read["QUASI_RANDOM.moments"]]
    assert sorted(order) == everything.tolist() != order
    assert all(np.array_equal(read[f"QUASI_RANDOM.{name}"], right[order]) for name, right in expected.items())


def test_the_ffcv_file_is_read_as_the_shards_are_by_sample_and_by_checksum(folder: Path, tmp_path: Path) -> None:
    shards, converted = LatentShards(folder), LatentShards(folder / beton.FOLDER)
    indices, flips = np.array([69, 0, 33, 33]), np.array([True, False, True, False])
    assert np.array_equal(converted.gather(indices, flips), shards.gather(indices, flips))
    assert converted.labels.tolist() == shards.labels.tolist()
    assert converted.content_key == shards.content_key
    assert not list(verify(folder / beton.FOLDER))
    copy = Path(shutil.copytree(folder / beton.FOLDER, tmp_path / "copy"))
    data = bytearray((copy / beton.BETON).read_bytes())
    data[data.index(made(40).moments.tobytes()) + 5] ^= 1
    (copy / beton.BETON).write_bytes(data)
    with pytest.raises(UserError, match=r"latents\.beton: sample 40 \(member 0000000040\)"):
        LatentShards(copy).gather(np.arange(COUNT))
    assert "sample 40 " in next(verify(copy))


@pytest.mark.parametrize("order", ["random", "block"])
def test_training_reads_the_same_stream_in_either_format(folder: Path, order: str) -> None:
    batches = []
    for name in ("tar", "ffcv"):
        chosen = load_recipe(recipe(folder), (f"data.format={name}", f"data.order={order}", "train.batch_size=8"))
        shards = open_latents(chosen.data)
        assert shards.index["shardlist"][0]["url"].endswith("beton") == (name == "ffcv")
        batches.append(Stream(chosen, shards, diffusion(chosen)).batch(torch.arange(40, 120)))
    for name, tensor in vars(batches[0]).items():
        assert torch.equal(vars(batches[1])[name], tensor), name


def test_damaged_shards_are_named_and_not_converted(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(copy / beton.FOLDER)
    data = bytearray((copy / "latents-000001.tar").read_bytes())
    data[data.index(made(40).moments.tobytes()) + 5] ^= 1
    (copy / "latents-000001.tar").write_bytes(data)
    with pytest.raises(UserError, match="sample 40 "):
        beton.convert(copy)
    assert not (copy / beton.FOLDER / INDEX).exists()


def test_without_ffcv_converting_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data\.format: ffcv is not installed; scripts/setup.sh --ffcv"):
        beton.convert(tmp_path)
