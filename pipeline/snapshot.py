"""The code as it is now, for jobs that start later."""

import shutil
import tempfile
from pathlib import Path

from common.files import atomic_folder, sha256_file
from common.provenance import COMMIT_FILE, git_commit

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "fpdm", "pipeline", "preprocess", "slurm")


def take_snapshot(folder: Path) -> Path:
    """Copies the packages to `folder/<key of their content>` and returns that; what is there already stays.

    The commit is written down beside them: the clone may have moved on when a job asks for it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copied = Path(temporary)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copied / package, ignore=shutil.ignore_patterns("__pycache__"))
        (copied / COMMIT_FILE).write_text(git_commit() or "")
        files = sorted(path for path in copied.rglob("*") if path.is_file())
        listing = "".join(f"{path.relative_to(copied)} {sha256_file(path)}\n" for path in files)
        (copied / "FILES").write_text(listing, encoding="utf-8")
        target = folder / sha256_file(copied / "FILES")[:16]
        if not target.exists():
            with atomic_folder(target) as made:
                shutil.copytree(copied, made, dirs_exist_ok=True)
    return target
