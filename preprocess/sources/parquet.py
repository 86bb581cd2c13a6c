"""Parquet files of pictures, as Hugging Face's `datasets` writes them: a column `image`, whose `bytes` are those of a
picture's file, or which is of such bytes itself, and a column `label`."""

import glob
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from preprocess.images import Rejected
from preprocess.sources.entries import MAX_CLASSES, Entries, Entry

IMAGE, LABEL = "image", "label"


class ParquetSource:
    """The files of one split: a folder of `*.parquet`, one file, or a pattern such as `data/train-*.parquet`.

    Entries are in the order of files and rows; a key is `<file>/<row>`. Class names are those of the files' own
    metadata. The pictures' sizes are not known without reading them: an entry has its file's.
    """

    def __init__(self, path: str | Path, field: str) -> None:
        self.path, self.field, self.left_out = Path(path), field, Counter[str]()
        self.files = self._find(str(path))
        self._names: list[str] | None = None
        self.entries = Entries(self._entries())
        self.class_names = self._names or [str(label) for label in range(self._largest + 1)]
        if self._largest >= len(self.class_names):
            raise UserError(f"{field}: {path} has the label {self._largest} and {len(self.class_names)} class names")
        self._group: RowGroup | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}

    def open(self, entry: Entry) -> bytes:
        """Reads the row group that holds the picture, and keeps it: the next picture is most likely in it too."""
        import pyarrow

        number, row = entry.place
        try:
            picture = self._row(number, row)
        except (pyarrow.ArrowException, OSError) as error:
            raise Rejected(f"cannot be read: {str(error).splitlines()[0]}") from None
        data = picture["bytes"] if isinstance(picture, dict) else picture
        if data is None:
            raise Rejected("no bytes in its row")
        return data

    def _find(self, path: str) -> list[Path]:
        pattern = f"{glob.escape(path)}/*.parquet" if Path(path).is_dir() else path
        files = sorted(Path(file) for file in ([path] if Path(path).is_file() else glob.glob(pattern)))
        splits = sorted({file.name.partition("-")[0] for file in files})
        if not files:
            raise UserError(f"{self.field}: {path} is no parquet file and holds none")
        if len(splits) > 1 and all("-of-" in file.name for file in files):
            example = f"{files[0].parent}/{splits[-1]}-*.parquet"
            raise UserError(f"{self.field}: {path} holds the splits {', '.join(splits)}; name one, as {example}")
        return files

    def _entries(self) -> Iterator[Entry]:
        self._largest = 0
        for number, file in enumerate(self.files):
            labels = self._labels(file)
            strange = np.flatnonzero((labels < 0) | (labels >= MAX_CLASSES))
            if len(strange):
                row = int(strange[0])
                raise UserError(f"{self.field}: {file}, row {row}, has the label {labels[row]}; name a labelled split")
            self._largest = max(self._largest, int(labels.max(initial=0)))
            size = file.stat().st_size
            for row, label in enumerate(labels.tolist()):
                yield Entry(f"{file.name}/{row:06d}", label, size, (number, row))

    def _labels(self, file: Path) -> np.ndarray:
        """(rows,) int64, zeros where the file has no labels; notes the class names on its way."""
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(file) as opened:
                schema, rows = opened.schema_arrow, opened.metadata.num_rows
                columns = opened.read(columns=[LABEL]) if LABEL in schema.names else None
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.field}: {file} is not a whole parquet file ({reason}); get it anew") from None
        if IMAGE not in schema.names:
            raise UserError(f"{self.field}: {file} has no column {IMAGE!r}, only {', '.join(schema.names)}")
        if not _holds_bytes(schema.field(IMAGE).type):
            raise UserError(
                f"{self.field}: {file}: column {IMAGE!r} is of {schema.field(IMAGE).type}, encoded pictures are read "
                "(bytes, or a structure with `bytes`); write it with `datasets`"
            )
        self._note_names(file, schema.metadata or {})
        if columns is None:
            return np.zeros(rows, np.int64)
        column = columns[LABEL]
        if column.null_count or not pyarrow.types.is_integer(column.type):
            raise UserError(f"{self.field}: {file} has labels that are no class indices; name a labelled split")
        return column.to_numpy().astype(np.int64)

    def _note_names(self, file: Path, metadata: dict[bytes, bytes]) -> None:
        try:
            features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
            names = features.get(LABEL, {}).get("names")
            names = None if names is None else [str(name) for name in names]
        except (ValueError, AttributeError, TypeError):  # no JSON, or of another structure
            raise UserError(f"{self.field}: {file} has metadata that `datasets` does not write; get it anew") from None
        if file != self.files[0] and names != self._names:
            raise UserError(
                f"{self.field}: {file} has other class names than {self.files[0]}; name files of one data set"
            )
        self._names = names

    def _row(self, number: int, row: int) -> dict[str, bytes | None] | bytes | None:
        if self._group is None or self._group.file != number or row not in self._group.rows:
            self._group = self._read_group(number, row)
        return self._group.column[row - self._group.rows.start].as_py()

    def _read_group(self, number: int, row: int) -> "RowGroup":
        from pyarrow import parquet

        with parquet.ParquetFile(self.files[number]) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            group = int(np.searchsorted(ends, row, side="right"))
            column = file.read_row_group(group, columns=[IMAGE])[IMAGE]
        return RowGroup(number, range(int(ends[group]) - sizes[group], int(ends[group])), column)


def _holds_bytes(column: Any) -> bool:
    from pyarrow import types

    if types.is_struct(column):
        return column.get_field_index("bytes") >= 0 and _holds_bytes(column.field("bytes").type)
    return types.is_binary(column) or types.is_large_binary(column)


class RowGroup(NamedTuple):
    """The pictures that a parquet file keeps together."""

    file: int
    rows: range
    column: Any
