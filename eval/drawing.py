"""Points of an answer drawn onto its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.images import Source, decode_image
from data.points import SCALE, Found, Point
from grades.files import written_beside

# Told apart by those who see few colours too (Okabe and Ito's palette), one for each label.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
SMALLEST = 4  # radius of a point in pixels
PAD = 2  # pixels round a text


def draw_points(picture: Image.Image, labelled: Sequence[tuple[str, Sequence[Point]]]) -> Image.Image:
    """An RGB copy with each point as a disc in a white and a black ring, which show on light and on dark, its number
    beside it, and the labels at the top left in the colours of their discs.

    labelled: (label, points of this picture) of each tag.
    """
    drawn = picture.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    radius = max(SMALLEST, round(max(drawn.size) / 100))
    font = ImageFont.load_default(max(12, 2 * radius))
    below = 0.0
    for number, (label, points) in enumerate(labelled):
        if label and points:
            text, colour = f"{label} ({len(points)})", COLOURS[number % len(COLOURS)]
            below = _write(draw, drawn.size, (radius, below + radius / 2), text, font, colour)
    for number, (_, points) in enumerate(labelled):
        for one in points:
            # The edge at SCALE is the outer side of the last pixel.
            x, y = (
                min(one.x / SCALE * drawn.width, drawn.width - 1),
                min(one.y / SCALE * drawn.height, drawn.height - 1),
            )
            for more, colour in ((2, "black"), (1, "white"), (0, COLOURS[number % len(COLOURS)])):
                reach = radius + more * max(1, radius // 4)
                draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)
            if one.object_id is not None:
                text = str(one.object_id)
                width = draw.textlength(text, font) + 2 * radius
                beside = 2 * radius if x + radius + width < drawn.width else -width
                _write(draw, drawn.size, (x + beside, y - radius), text, font, "white")
    return drawn


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


def drawing_paths(path: Path, images: int) -> list[Path]:
    """Where the pictures go: to the path alone, or for several images to NAME_1, NAME_2, ... beside it."""
    return [path] if images == 1 else [path.with_name(f"{path.stem}_{n}{path.suffix}") for n in range(1, images + 1)]


def save_drawings(found: Found, images: Sequence[Source], path: Path) -> list[str]:
    """Draw the points of an answer onto its images and write these; returns a note for each file and for what was not
    drawn. Raises ImageDecodeError, OSError."""
    notes = [f"not drawn: {reason}" for reason in found.broken]
    paths = drawing_paths(path, len(images))
    for number, (image, target) in enumerate(zip(images, paths, strict=True), 1):
        labelled = [(one.label, [point for point in one.points if point.place == number]) for one in found.pointings]
        upright = Image.fromarray(decode_image(image).permute(1, 2, 0).contiguous().numpy())
        with written_beside(target) as beside:
            draw_points(upright, labelled).save(beside)
        notes.append(f"{target}: {sum(len(points) for _, points in labelled)} points")
    elsewhere = sum(one.place not in range(1, len(images) + 1) for one in found.points)
    return [*notes, f"not drawn: {elsewhere} points in pictures that are not there"] if elsewhere else notes
