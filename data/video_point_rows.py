"""Rows with points at times of a video: records whose answer is data.points' text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.point_rows import BAD_UNIT, COUNT_DIFFERS, OUTSIDE, by_time, seconds_of, video_points, video_tracks
from data.points import UNITS
from data.values import BadRow, dict_of, is_number, list_of, shown, text_of
from data.video_keys import VIDEO_KEYS, video_of_id

Record = Mapping[str, Any]


def molmo2_points(record: Record) -> Record:
    """Of allenai/Molmo2-VideoPoint: percent of the picture, a list for each time of the whole video. The answer's times
    count from where the clip begins, as allenai/molmo2 f3cb108 has them."""
    made = video_of_id(record)
    start = seconds_of(made.get("clip_start", 0))
    times = [seconds_of(time) - start for time in list_of(record["two_fps_timestamps"])]
    if any(time < 0 for time in times):
        raise BadRow("a point before the clip begins", f"{min(times) + start:g} s, the clip begins at {start:g} s")
    lists = [list_of(one) for one in list_of(record["points"])]
    total = sum(map(len, lists))
    if record.get("count") is not None and str(record["count"]) != str(total):
        raise BadRow(COUNT_DIFFERS, f"count {shown(record['count'])}, {total} points")
    answer = video_points(times, lists, text_of(record["label"], "label") or "", "percent", count=True)
    return made | {"question": record["question"], "answer": answer, "source": record.get("category")}


def local_points(record: Record) -> Record:
    """Of one's own: `points` [{"x", "y", "timestamp", "object_id"}], in 0-1 unless `points_unit` says percent."""
    frames = by_time(_timed(record, "points"))
    times, lists = [one["time"] for one in frames], [one["points"] for one in frames]
    query = text_of(record["query"], "query") or ""
    return _shown(record) | {"question": query, "answer": video_points(times, lists, _label(record), _unit(record))}


def local_tracks(record: Record) -> Record:
    """The same under `tracks`, for objects that are followed by their object_id."""
    answer = video_tracks(by_time(_timed(record, "tracks")), _label(record), _unit(record))
    return _shown(record) | {"question": record["query"], "answer": answer}


def _shown(record: Record) -> dict[str, Any]:
    keys = (*VIDEO_KEYS, "subtitles", "clip_start", "clip_end", "source")
    return {key: record[key] for key in keys if record.get(key) is not None}


def _label(record: Record) -> str:
    """Without a label the query is it."""
    label = record.get("label") if record.get("label") is not None else record["query"]
    return text_of(label, "label") or ""


def _unit(record: Record) -> str:
    said = text_of(record.get("points_unit"), "points_unit") or "0-1"
    if said not in UNITS or said == "pixels":
        allowed = ", ".join(one for one in UNITS if one != "pixels")
        raise BadRow(BAD_UNIT, f"{said}: must be one of {allowed} in a video")
    return said


def _timed(record: Record, key: str) -> list[dict]:
    """The points, each with its time; without a unit none may lie outside 0-1. Raises BadRow."""
    found = [dict_of(one, "a point") for one in list_of(record[key])]
    for one in found:
        if one.get("timestamp") is None:
            raise BadRow("a point of a video without a timestamp", shown(one))
        places = [float(one[axis]) for axis in ("x", "y") if is_number(one.get(axis))]
        if record.get("points_unit") is None and any(not 0 <= place <= 1 for place in places):
            raise BadRow(OUTSIDE, f"{shown(one)}: points_unit must say what it is in")
    return found
