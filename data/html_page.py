"""Pages in one HTML file that refer to nothing outside, so that they open offline: their frame, text and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

import torch
from PIL import Image

from data.values import printable

PNG_SIDE = 128  # pixels, up to which a picture is written without loss unless told otherwise
STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
h1 { font-size: 1.4em } h2 { font-size: 1.05em; margin: 2em 0 .4em; overflow-wrap: anywhere }
"""


def page(title: str, style: str, body: Iterable[str], script: str = "") -> str:
    """The whole page. body: HTML; script: JavaScript that runs once the body is there. It may load nothing."""
    allowed = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}{_SCRIPTS if script else ""}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{text(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>",
        f"<h1>{text(title)}</h1>",
        *body,
        f"<script>{script}</script>" if script else "",
        "</body>\n</html>\n",
    ]
    return "\n".join(filter(None, parts))


_SCRIPTS = "; script-src 'unsafe-inline'"


def text(value: str) -> str:
    """The text as it stands in HTML, also within a quoted attribute; a lone surrogate shows as its number."""
    return escape(printable(value))


def data_url(pixels: torch.Tensor, jpeg: bool | None = None) -> str:
    """An image, uint8 [3, H, W], as an address that holds it. jpeg: None where a small one is to be without loss."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if jpeg is None:
        jpeg = image.width > PNG_SIDE
    buffer = io.BytesIO()
    if jpeg:
        image.save(buffer, "JPEG", quality=85)
    else:
        image.save(buffer, "PNG")
    return f"data:image/{'jpeg' if jpeg else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
