"""THE format of latent shards: WebDataset tars with checksums, an index, and a verified random-access reader.

    latents-000000.tar          plain ustar, reproducible to the byte; a sample's members lie next to each other:
        0000000042.moments.npy          float16 (2C, h, w): posterior mean and standard deviation, unscaled
        0000000042.moments_flip.npy     the same of the mirrored image, where data.flips asks for it
        0000000042.cls                  class index as text
        0000000042.json                 key in the source, width, height
    latents-000000.samples.npy  one row (SAMPLE) a sample; all that a reader of remote shards fetches beside the tar
    latents-000000.json         the shard's record; written last, so a shard without one is unfinished
    samples.npy                 all rows, memory-mapped by the reader of a local folder
    index.json                  all records and what they were made with; written last of all

A member's number is the image's position in the sorted source list, and shard i covers a fixed slice of that list:
any worker can write any shard, and a kill costs the shard in hand.

`format` has the names, the row and the checksum; `forms` what the JSON files hold; `writer`, `reader` and
`verification` what their names say; `mapping` maps files into memory; `storage` where files lie and how they get here.
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
