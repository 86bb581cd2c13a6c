"""The fields of the JSON files beside shards, with their types and ranges, which every reader checks before use.

An index or record may be damaged, of another version, or hostile: no path, count or allocation uses an unchecked field.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict  # pydantic does not read typing's own before Python 3.12

from common.errors import UserError, one_line
from common.sealed import STRICT, checked, read_bytes, unseal, write_sealed
from preprocess.shards.format import INDEX, MOMENTS, REMEDY, VERSION

KIND = "__kind__"  # a field for wids, whose name a TypedDict cannot have
MAX_SIDE = 2**16  # height, width or channels of the moments

Digest = Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
Count = Annotated[int, Field(ge=0, lt=2**48)]  # samples or bytes: sums of a million fit 64 bits
Name = Annotated[str, Field(pattern=r"\A[A-Za-z0-9_-][A-Za-z0-9._-]*\z", max_length=200)]  # no path
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Scale = Annotated[float, Field(gt=0)]


class OtherVersion(UserError):
    """Shards of another format version."""


@with_config(STRICT)
class Autoencoder(TypedDict):
    """The autoencoder of the moments, and the scaling of its latents."""

    config_sha256: NotRequired[Digest]
    weights_sha256: NotRequired[Digest]
    scaling_factor: Scale
    shift_factor: float


@with_config(STRICT)
class Settings(TypedDict):
    """The settings that decide the shards' bytes; the same in every record and in the index."""

    flips: bool
    source: NotRequired[str]
    source_fingerprint: NotRequired[Digest]
    crop: NotRequired[str]
    resolution: NotRequired[Side]
    shard_samples: NotRequired[Annotated[int, Field(ge=1, lt=2**32)]]
    precision: NotRequired[str]
    vae: NotRequired[Autoencoder | None]


@with_config(STRICT)
class RejectedImage(TypedDict):
    key: str
    reason: str


@with_config(STRICT)
class Shard(TypedDict):
    """A shard in the index."""

    url: Name
    nsamples: Count
    filesize: Count
    sha256: Digest
    samples_sha256: Digest


@with_config(STRICT)
class Record(TypedDict):
    """The record of a shard, in the file beside it."""

    version: int
    number: Annotated[int, Field(ge=0, lt=10**6)]
    settings: Settings
    nsamples: Count
    filesize: Count
    sha256: Digest
    samples_sha256: Digest
    rejected: list[RejectedImage]
    channel_sums: Annotated[list[list[float]], Field(min_length=2, max_length=2)]  # (2, C); (2, 0) without samples
    pictures: list[Annotated[str, Field(pattern=r"\A([0-9a-f]{16})?\z")]]  # the `Sample.digest` of each image
    stamp: str  # `Entries.stamp` of its images


@with_config(STRICT)
class Statistics(TypedDict):
    """A number per channel; empty without samples."""

    mean: list[float]
    std: list[float]


@with_config(STRICT)
class Index(TypedDict):
    """index.json."""

    version: int
    wids_version: Literal[1]
    shardlist: list[Shard]
    settings: Settings
    class_names: Annotated[list[str], Field(min_length=1)]
    shape: Annotated[list[Side], Field(min_length=3, max_length=3)]  # (2C, h, w)
    found: Count
    accepted: Count
    rejected: list[RejectedImage]
    left_out: dict[str, Count]
    warnings: list[str]
    samples_sha256: Digest
    latents: Statistics
    stamp: str  # `Entries.stamp` of all images
    converted_from: NotRequired[Digest]


def read_index(data: bytes, where: str | Path) -> Index:
    """Parses an index. Raises UserError for anything but a consistent index."""
    value = _of_this_version(data, where)
    value.pop(KIND, None)
    index = checked(value, where, Index, f"{REMEDY}, or download it again")
    if index["accepted"] != sum(shard["nsamples"] for shard in index["shardlist"]) or any(
        shard["nsamples"] * math.prod(index["shape"]) * MOMENTS.itemsize > shard["filesize"]
        for shard in index["shardlist"]
    ):
        raise UserError(f"{where}: its counts, sizes or shapes contradict each other; {REMEDY}, or download it again")
    return index


def read_local_index(folder: Path) -> Index:
    return read_index(read_bytes(folder / INDEX), folder / INDEX)


def write_index_file(folder: Path, index: Index) -> None:
    write_sealed(folder / INDEX, {KIND: "wids-shard-index-v1", **index})


def read_record(path: Path) -> Record:
    """Reads a record. Raises UserError if the file is missing, damaged or no record."""
    record = checked(_of_this_version(read_bytes(path), path), path, Record, REMEDY)
    first, second = record["channel_sums"]
    if len(first) != len(second) or bool(first) != bool(record["nsamples"]):
        raise UserError(f"{path}: channel_sums: not two numbers per channel; {REMEDY}")
    return record


def _of_this_version(data: bytes, where: str | Path) -> dict[str, Any]:
    value = unseal(data, where, dict[str, Any], REMEDY)
    if (version := value.get("version", 2)) != VERSION:
        raise OtherVersion(
            f"{where}: version {one_line(str(version), 20)}, only {VERSION} is read; encode again to another folder"
        )
    return value
