"""Proves a folder of latent shards whole: every byte, checksum, count and number.

    python preprocess/verify_shards.py data/demo/shards

Exit status 0: whole. 2: each fault on a line, with the shard, the sample, and what to do.
"""

import argparse
import sys

from common.command import guarded
from common.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the folder that holds index.json")
    return guarded(lambda: work(parser.parse_args().folder))


def work(folder: str) -> None:
    from preprocess.shards import LatentShards, verify

    shards = LatentShards(folder)
    faults = 0
    for fault in verify(folder):
        print(fault, flush=True)
        faults += 1
    if faults:
        raise UserError(f"{folder}: not whole, the faults are listed above ({faults})")
    print(f"{folder}: {len(shards):,} samples in {len(shards.index['shardlist'])} shards, all whole")


if __name__ == "__main__":
    sys.exit(main())
