"""Rows with points at times of a video: records whose answer is data.points' text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from data.point_rows import BAD_UNIT, COUNT_DIFFERS, OUTSIDE, by_time, seconds_of, video_points, video_tracks
from data.points import UNITS
from data.values import BadRow, dict_of, is_number, list_of, shown, text_of
from data.video_keys import VIDEO_KEYS, file_of, video_of_id

Record = Mapping[str, Any]

# What is asked by the task of a row of tracks; {{}} is where the point to follow goes.
TASKS = {
    "track": "Track {}.",
    "ground": "Point to where {} first and last appears.",
    "single_point_track": "Track this point: {{}}.",
}
USUAL_PER_S = 2.0  # times a second that need not be named
GRID_S = 0.01  # that a time may be off the grid


def molmo2_points(record: Record) -> Record:
    """Of allenai/Molmo2-VideoPoint: percent of the picture, a list for each time of the whole video. The answer's times
    count from where the clip begins, as allenai/molmo2 f3cb108 has them."""
    made = video_of_id(record)
    times = _of_clip([seconds_of(time) for time in list_of(record["two_fps_timestamps"])], made.get("clip_start"))
    lists = [list_of(one) for one in list_of(record["points"])]
    _is_counted(record, lists)
    answer = video_points(times, lists, text_of(record["label"], "label") or "", "percent", count=True)
    return made | {"question": record["question"], "answer": answer, "source": record.get("category")}


def _of_clip(times: list[float], start: Any, end: Any = None) -> list[float]:
    """Seconds of a video as those of its clip, as frames and subtitles have them. start, end: of the clip, None: of the
    video. Raises BadRow for a time outside."""
    start = 0.0 if start is None else seconds_of(start)
    if times and min(times) < start:
        raise BadRow("a point before the clip begins", f"{min(times):g} s, the clip begins at {start:g} s")
    if times and end is not None and max(times) > seconds_of(end):
        raise BadRow("a point after the clip ends", f"{max(times):g} s, the clip ends at {seconds_of(end):g} s")
    return [time - start for time in times]


def _is_counted(record: Record, lists: list[list]) -> bool:
    """Whether the row has a count. Raises BadRow where it is not the number of points."""
    count, total = record.get("count"), sum(map(len, lists))
    if count is not None and str(count) != str(total) and not (is_number(count) and float(count) == total):
        raise BadRow(COUNT_DIFFERS, f"count {shown(count)}, {total} points")
    return count is not None


def molmo2_tracks(record: Record) -> Record:
    """Of allenai/molmo2-track-instruction, in pixels of `width` and `height`: where objects are at times of a clip.

    As allenai/molmo2 f3cb108 reads it (olmo/data/academic_video_track_datasets.py, `TrackingDataset`): objects are
    those of `mask_id`, times those on the grid of `sampling_fps`; `task` says what is asked, without it to track. Rows
    without `clip` show all of `video`.
    """
    name = "clip" if record.get("clip") is not None else "video"
    folder = text_of(record.get("video_dataset"), "video_dataset") or ""
    label = text_of(record["expression"], "expression") or ""
    task = text_of(record.get("task"), "task") or "track"
    if task not in TASKS:
        raise BadRow("task is not known", f"{task}: must be one of {', '.join(TASKS)}")
    per_s = 0.0 if task == "ground" or record.get("sampling_fps") is None else _above_0(record, "sampling_fps")
    frames = [one for one in _visible(record) if not per_s or _is_on_grid(seconds_of(one["time"]), per_s)]
    question, pixels = TASKS[task].format(label), (_above_0(record, "width"), _above_0(record, "height"))
    if task == "ground":
        frames = _first_and_last(frames)
    if task == "single_point_track":
        first = next((one for one in frames if one["points"]), None)
        if first is None:
            raise BadRow("a point to track that is never seen", label)
        followed = first["points"][0]
        frames = [one | {"points": [of for of in one["points"] if of["id"] == followed["id"]]} for one in frames]
        point = followed.get("point", followed)
        question = question.format(video_points([first["time"]], [[point]], label, "pixels", pixels))
    if per_s not in (0.0, USUAL_PER_S):
        question = f"{question[:-1]} at {per_s:g} FPS."
    answer = video_tracks(frames, label, "pixels", pixels)
    return {"videos": [file_of(record[name], name, folder)], "question": question, "answer": answer, "source": folder}


def _visible(record: Record) -> list[dict]:
    """The frames in order, with the points of the objects that are asked for, without those that are hidden."""
    wanted = {text_of(one, "mask_id") for one in list_of(record.get("mask_id"))}
    found = []
    for frame in list_of(record["frame_trajectories"]):
        frame = dict_of(frame, "a frame")
        points = [dict_of(one, "a point") for one in list_of(frame.get("points"))]
        points = [one | {"id": text_of(one.get("id"), "id of an object")} for one in points if not one.get("occluded")]
        points = [one for one in points if not wanted or one["id"] in wanted]
        found.append({"time": frame.get("time"), "points": points})
    return sorted(found, key=lambda one: seconds_of(one["time"]))


def _above_0(record: Record, key: str) -> float:
    value = record.get(key)
    if value is None or not (is_number(value) and 0 < float(value) < math.inf):
        raise BadRow(f"{key} is no number above 0", shown(value))
    return float(value)


def _is_on_grid(time_s: float, per_s: float) -> bool:
    return abs(time_s - round(time_s * per_s) / per_s) < GRID_S


def _first_and_last(frames: list[dict]) -> list[dict]:
    """Of each object the first and the last time."""
    ends: dict[Any, list[int]] = {}
    for number, frame in enumerate(frames):
        for one in frame["points"]:
            ends.setdefault(one["id"], [number, number])[1] = number
    return [
        frame | {"points": [one for one in frame["points"] if number in ends[one["id"]]]}
        for number, frame in enumerate(frames)
    ]


def local_points(record: Record) -> Record:
    """Of one's own: `points` [{"x", "y", "timestamp", "object_id"}], in 0-1 unless `points_unit` says percent. With a
    `count` they are counted."""
    frames = _frames(record, "points")
    times, lists = [one["time"] for one in frames], [one["points"] for one in frames]
    is_count = _is_counted(record, lists)
    answer = video_points(times, lists, _label(record), _unit(record), count=is_count)
    return _shown(record) | {"question": text_of(record["query"], "query") or "", "answer": answer}


def local_tracks(record: Record) -> Record:
    """The same under `tracks`, for objects that are followed by their object_id."""
    answer = video_tracks(_frames(record, "tracks"), _label(record), _unit(record))
    return _shown(record) | {"question": record["query"], "answer": answer}


def _frames(record: Record, key: str) -> list[dict]:
    """The points by their times, which count from where the clip begins. Raises BadRow."""
    frames = by_time(_timed(record, key))
    times = _of_clip([one["time"] for one in frames], record.get("clip_start"), record.get("clip_end"))
    return [one | {"time": time} for one, time in zip(frames, times, strict=True)]


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
