"""JSON Lines, JSON arrays and CSV as tables: a record by its number, read from the file when it is asked for.

A file is read once from its beginning to its end to find where each record starts: 8 bytes of memory per record. No
type is inferred: what stands in one record changes no other, and a record that cannot be read is one bad row.
"""

from __future__ import annotations

import csv
import io
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.formats import NOT_UTF8
from data.json_places import array_starts, with_end
from data.packed_files import file_type, is_packed, unpacked
from data.values import BadRow, Number, kind_of, shortened, shown

CHUNK_BYTES = 8 * 2**20
MARK = b"\xef\xbb\xbf"  # which some programs write before UTF-8
TYPES = (".jsonl", ".json", ".csv", ".tsv")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Of a record of a CSV file; a quotation mark that is never closed must not take the rest of a file into memory.
csv.field_size_limit(64 * 2**20)

DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, strict=False)


def open_text_file(path: Path) -> TextFile:
    """The table of a file of one of TYPES, or packed with .gz or .zst. Raises ValueError where it is none, OSError."""
    kind = file_type(path)
    path = unpacked(path) if is_packed(path) else path
    with path.open("rb") as file:
        begin = file.read(4)
        if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("is UTF-16: save it as UTF-8")
        start = len(MARK) if begin.startswith(MARK) else 0
        file.seek(start)
        if kind in DELIMITERS:
            return _open_csv(path, kind, file, start)
        first = next((byte for byte in iter(lambda: file.read(1), b"") if byte.strip()), b"")
        if first == b"[":
            return JsonArray(path, array_starts(file))
        file.seek(start)
        lines = JsonLines(path, *_line_starts(file))
    if kind == ".json" and len(lines) and lines.data(0).strip() == b"{":
        raise ValueError("is one object over several lines: it must be an array of rows, or one row per line")
    return lines


class TextFile:
    """Records of a file by where they start."""

    def __init__(self, path: Path, starts: np.ndarray):
        """starts: int64 [records + 1], bytes; the last is where the last record ends."""
        self.path, self.starts = path, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def data(self, number: int) -> bytes:
        """What stands there."""
        start, end = self.starts[number : number + 2].tolist()
        with self.path.open("rb") as file:  # by every process for itself, and no file stays open
            file.seek(start)
            return file.read(end - start)

    def text(self, number: int) -> str:
        """The same as text. Raises BadRow where it is not UTF-8."""
        data = self.data(number)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            wrong = data[max(0, error.start - 20) : error.start + 20].decode("utf-8", "backslashreplace")
            raise BadRow(NOT_UTF8, f"byte {data[error.start]:#04x} in {wrong.strip()}") from None

    def record(self, number: int) -> dict[str, Any]:
        """Raises BadRow."""
        return self.parsed(self.text(number))

    def records(self) -> Iterator[dict[str, Any]]:
        """All records in their order, {} for one that cannot be read: many times as fast as one by one."""
        with self.path.open("rb") as file:
            file.seek(int(self.starts[0]))
            for start, end in pairwise(self.starts.tolist()):
                try:
                    yield self.parsed(file.read(end - start).decode("utf-8"))
                except (BadRow, UnicodeDecodeError):
                    yield {}

    def parsed(self, text: str) -> dict[str, Any]:
        """The record of its text. Raises BadRow."""
        raise AssertionError("a subclass reads")

    def place(self, number: int) -> str:
        """Where a record stands, in words."""
        return f"row {number + 1}"


class JsonArray(TextFile):
    """The elements of one JSON array."""

    def parsed(self, text: str) -> dict[str, Any]:
        return json_object(text, alone=False)


class JsonLines(TextFile):
    """One JSON object per line; lines without letters are no rows."""

    def __init__(self, path: Path, starts: np.ndarray, blank: np.ndarray):
        """blank: int64, for each line without letters the number of the record after it, in order."""
        super().__init__(path, starts)
        self.blank = blank

    def parsed(self, text: str) -> dict[str, Any]:
        return json_object(text)

    def place(self, number: int) -> str:
        return f"line {number + 1 + bisect_right(self.blank, number)}"


def json_object(text: str, alone: bool = True) -> dict[str, Any]:
    """The object at the beginning of the text; its numbers keep their letters. alone: nothing may follow it.

    Raises BadRow.
    """
    text = text.strip()
    try:
        found, end = DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        raise BadRow("not JSON", f"{error.msg}, column {error.pos + 1} of {shortened(text)}") from None
    except RecursionError:
        raise BadRow("not JSON", f"nested too deeply: {shortened(text)}") from None
    if alone and end < len(text):
        raise BadRow("not JSON", f"more follows at column {end + 1}: {shortened(text[end:])}")
    if not isinstance(found, dict):
        raise BadRow(f"row is {kind_of(found)}", shown(found))
    return found


def _line_starts(file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """(starts, blank) of JsonLines, from where the file stands."""
    starts, blank = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    offset = begin = file.tell()  # of the chunk, and of the line that is open where it begins
    count, has_letters = 0, False  # the records before that line, and whether it has letters so far
    while chunk := file.read(CHUNK_BYTES):
        letters = np.frombuffer(chunk, dtype=np.uint8)
        begins = np.append(0, np.flatnonzero(letters == ord("\n")) + 1)
        is_open = begins[-1] < len(chunk)  # the last line goes on in the next chunk, or the file ends
        lines = np.logical_or.reduceat(letters > ord(" "), begins if is_open else begins[:-1])
        lines[0] |= has_letters
        begins = begins + offset
        begins[0] = begin
        offset, begin, has_letters = offset + len(chunk), int(begins[-1]), bool(is_open and lines[-1])
        ended = lines[: len(begins) - 1]
        starts.append(begins[:-1][ended])
        blank.append(count + np.cumsum(ended)[~ended])
        count += int(ended.sum())
    last = [begin, offset] if has_letters else [offset]
    return np.concatenate([*starts, np.array(last, dtype=np.int64)]), np.concatenate(blank)


class CsvFile(TextFile):
    """The rows of a CSV file as RFC 4180 has it; all values are text, those without letters None."""

    def __init__(self, path: Path, starts: np.ndarray, lines: np.ndarray, columns: list[str], delimiter: str):
        """lines: int32 [records], the number of each record's first line."""
        super().__init__(path, starts)
        self.lines, self.columns, self.delimiter = lines, columns, delimiter

    def parsed(self, text: str) -> dict[str, Any]:
        try:
            cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter, strict=True))
        except csv.Error as error:
            raise BadRow("not CSV", f"{error}: {shortened(text)}") from None
        if len(cells) != len(self.columns):
            raise BadRow(
                "another number of cells than of columns",
                f"{len(cells)} cells, {len(self.columns)} columns: {shown(cells)}",
            )
        return {column: cell or None for column, cell in zip(self.columns, cells, strict=True)}

    def place(self, number: int) -> str:
        return f"line {self.lines[number]}"


def _open_csv(path: Path, kind: str, file: BinaryIO, start: int) -> CsvFile:
    header = file.readline().decode("utf-8", "backslashreplace")
    delimiter = DELIMITERS[kind]
    if delimiter == "," and "," not in header:  # as spreadsheets write it where the comma is the decimal sign
        delimiter = next((one for one in (";", "\t") if one in header), ",")
    file.seek(start)
    end, line = start, 0  # of the record that was read last

    def letters() -> Iterator[str]:
        nonlocal end, line
        for data in file:
            end, line = end + len(data), line + 1
            yield data.decode("latin-1")  # one per byte: where a record ends does not depend on other letters

    reader = csv.reader(letters(), delimiter=delimiter, strict=True)
    try:
        next(reader, None)
    except csv.Error as error:
        raise ValueError(f"its first line, the names of the columns, is not CSV: {error}") from None
    with path.open("rb") as again:
        again.seek(start)
        text = again.read(end - start).decode("utf-8", "backslashreplace")
    columns = [name.strip() for name in next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])]
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"its first line names a column twice: {', '.join(twice)}")
    starts, lines = array("q"), array("i")
    while True:
        begin, number = end, line + 1
        try:
            blank = next(reader) == []
        except StopIteration:
            break
        except csv.Error:
            blank = False  # `record` says what is wrong
        if end == begin:  # an error at the very end of the file
            break
        if not blank:
            starts.append(begin)
            lines.append(number)
    return CsvFile(path, with_end(starts, end), np.array(lines, dtype=np.int32), columns, delimiter)
