"""The values of a row: what may stand where a text or an image is expected, and why anything else may not.

Nothing is guessed: a value is taken if it can mean one thing only, else its row is bad, with what was found.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import date, time
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from data.web_images import SCHEMES, WebImage

IMAGE_KEYS = ("images", "image", "file_name", "image_path", "image_url", "image_urls")
SHOWN_LETTERS = 80  # of a value, in a message
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# How PNG, JPEG, GIF, WebP, BMP, TIFF, HEIC and AVIF begin in base64; no path begins like one of them and is as long.
BASE64_IMAGE = re.compile(
    r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3]|SUkq|TU0A|AAAA[A-Za-z0-9+/]{2}Z0eX)[A-Za-z0-9+/\s]{40,}={0,2}\s*"
)


class Number(str):
    """A number of a JSON file in the letters that stand there: 1e3 is not 1000.0, and no digit is lost."""

    __slots__ = ()


class Int(int):
    """The same as a whole number that one can count with; as it is, it has its letters still."""

    letters: str


class Float(float):
    """The same as a number with a fraction or an exponent."""

    letters: str


def plain_numbers(value: Any) -> Any:
    """The value with Int and Float in place of each Number in it."""
    if isinstance(value, Number):
        made: Any
        try:
            made = Int(value)
        except ValueError:  # a point, an exponent, or more digits than Python takes
            made = Float(value)
        made.letters = str(value)
        return made
    if isinstance(value, Mapping):
        return {key: plain_numbers(one) for key, one in value.items()}
    return [plain_numbers(one) for one in value] if isinstance(value, list) else value


class Reason(str):
    """Why a row cannot be used: equal to the plain string, by which rows are counted; with one row as an example."""

    where: str  # the row's file and line, in words
    found: str  # what stands there, shortened

    def __new__(cls, kind: str, where: str = "", found: str = "") -> Reason:
        made = super().__new__(cls, kind)
        made.where, made.found = where, found
        return made

    @property
    def first(self) -> str:
        """Where the row stands and what was found in it: under a reason that is counted, the first row's."""
        return f"{self.where}: {self.found}" if self.found else self.where


class BadRow(ValueError):
    """A row that cannot be used. kind: the reason, one of few; found: what stands in this row."""

    def __init__(self, kind: str, found: str = ""):
        super().__init__(kind, found)
        self.kind, self.found = kind, found


def is_number(value: Any) -> bool:
    """Whether it is one, true and false apart."""
    return isinstance(value, Number | int | float) and not isinstance(value, bool)


def kind_of(value: Any) -> str:
    """In words, with its article: "a number", "a list of strings"."""
    if isinstance(value, bool):
        return "true or false"
    if is_number(value):
        return "a number"
    if isinstance(value, list | tuple):
        kinds = {str: "a list of strings", dict: "a list of objects"}
        return next((kind for cls, kind in kinds.items() if value and all(type(one) is cls for one in value)), "a list")
    names = {str: "a string", dict: "an object", bytes: "bytes", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def shown(value: Any) -> str:
    """The value as JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda one: f"<{type(one).__name__}>")
    except (ValueError, TypeError, RecursionError):  # a key that is no string
        text = f"<{type(value).__name__}>"
    return shortened(text)


def shortened(text: str) -> str:
    """The beginning of a text on one line, for a message."""
    text = text if len(text) <= SHOWN_LETTERS else text[: SHOWN_LETTERS - 3] + "..."
    return " ".join(printable(text).split())


def printable(text: str) -> str:
    """The text with an escape in place of each half of a surrogate pair, as which a byte of a file's name that is no
    UTF-8 comes: no console prints one, and no file in UTF-8 holds one."""
    return text.encode("utf-8", "backslashreplace").decode()


def text_of(value: Any, field: str) -> str | None:
    """The text of a string; of a number or of true and false their JSON text; of a date or time, as parquet has them,
    their ISO text; None of None.

    field: the value's name in messages. Raises BadRow for anything else, and for half of a surrogate pair.
    """
    if value is None:
        return None
    if isinstance(value, Int | Float):
        return value.letters
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"{field} holds half of a surrogate pair", shown(value[max(0, error.start - 20) :])) from None
        return str(value)
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    kind = "no number" if isinstance(value, float) else kind_of(value)
    raise BadRow(f"{field} is {kind}", shown(value))


def list_of(value: Any) -> list:
    """A list of the value, unless it is one; without None."""
    found = list(value) if isinstance(value, list | tuple) else [value]
    return [one for one in found if one is not None]


def draw_by(key: str, count: int) -> int:
    """A number below count that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") % count


def dict_of(value: Any, field: str) -> dict:
    """The value if it is a dict. Raises BadRow otherwise."""
    if not isinstance(value, Mapping):
        raise BadRow(f"{field} is {kind_of(value)}", shown(value))
    return dict(value)


def source_of(*values: Any) -> str | None:
    """The first of the values that names a source: a string or a number."""
    for value in values:
        if isinstance(value, str | int | float) and value != "":
            return text_of(value, "source")
    return None


def ratings_of(value: Any, field: str) -> list | None:
    """One number or None for each turn. Raises BadRow for anything else."""
    if value is None:
        return None
    found = []
    for rating in value if isinstance(value, list | tuple) else [value]:
        if isinstance(rating, Number):
            rating = float(rating)
        if isinstance(rating, bool) or not isinstance(rating, int | float | None):
            raise BadRow(f"{field} holds {kind_of(rating)}", shown(value))
        found.append(rating)
    return found


def images_of(record: Mapping[str, Any], folder: Path | None) -> list:
    """The images of a record, not decoded: one or a list, under the first of IMAGE_KEYS that has some.

    folder: where relative paths start. Raises BadRow.
    """
    given: Iterable = next((record[key] for key in IMAGE_KEYS if record.get(key) is not None), [])
    return [image_of(one, folder) for one in (given if isinstance(given, list | tuple) else [given])]


def image_of(value: Any, folder: Path | None) -> Any:
    """A path, bytes, {"bytes", "path"}, WebImage or PIL image; a path made whole by `folder`. Raises BadRow."""
    if isinstance(value, bytes | PurePath) or hasattr(value, "getexif"):
        value = str(folder / value if folder else value) if isinstance(value, PurePath) else value
        return value
    if isinstance(value, str) and not isinstance(value, Number) and value:
        return _image_of_text(value, folder)
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if data:
            return _from_base64(data) if isinstance(data, str) else dict(value)
        if isinstance(path, str) and path:
            return _image_of_text(path, folder)
        if value.get("url") is not None:
            return image_of(value["url"], folder)
        raise BadRow("image is an object without bytes, path and url", shown(value))
    raise BadRow("image is an empty string" if value == "" else f"image is {kind_of(value)}", shown(value))


def _image_of_text(text: str, folder: Path | None) -> Any:
    if text[:5].lower() == "data:":
        kind, comma, data = text.partition(",")
        if not comma:
            raise BadRow("image is a data URL without data", shown(text))
        return _from_base64(data) if kind.lower().endswith(";base64") else unquote_to_bytes(data)
    if text[:7].lower() == "file://":
        return url2pathname(urlsplit(text).path)
    if URL.match(text):
        if text.partition("://")[0].lower() not in SCHEMES:
            raise BadRow("image is a URL of a kind that cannot be fetched", shown(text))
        return WebImage(text)
    if BASE64_IMAGE.fullmatch(text):
        return _from_base64(text)
    return str(folder / text) if folder else text


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow("image is not base64", f"{error}: {shown(text)}") from None
