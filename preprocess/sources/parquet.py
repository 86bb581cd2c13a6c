"""Parquet files of images, as Hugging Face's `datasets` and others write them: a column of encoded images (bytes, or a
structure with `bytes`), and one of labels."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError, errors_as
from preprocess.images.images import Rejected
from preprocess.sources.data_files import common_folder, data_files
from preprocess.sources.entries import Entries, Entry, check_size, file_stamp, refuse_lfs_pointer
from preprocess.sources.labels import NONE, REMEDY, Candidates, Value, as_label

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")  # usual names of the images' column


class ParquetSource:
    """The files of one split: a folder, one file, or a pattern such as `data/train-*.parquet`.

    The images' column is `image_field`, or the only one that can be it, or that of a usual name; labels: see
    `labels.Candidates`. Class names are those of the files' own metadata. Entries are in the order of files and rows; a
    key is `<file>/<row>`. The images' sizes are not known without reading them: an entry has its file's.
    """

    def __init__(
        self, path: str | Path, field: str, image_field: str | None = None, label_field: str | None = None
    ) -> None:
        self.path, self.field = Path(path), field
        self.files, self.left_out = data_files(str(path), field, ".parquet")
        tables = [_describe(file, field) for file in self.files]
        self.image = _image_column(tables, field, image_field)
        candidates = Candidates(self.path, field, label_field)
        columns = _label_columns(tables, field, candidates, self.image)
        self.entries = Entries(self._entries(candidates, columns))
        if not len(self.entries):
            raise UserError(f"{field}: {path} holds no rows; name files of images")
        labels = candidates.decide(lambda position: self.entries[position].key)
        self.class_names, self.labels = ["0"], labels and labels.field
        self.named_by_labels = labels is not None and labels.by_name
        if labels is not None:
            self.entries = self.entries.labelled(labels.indices)
            self.class_names = labels.class_names(_names(tables, field, labels.field), self.path, field)
        others = [name for name in tables[0].schema.names if name not in (self.image, *columns)]
        self.unread = (
            others if labels is None and label_field != NONE else []
        )  # columns that may be labels but are not used
        self._group: RowGroup | None = None

    def open(self, entry: Entry) -> bytes:
        """Reads the row group of the image, and keeps it for the next image, which is probably in it too."""
        number, row = entry.place
        with errors_as(Rejected, "cannot be read"):
            image = self._row(number, row)
            is_structure = image.is_valid and isinstance(image, Mapping)
            path, content = (image.get("path"), image["bytes"]) if is_structure else (None, image)
            data = content.as_buffer() if content.is_valid else None
            if data is None:
                raise Rejected(f"no bytes in its row{f', only the path {str(path)[:100]!r}' if path else ''}")
            check_size(data.size)
            return data.to_pybytes()

    def _entries(self, candidates: Candidates, columns: list[str]) -> Iterator[Entry]:
        root = common_folder(self.files)
        for number, file in enumerate(self.files):
            name, status = file.absolute().relative_to(root), file.stat()
            stamp = file_stamp(status)
            for row, found in enumerate(_labels(file, self.field, columns)):
                candidates.add(found)
                yield Entry(f"{name}/{row:06d}", 0, status.st_size, (number, row), stamp)

    def _row(self, number: int, row: int) -> Any:
        """The value in the images' column, as a pyarrow scalar, whose bytes are not copied yet."""
        if self._group is None or self._group.file != number or row not in self._group.rows:
            self._group = self._read_group(number, row)
        return self._group.column[row - self._group.rows.start]

    def _read_group(self, number: int, row: int) -> "RowGroup":
        from pyarrow import parquet

        with parquet.ParquetFile(self.files[number]) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            group = int(np.searchsorted(ends, row, side="right"))
            column = file.read_row_group(group, columns=[self.image])[self.image]
        return RowGroup(number, range(int(ends[group]) - sizes[group], int(ends[group])), column)


class RowGroup(NamedTuple):
    """The images of a row group."""

    file: int
    rows: range
    column: Any


class Table(NamedTuple):
    """A file's schema."""

    file: Path
    schema: Any
    features: dict[str, dict[str, Any]]  # by column, from `datasets`; empty for other writers


def _describe(file: Path, field: str) -> Table:
    """Reads a file's schema. Raises UserError for a file that is no parquet, and for duplicate columns."""
    from pyarrow import parquet

    with errors_as(UserError, f"{field}: {file} is not a complete parquet file; download it again"):
        with open(file, "rb") as start:
            refuse_lfs_pointer(file, field, start.read(40))
        schema = parquet.read_schema(file)
        names = Counter(schema.names)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{field}: {file} has two columns {twice!r}; write it with one of them")
    with errors_as(UserError, f"{field}: {file} has metadata that `datasets` does not write; write it again"):
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
        return Table(file, schema, {name: dict(feature) for name, feature in features.items()})


def _image_column(tables: list[Table], field: str, wanted: str | None) -> str:
    """The name of the images' column. Raises UserError if it is ambiguous, missing, or holds no bytes."""
    first = tables[0]
    usual = [name for name in first.schema.names if name.lower() in IMAGES]
    fit = [name for name in usual or first.schema.names if _holds_bytes(first.schema.field(name).type)]
    candidates = [wanted] if wanted is not None else fit if len(fit) == 1 else usual
    types = ", ".join(f"{name} ({str(first.schema.field(name).type)[:60]})" for name in first.schema.names[:20])
    if len(candidates) != 1:
        what = f"several columns that may hold the images: {', '.join(fit)}" if fit else "no column of encoded images"
        raise UserError(f"{field}: {first.file} has {what}; set data.image_field to the one that does, of {types}")
    (name,) = candidates
    for table in tables:
        if name not in table.schema.names:
            raise UserError(f"{field}: {table.file} has no column {name!r}, only {', '.join(table.schema.names)[:200]}")
        kind = table.schema.field(name).type
        if not _holds_bytes(kind):
            raise UserError(
                f"{field}: {table.file}: column {name!r} is of {str(kind)[:100]}, encoded images are read (bytes, or a "
                "structure with `bytes`), not their paths or pixels; write it with `datasets`, or set data.image_field"
            )
    _check_embedded(first.file, field, name)
    return name


def _check_embedded(file: Path, field: str, name: str) -> None:
    """Raises UserError if, by the file's statistics, no row has an image's bytes."""
    from pyarrow import parquet

    with errors_as(UserError, f"{field}: {file} is not a complete parquet file; download it again"):
        metadata = parquet.read_metadata(file)
        places = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path in (name, f"{name}.bytes")]
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        statistics = [group.column(place).statistics for group in groups for place in places]
        nulls = sum(each.null_count or 0 for each in statistics if each is not None)
    if 0 < metadata.num_rows == nulls:
        raise UserError(
            f"{field}: {file}: column {name!r} has only paths, and no bytes in any row: the images were not embedded; "
            "write it again with them (`datasets` does on push_to_hub), or name the folder of the images"
        )


def _holds_bytes(column: Any) -> bool:
    from pyarrow import types

    if types.is_struct(column):
        return column.get_field_index("bytes") >= 0 and _holds_bytes(column.field("bytes").type)
    return types.is_binary(column) or types.is_large_binary(column)


def _label_columns(tables: list[Table], field: str, candidates: Candidates, image: str) -> list[str]:
    """The columns that may be labels, by name or as ClassLabel. Raises UserError if they differ between files."""
    by_table = [_labels_for(table, candidates, image) for table in tables]
    first, shown = by_table[0], [", ".join(columns) or "none" for columns in by_table]
    if candidates.wanted not in (None, NONE) and not first:
        raise UserError(
            f"data.label_field: {candidates.wanted} is no column of {tables[0].file}, which has "
            f"{', '.join(tables[0].schema.names)[:200]}"
        )
    other = next((number for number, columns in enumerate(by_table) if columns != first), None)
    if other:
        raise UserError(
            f"{field}: {tables[other].file} has other columns of labels ({shown[other]}) than {tables[0].file} "
            f"({shown[0]}); name files of one data set, or {REMEDY}"
        )
    return first


def _labels_for(table: Table, candidates: Candidates, image: str) -> list[str]:
    names = [name for name in table.schema.names if name != image]
    known = [name for name in names if table.features.get(name, {}).get("_type") == "ClassLabel"]
    return sorted({*candidates.among(names), *(known if candidates.wanted is None else ())})


def _labels(file: Path, field: str, columns: list[str]) -> Iterator[dict[str, Value]]:
    """The values of each row in these columns."""
    from pyarrow import parquet

    with errors_as(UserError, f"{field}: {file} is not a complete parquet file; download it again"):
        with parquet.ParquetFile(file) as opened:
            rows = opened.metadata.num_rows
            table = opened.read(columns=columns) if columns else None
        lists = [table[name].to_pylist() for name in columns] if table else []
    for row in range(rows):
        with errors_as(UserError, f"{field}: {file}, row {row}, has no supported label; {REMEDY}"):
            labels = {name: as_label(values[row]) for name, values in zip(columns, lists, strict=True)}
        yield labels


def _names(tables: list[Table], field: str, label: str) -> list[str] | None:
    """The class names of a column in the metadata of `datasets`."""
    first, *others = (table.features.get(label, {}).get("names") for table in tables)
    other = next((table.file for table, names in zip(tables[1:], others, strict=True) if names != first), None)
    if other:
        raise UserError(f"{field}: {other} has other class names than {tables[0].file}; name files of one data set")
    with errors_as(UserError, f"{field}: {tables[0].file} has no list of class names for {label}; write it again"):
        names = None if first is None else list(map(str, first))
        "".join(names or ()).encode()  # raises for lone surrogates, which JSON can hold
    return names
