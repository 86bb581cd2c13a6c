"""What a GPU does with this project, in one command: right first, then fast; the most useful parts first.

    python benchmarks/gpu.py [--minutes 8] [--smoke] [--parts golden zero ...] [--output runs/gpu]

  golden    the golden vectors on the GPU, in float32 against their bounds of rounding, in bf16 against bf16's
  zero      losses of ZeRO 1 to 3 in bf16 and fp16, against the CPU's in float32
  compile   losses with train.compile against those without
  resume    a training killed with SIGKILL and resumed, against one that ran through
  training  a step of FPDM-XL/2 and of DiT-XL/2 in bf16: time, memory, share of the GPU's peak
  sampling  samples a second at 280 blocks
  vae       images a second through the autoencoder of Stable Diffusion (its shapes, random weights)
  features  images a second through Inception where its weights are here, else EfficientNet-Lite0

After each part gpu.json and gpu.md are written again into the output folder, so that an early end leaves what is
finished. A part that fails is reported with its error, and the next one runs. `--smoke`: tiny sizes, for a CPU.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("DS_ACCELERATOR_QUIET", "1")

import torch

from benchmarks.gpu_parts import PARTS, Setting
from common.command import Parser
from common.errors import one_line
from common.files import atomic_write, write_json
from common.provenance import provenance

LEAST_SECONDS = 15.0  # a part is not begun with less time left


class TimeUp(Exception):
    """No TimeoutError, which is an OSError: waiting for a process would swallow it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeUp in the block after so many seconds."""

    def leave(*_: object) -> None:
        raise TimeUp(f"{seconds:.0f} s were not enough")

    before = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(name: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """A part's rows, its seconds, and its error if it has one."""
    start, rows, error = time.monotonic(), [], None
    try:
        with limited(seconds):
            for row in PARTS[name](setting):
                print(f"  {row.name:44} {row.value:11.4g} {row.unit:12} {_mark(row.met)} {row.note}", flush=True)
                rows.append(asdict(row))
    except Exception as fault:  # noqa: BLE001 # whatever a GPU does, the next part runs
        error = one_line(f"{type(fault).__name__}: {fault}", 300)
        print(f"  failed: {error}", flush=True)
    if setting.device == "cuda":
        torch.cuda.empty_cache()
    return {"rows": rows, "error": error, "seconds": round(time.monotonic() - start, 1)}


def _mark(met: bool | None) -> str:
    return {True: "met", False: "NOT MET", None: ""}[met]


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    made = record["provenance"]
    lines = ["# On a GPU", ""]
    smoke = " in a smoke run of tiny sizes, whose times mean nothing" if record["smoke"] else ""
    lines += [
        f"`python benchmarks/gpu.py` on {made['device'] or 'a CPU'}{smoke}, {made['time'][:10]}, "
        f"torch {made['packages']['torch']}, commit {(made['git'] or 'unknown')[:12]}."
    ]
    for name, part in record["parts"].items():
        lines += ["", f"## {name.capitalize()}", ""]
        if part["rows"]:
            lines += ["| what | value | unit | bound | |", "|---|---|---|---|---|"]
            lines += [
                f"| {row['name']} | {row['value']:.4g} | {row['unit']} | {_mark(row['met'])} | {row['note']} |"
                for row in part["rows"]
            ]
        if part["error"]:
            lines += ["", f"Failed: {part['error']}"]
        elif not part["rows"]:
            lines += ["Not measured."]
    return "\n".join(lines) + "\n"


def write(output: Path, record: dict[str, Any]) -> None:
    write_json(output / "gpu.json", record)
    with atomic_write(output / "gpu.md") as temporary:
        temporary.write_text(page(record))


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no part begins or goes on (8)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="for gpu.json and gpu.md (runs/gpu)")
    parser.add_argument("--json", action="store_true", help="also print gpu.json at the end")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.smoke:
        parser.error("there is no GPU here; --smoke runs every part in tiny sizes on the CPU")
    end = time.monotonic() + 60 * arguments.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record: dict[str, Any] = {"provenance": provenance(), "smoke": arguments.smoke, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, arguments.smoke, Path(folder))
        for name in arguments.parts:
            left = end - time.monotonic()
            print(f"{name}, {left:.0f} s left", flush=True)
            late = {"rows": [], "error": f"not begun: {left:.0f} s were left", "seconds": 0.0}
            record["parts"][name] = measured(name, setting, left) if left > LEAST_SECONDS else late
            write(arguments.output, record)
    if arguments.json:
        print(json.dumps(record, indent=1, sort_keys=True))
    print(f"{arguments.output / 'gpu.md'}")
    bad = any(part["error"] or any(row["met"] is False for row in part["rows"]) for part in record["parts"].values())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
