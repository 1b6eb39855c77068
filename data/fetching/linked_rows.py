"""Rows whose pictures are links: the links in them, and the rows again with the paths of what was fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.molmo2_sets import PublicSet
from data.web_images import place_of
from grades.files import written_beside

BATCH_ROWS = 1000
ADDED = ("image", "images")  # the column for one link, and for a list of them


def row_files(folder: Path) -> list[Path]:
    """The parquet files below the folder but hidden ones."""
    found = [path for path in sorted(folder.rglob("*.parquet")) if path.is_file()]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def links_of(files: Sequence[Path], one: PublicSet) -> dict[str, str]:
    """URL -> SHA-256 of what is behind it, "" where no row says it. Raises ValueError for a file without links."""
    found: dict[str, str] = {}
    for path in files:
        for record in _records(path, [*one.link_columns, one.hash_column]):
            for number, url in enumerate(_urls(record, one)):
                wanted = str(record.get(one.hash_column) or "") if number == 0 else ""
                found[url] = found.get(url) or wanted
    return found


def write_rows(source: Path, target: Path, one: PublicSet, pictures: Path) -> tuple[int, int]:
    """Write the rows of a file whose pictures are all there, with a column of their paths; (written, left out).

    The paths are relative to the new file: the folder of all data sets can be moved.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(source)
    added = ADDED[_is_list(table, one)]
    kind = pa.list_(pa.string()) if added == "images" else pa.string()
    names = [name for name in table.schema_arrow.names if name not in ADDED]
    schema = pa.schema([*(table.schema_arrow.field(name) for name in names), pa.field(added, kind)])
    written = left_out = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(target) as path, pq.ParquetWriter(path, schema) as writer:
        for batch in table.iter_batches(BATCH_ROWS):
            rows = pa.Table.from_batches([batch])
            places = [_paths(record, one, pictures, target.parent) for record in _columns(rows, one)]
            kept = [i for i, paths in enumerate(places) if paths]
            values = [places[i] if added == "images" else places[i][0] for i in kept]
            rows = rows.select(names).take(pa.array(kept, pa.int64()))
            writer.write_table(rows.append_column(pa.field(added, kind), pa.array(values, kind)).cast(schema))
            written, left_out = written + len(kept), left_out + len(places) - len(kept)
    return written, left_out


def _paths(record: dict[str, Any], one: PublicSet, pictures: Path, start: Path) -> list[str]:
    """Of all its pictures; [] where one is not there, or it has none."""
    places = [place_of(pictures, url) for url in _urls(record, one)]
    if not all(place.exists() for place in places):
        return []
    return [Path(os.path.relpath(place, start)).as_posix() for place in places]


def _urls(record: dict[str, Any], one: PublicSet) -> list[str]:
    found: list[str] = []
    for column in one.link_columns:
        value = record.get(column)
        found += [url for url in (value if isinstance(value, list) else [value]) if isinstance(url, str) and url]
    return found


def _records(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    there = table.schema_arrow.names
    if columns[0] not in there:
        raise ValueError(f"{path} has no column {columns[0]}; it has {', '.join(there)}")
    for batch in table.iter_batches(BATCH_ROWS, columns=[name for name in columns if name in there]):
        yield from batch.to_pylist()


def _columns(rows: Any, one: PublicSet) -> list[dict[str, Any]]:
    return rows.select([name for name in one.link_columns if name in rows.column_names]).to_pylist()


def _is_list(table: Any, one: PublicSet) -> bool:
    import pyarrow as pa

    kind = table.schema_arrow.field(one.link_columns[0]).type
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)
