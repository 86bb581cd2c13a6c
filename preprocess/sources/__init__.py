"""Sources of images. A source lists its images in a stable order without decoding them, and reads any of them.

`open_source` opens the source in the recipe's `data` section (`preprocess.sources.registry`).
"""

from preprocess.sources.entries import Entries, Entry, Source, fingerprint
from preprocess.sources.expected_counts import warnings
from preprocess.sources.registry import Which, open_source

__all__ = ["Entries", "Entry", "Source", "Which", "fingerprint", "open_source", "warnings"]
