"""Runs a command inside a SLURM cluster that lives as long as the command does.

python -m tests.slurm_cluster [--nodes 2] COMMAND [ARGUMENT ...]
"""

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.slurm_cluster.configuration import PARENT
from tests.slurm_cluster.daemons import die_with_parent, running


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="slurm-", dir=PARENT) as folder:
        try:
            with running(Path(folder), arguments.nodes) as cluster:
                done = subprocess.run(arguments.command, env=cluster.environment, preexec_fn=die_with_parent)
                return done.returncode
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
