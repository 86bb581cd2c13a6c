"""The format of latent shards: WebDataset tars with checksums, an index, and a verified random-access reader.

    latents-000000.tar          plain ustar, reproducible to the byte; a sample's members are consecutive:
        0000000042.moments.npy          float16 (2C, h, w): posterior mean and standard deviation, unscaled
        0000000042.moments_flip.npy     the same for the mirrored image, with data.flips
        0000000042.cls                  class index as text
        0000000042.json                 key in the source, width, height
    latents-000000.samples.npy  one row (SAMPLE) per sample; readers of remote shards fetch it with the tar
    latents-000000.json         the shard's record; written last: a shard without one is unfinished
    samples.npy                 all rows, memory-mapped by the reader of a local folder
    index.json                  all records and their settings; written last of all

A member's number is the image's position in the source's sorted list, and shard i covers a fixed slice of that list.
So any worker can write any shard, and a killed job loses at most the two shards in progress.

Modules: `format` (names, row, checksum), `forms` (fields of the JSON files), `writer`, `reader`, `verification`,
`mapping` (memory-mapped files) and `storage` (local files, and a cache of remote ones).
"""

from preprocess.shards.format import (
    INDEX,
    MOMENTS,
    SAMPLE,
    SAMPLES,
    Rejection,
    Sample,
    member_name,
    rows_name,
    shard_name,
)
from preprocess.shards.forms import Record, Settings
from preprocess.shards.reader import LatentShards
from preprocess.shards.storage import Cache
from preprocess.shards.verification import verify
from preprocess.shards.writer import finished_record, recorded_settings, remove_unfinished, write_index, write_shard

__all__ = [
    "INDEX",
    "MOMENTS",
    "SAMPLE",
    "SAMPLES",
    "Cache",
    "LatentShards",
    "Record",
    "Rejection",
    "Sample",
    "Settings",
    "finished_record",
    "member_name",
    "recorded_settings",
    "remove_unfinished",
    "rows_name",
    "shard_name",
    "verify",
    "write_index",
    "write_shard",
]
