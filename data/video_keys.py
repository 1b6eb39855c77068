"""The videos that a row is about, and what belongs to them: which seconds, which subtitles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.values import BadRow, dict_of, image_of, is_number, kind_of, shown, text_of
from data.web_images import WebImage

VIDEO_KEYS = ("videos", "video", "video_path")
CLIP_KEYS = ("subtitles", "clip_start", "clip_end")
VIDEO_PLACE = "<video>"  # in a text, where a video goes


def videos_of(record: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """{"videos"} of a record that has some, with `subtitles`, `clip_start` and `clip_end` where it has them; else {}.

    videos: paths of files or of folders of frames, made whole by `folder`, bytes, or {"bytes", "path"}.
    subtitles: [{"start", "end", "text"}], clip_start and clip_end: all in seconds of the file. Raises BadRow.
    """
    given: Any = next((record[key] for key in VIDEO_KEYS if record.get(key) is not None), [])
    videos = [_video(one, folder) for one in (given if isinstance(given, list | tuple) else [given])]
    if not videos:
        return {}
    found: dict[str, Any] = {"videos": videos}
    if (subtitles := _subtitles(record.get("subtitles"))) is not None:
        found["subtitles"] = subtitles
    for key in ("clip_start", "clip_end"):
        if record.get(key) is not None:
            found[key] = _seconds(record[key], key)
    if len(videos) > 1 and len(found) > 1:
        raise BadRow("subtitles or a clip of several videos", f"{len(videos)} videos, {', '.join([*found][1:])}")
    if found.get("clip_end", math.inf) <= found.get("clip_start", 0.0):
        raise BadRow("clip_end is not after clip_start", f"{found['clip_start']} to {found['clip_end']}")
    return found


def video_of_id(record: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a row for a record that names a video by its id, as Molmo2's sets do: a file ID.mp4, with its seconds
    (clip_start or video_start, ...) and its subtitles. Raises BadRow."""
    names = {"clip_start": ("clip_start", "video_start"), "clip_end": ("clip_end", "video_end"),
             "subtitles": ("subtitles", "subtitle")}  # fmt: skip
    found = {key: next((record[name] for name in given if record.get(name) is not None), None)
             for key, given in names.items()}  # fmt: skip
    return {
        "videos": [file_of(record["video_id"], "video_id")],
        **{key: value for key, value in found.items() if value is not None},
    }


def file_of(name: Any, field: str, folder: str = "") -> str:
    """NAME.mp4, in a folder. Raises BadRow for a name that leads elsewhere."""
    path = f"{folder}/" * bool(folder) + (text_of(name, field) or "")
    if not name or path.startswith(("/", ".")) or ".." in path.split("/"):
        raise BadRow(f"{field} is no name", shown(path))
    return f"{path}.mp4"


def _video(value: Any, folder: Path | None) -> Any:
    try:
        found = image_of(value, folder)
    except BadRow as bad:
        raise BadRow(bad.kind.replace("image", "video"), bad.found) from None
    if isinstance(found, WebImage):
        raise BadRow("video is a URL, which is not fetched", shown(found.url))
    if hasattr(found, "getexif"):
        raise BadRow(f"video is {kind_of(found)}", shown(value))
    return found


def _subtitles(value: Any) -> list[dict] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):  # a column of lists
        lengths = {len(one) for one in value.values() if isinstance(one, list | tuple)}
        if len(lengths) != 1 or not all(isinstance(one, list | tuple) for one in value.values()):
            raise BadRow("subtitles is an object", shown(value))
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise BadRow(f"subtitles is {kind_of(value)}", shown(value))
    found = []
    for one in value:
        one = dict_of(one, "a subtitle")
        start, end = (_seconds(one.get(key), f"{key} of a subtitle") for key in ("start", "end"))
        found.append({"start": start, "end": end, "text": text_of(one.get("text"), "text of a subtitle") or ""})
    return found


def _seconds(value: Any, field: str) -> float:
    if is_number(value) and math.isfinite(seconds := float(value)) and seconds >= 0:
        return seconds
    raise BadRow(f"{field} is no number of seconds", shown(value))
