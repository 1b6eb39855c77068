"""Points of answers drawn onto what they are in: pictures, and frames of videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.images import Source, decode_image
from data.points import SCALE, Found, Point
from data.video import FRAMES_PER_S
from grades.files import written_beside

# Told apart by those who see few colours too (Okabe and Ito's palette), one for each label.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
EXPECTED = "#009E73"  # of the rings
SMALLEST = 4  # radius of a point in pixels
PAD = 2  # pixels round a text

Labelled = list[tuple[str, list[Point]]]  # (label, its points in one picture) of each tag


@dataclass
class Placed:
    """The points of a text by what they are in."""

    images: list[Labelled]
    frames: list[Labelled]
    elsewhere: int = 0  # in pictures or at times that are not there
    broken: list[str] = field(default_factory=list)  # of each tag that cannot be read, why

    @property
    def count(self) -> int:
        """Of those that are in something."""
        return sum(len(points) for one in (*self.images, *self.frames) for _, points in one)


def place_points(found: Found, images: int, times_s: Sequence[float] = ()) -> Placed:
    """Which points are in which of the images, numbered from 1, and of the frames of a video, by their times.

    A point at a time between two frames is in the nearer one.
    """
    placed = Placed([[] for _ in range(images)], [[] for _ in times_s], broken=found.broken)
    for one in found.pointings:
        by_place: dict[tuple[bool, int], list[Point]] = {}
        for point in one.points:
            is_time = isinstance(point.place, float)
            number = _frame_at(point.place, times_s) if is_time else int(point.place) - 1
            if number is None or not 0 <= number < (len(times_s) if is_time else images):
                placed.elsewhere += 1
            else:
                by_place.setdefault((is_time, number), []).append(point)
        for (is_time, number), points in by_place.items():
            (placed.frames if is_time else placed.images)[number].append((one.label, points))
    return placed


def _frame_at(time_s: float, times_s: Sequence[float]) -> int | None:
    """None where the video has no such time."""
    if not times_s or not times_s[0] - 1 / FRAMES_PER_S <= time_s <= times_s[-1] + 1 / FRAMES_PER_S:
        return None
    return min(range(len(times_s)), key=lambda number: abs(times_s[number] - time_s))


def draw_points(
    picture: Image.Image, labelled: Labelled, expected: Labelled | None = None, with_text: bool = True
) -> Image.Image:
    """An RGB copy with each point as a disc in a white and a black ring, which show on light and on dark, its number
    beside it, and the labels at the top left in the colours of their discs.

    expected: points that should be there, as open rings around the place. with_text: numbers and labels too.
    """
    drawn = picture.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    radius = max(SMALLEST, round(max(drawn.size) / 100))
    font = ImageFont.load_default(max(12, 2 * radius))
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(labelled))]
    below = 0.0
    for colour, (label, points) in zip(colours, labelled, strict=True):
        if with_text and label and points:
            place = radius, below + radius / 2
            below = _write(draw, drawn.size, place, f"{label} ({len(points)})", font, colour)
    for _, points in expected or ():
        for one in points:
            _ring(draw, _pixel(one, drawn.size), radius)
    for colour, (_, points) in zip(colours, labelled, strict=True):
        for one in points:
            x, y = _pixel(one, drawn.size)
            _disc(draw, x, y, radius, colour)
            if with_text and one.object_id is not None:
                text = str(one.object_id)
                width = draw.textlength(text, font) + 2 * radius
                beside = 2 * radius if x + radius + width < drawn.width else -width
                _write(draw, drawn.size, (x + beside, y - radius), text, font, "white")
    return drawn


def _pixel(point: Point, size: tuple[int, int]) -> tuple[float, float]:
    """Where it is; the edge at SCALE is the outer side of the last pixel."""
    return min(point.x / SCALE * size[0], size[0] - 1), min(point.y / SCALE * size[1], size[1] - 1)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: int, colour: str) -> None:
    for more, filled in ((2, "black"), (1, "white"), (0, colour)):
        reach = radius + more * max(1, radius // 4)
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=filled)


def _ring(draw: ImageDraw.ImageDraw, place: tuple[float, float], radius: int) -> None:
    """Wide enough for a disc in it."""
    x, y = place
    line = max(1, radius // 4)
    for more, width, colour in ((3, line, "black"), (2, 2 * line, EXPECTED), (0, line, "white")):
        reach = 2 * radius + more * line
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=width)


def _write(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    place: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    colour: str,
) -> float:
    """Text on black, moved up and left where it would leave the picture; returns its lower edge."""
    left, top, right, bottom = draw.textbbox(place, text, font=font)
    across, down = (min(0, end - last - PAD) for end, last in zip(size, (right, bottom), strict=True))
    across, down = max(across, PAD - left), max(down, PAD - top)  # the beginning shows, whatever does not fit
    draw.rectangle((left + across - PAD, top + down - PAD, right + across + PAD, bottom + down + PAD), fill="black")
    draw.text((place[0] + across, place[1] + down), text, font=font, fill=colour)
    return bottom + down + PAD


def save_drawings(found: Found, images: Sequence[Source], targets: Sequence[Path]) -> list[str]:
    """Draw the points of an answer onto its images and write each to its target; returns a note for each file and for
    what was not drawn. Raises ImageDecodeError, OSError."""
    placed = place_points(found, len(images))
    notes = [f"not drawn: {reason}" for reason in placed.broken]
    for image, labelled, target in zip(images, placed.images, targets, strict=True):
        with written_beside(target) as beside:
            draw_points(upright(image), labelled).save(beside)
        notes.append(f"{target}: {sum(len(points) for _, points in labelled)} points")
    if placed.elsewhere:
        notes.append(f"not drawn: {placed.elsewhere} points in pictures that are not there")
    return notes


def upright(image: Source) -> Image.Image:
    """An image as Pillow has it, in RGB. Raises ImageDecodeError."""
    return Image.fromarray(decode_image(image).permute(1, 2, 0).contiguous().numpy())
