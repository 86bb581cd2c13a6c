"""The paper's tables are remade by one command, which goes on where it was killed."""

import re
import sys
from pathlib import Path

from tests.forks import run_python
from tests.integration.conftest import environment, started


def test_a_smoke_of_table_1_survives_a_kill_and_writes_its_page(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    command = [sys.executable, "pipeline/reproduce.py", "--scale", "small", "--smoke", "--only", "T1"]
    command += ["--cluster", "debug", "--runs", str(runs)]
    with started(command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "dit-0: sweep ..." in line:  # the context kills it there
                break
    assert not (runs / "results.md").exists()
    command += ["--at-once", "2"]
    done = run_python(*command[1:], environment=environment())
    assert done.returncode == 0, done.stderr
    assert not {"dit-0: train ...", "dit-0: encode ..."} & set(done.stdout.splitlines())  # what was finished
    page = (runs / "results.md").read_text(encoding="utf-8")
    assert "A smoke test" in page
    assert re.search(r"^\| 140, ddim \| [\d.]+ \| [\d.]+ \|$", page, re.MULTILINE)
    assert "FPDM is better than DiT at small budgets (140 and 280 blocks); at 140, ddim: **not decided by one" in page
    assert "FD (EfficientNet-Lite0), 4 images" in page
    assert len(re.findall(r"^\| (?:dit|fpdm) \| [\d,]+ \| 16 \|", page, re.MULTILINE)) == 2
