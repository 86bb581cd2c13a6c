"""Detects images that were replaced after encoding by others of the same name and size."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError, printable
from common.sealed import write_sealed
from preprocess.encoding.image_loader import image_digest, open_image
from preprocess.images.images import Rejected
from preprocess.shards import Record, shard_name
from preprocess.sources import Entry, Source


def check_images(source: Source, slices: Sequence[range], folder: Path, records: Sequence[Record]) -> None:
    """Reads the images of `records` again if their files were modified since they were encoded.

    Records of unchanged images get the new files' times. Raises UserError naming an image that differs. `slices`: the
    positions in the source of each shard in `folder`.
    """
    modified = [each for each in records if each["stamp"] != source.entries.stamp(slices[each["number"]])]
    for record in tqdm(modified, desc="read newer files again", unit="shard", disable=not modified, leave=False):
        positions = slices[record["number"]]
        shard = folder / shard_name(record["number"])
        digests = record["pictures"] if len(record["pictures"]) == len(positions) else ["?"] * len(positions)
        for position, digest in zip(positions, digests, strict=True):
            entry = source.entries[position]
            if digest != _digest(source, entry):
                raise UserError(
                    f"data.images: {printable(entry.key)} is another image than the one encoded to {shard}, of the "
                    "same size; delete that shard to encode the present images, or choose another folder"
                )
        record["stamp"] = source.entries.stamp(positions)
        write_sealed(shard.with_suffix(".json"), record)


def _digest(source: Source, entry: Entry) -> str:
    try:
        return image_digest(open_image(source, entry))
    except Rejected:
        return ""
