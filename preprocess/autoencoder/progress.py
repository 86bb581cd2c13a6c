"""Where an autoencoder's training has come to, in a file beside `vae.path`, so that after a kill it goes on."""

import hashlib
import io
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch

from common.files import atomic_write

SECONDS = 60.0  # between two writes: the most that a kill costs
DIGEST = hashlib.sha256().digest_size


class Progress:
    """The file of one training, or of a part of it. `settings`: all that decides the weights; a file of others is not
    gone on with.
    """

    def __init__(self, vae_path: str | Path, settings: dict[str, Any], part: str = "") -> None:
        place = Path(vae_path)
        self.path, self.settings = place.parent / f".{place.name}{part}.progress", settings
        self._written = time.monotonic()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._written >= SECONDS

    def write(self, state: dict[str, Any]) -> None:
        content = io.BytesIO()
        torch.save({"settings": self.settings, "state": state}, content)
        with atomic_write(self.path) as temporary:
            temporary.write_bytes(hashlib.sha256(content.getbuffer()).digest() + content.getbuffer())
        self._written = time.monotonic()

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """None where there is none, and, with a warning, where it is damaged or of other settings."""
        if not self.path.is_file():
            return None
        data, fault = self.path.read_bytes(), "changed after it was written"
        if hashlib.sha256(data[DIGEST:]).digest() == data[:DIGEST]:
            kept = torch.load(io.BytesIO(data[DIGEST:]), map_location=device, weights_only=True)
            if kept["settings"] == self.settings:
                return cast(dict[str, Any], kept["state"])
            fault = "of other settings or images"
        print(f"warning: {self.path}: {fault}; its training begins again", file=sys.stderr, flush=True)
        return None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
