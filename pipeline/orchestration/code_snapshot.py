"""The code as it is now, for jobs that start later."""

import hashlib
import shutil
import tempfile
from pathlib import Path

from common.files import atomic_folder, sha256_file
from common.provenance import COMMIT_FILE, git_commit

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "fpdm", "pipeline", "preprocess", "slurm")


def take_snapshot(folder: Path) -> Path:
    """Copies the packages to `folder/<key of their content>` and returns that; an unchanged earlier copy stays.

    The commit is written beside them: the clone can be at another one when a job asks for it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copied = Path(temporary)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copied / package, ignore=shutil.ignore_patterns("__pycache__"))
        (copied / COMMIT_FILE).write_text(git_commit() or "")
        listing = _listing(copied)
        target = folder / hashlib.sha256(listing.encode()).hexdigest()[:16]
        if not target.is_dir() or _listing(target) != listing:
            with atomic_folder(target) as new:
                shutil.copytree(copied, new, dirs_exist_ok=True)
    return target


def _listing(folder: Path) -> str:
    """Each file with its sha256, without Python's caches."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return "".join(f"{path.relative_to(folder)} {sha256_file(path)}\n" for path in files)
