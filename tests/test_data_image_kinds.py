"""Files of images as people have them: formats, several pictures, ones that break off, and every way to give one."""

import base64
import io
import json
import sys
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image, features
from test_data_images import one_bit_png
from tiny.data import dataset, encoded, tiny_vlm

from data.drops import DropCounter, count_drops
from data.images import ImageDecodeError, ImageProcessor, decode_image, image_size
from data.rows import load_rows

BLOCKS = Image.fromarray(
    np.kron(np.array([[200, 30, 90], [20, 220, 140]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8))
).convert("RGB")
OTHER = Image.new("RGB", BLOCKS.size, "black")
AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


def packed(kind: str, image: Image.Image = BLOCKS, **options) -> bytes:
    if kind == "HEIC":
        pillow_heif = pytest.importorskip("pillow_heif")
        buffer = io.BytesIO()
        pillow_heif.from_pillow(image).save(buffer, quality=-1, **options)
        return buffer.getvalue()
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(data) -> float:
    """Mean of 256 levels, from BLOCKS."""
    pixels = decode_image(data).permute(1, 2, 0).numpy().astype(int)
    return float(np.abs(pixels - np.asarray(BLOCKS)).mean())


KINDS = [
    "PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM", "HEIC", pytest.param("AVIF", marks=AVIF)
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_shows_the_same_picture(kind):
    data = packed(kind)
    assert image_size(data) == BLOCKS.size
    assert difference(data) < 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG", "MPO", pytest.param("AVIF", marks=AVIF)])
def test_of_several_pictures_the_first_is_taken(kind):
    assert difference(packed(kind, save_all=True, append_images=[OTHER, OTHER])) < 6


@pytest.mark.parametrize("mode", ["CMYK", "L", "YCbCr"])
def test_a_jpeg_of_any_mode(mode):
    wanted = np.asarray(BLOCKS.convert("L") if mode == "L" else BLOCKS).astype(int)
    pixels = decode_image(packed("JPEG", BLOCKS.convert(mode))).permute(1, 2, 0).numpy().astype(int)
    wanted = wanted[..., None] if wanted.ndim == 2 else wanted
    assert np.abs(pixels - wanted).mean() < 6


def test_a_palette_with_an_opacity_for_each_colour():
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "L").convert("P")
    image.putpalette([100, 100, 100] * 3)
    data = packed("PNG", image, transparency=bytes([0, 255, 127]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data)[0].tolist() == [[255, 100, 178]]


@pytest.mark.parametrize(
    ("data", "package"), [("HEIC", "pillow-heif"), pytest.param("AVIF", "pillow>=11.3", marks=AVIF)]
)
def test_an_absent_package_is_named(monkeypatch, data, package):
    file = packed(data)
    known = [name for name in Image.ID if name not in ("HEIF", "AVIF")]
    monkeypatch.setattr(Image, "ID", known)
    monkeypatch.setattr(Image, "OPEN", {name: Image.OPEN[name] for name in known})
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageDecodeError, match=f"pip install '{package}'") as error:
        image_size(file)
    assert error.value.kind == f"{data} image, which needs {package}"


def test_a_heic_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    BLOCKS.save(buffer, "HEIF", exif=exif, quality=-1)
    data = buffer.getvalue()
    assert image_size(data) == decode_image(data).shape[:0:-1]


# Too large, and broken off


def test_30000_x_30000_pixels_are_one_counted_row_without_a_warning():
    row = {"images": [one_bit_png(30_000, 30_000, rows=1)], "texts": [{"user": "is it red?", "assistant": "yes"}]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [(reason, count)] = dataset([row | {"id": "x#1"}]).prepare((0, 0)).dropped.items()
    assert (reason, count) == ("image has too many pixels", 1)
    assert reason.first == "x#1: 30000 x 30000 pixels are more than 400,000,000"


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (12_000, 10_000)])
def test_extreme_sizes_are_tiles_like_others(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiles, grid = ImageProcessor(tiny_vlm())(one_bit_png(*size))
    assert tiles.min() == 255
    assert len(tiles) == grid[0] * grid[1] + (grid != (1, 1))


def row_of(image, number: int = 0) -> dict:
    return {"images": [image], "texts": [{"user": "is there a red shape?", "assistant": "yes"}], "id": f"x#{number}"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_an_image_that_breaks_off_is_dropped_or_used_by_one_flag(kind, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    data = packed(kind, noise)
    path = tmp_path / "cut"
    path.write_bytes(data[: len(data) // 2])
    rows = [row_of(path.read_bytes()), row_of(str(path), 1), row_of(data, 2), row_of(b"junk", 3)]
    vlm = tiny_vlm()
    drop, use = dataset(rows, vlm), dataset(rows, vlm)
    use.image_processor = ImageProcessor(vlm, use_truncated=True)
    dropped = [drop[0, i].dropped for i in range(4)]
    assert dropped == [{"image file breaks off": 1}] * 2 + [{}, {"image does not decode": 1}]
    assert "--truncated_images use" in next(iter(dropped[1])).first
    samples = [use[0, i] for i in range(4)]
    assert [bool(one.conversations) for one in samples] == [True, True, True, False]
    whole, cut = samples[2].images, samples[0].images
    assert (samples[1].images == cut).all()
    assert (whole[0] != cut[0]).any()
    counts = count_drops(samples)
    assert counts == {"used: truncated image": 2, "image does not decode": 1}
    assert counts.summary() == "dropped 1 row (1 image does not decode); used 2 truncated images"
    assert DropCounter({"used: truncated image": 1}).summary() == "dropped nothing; used 1 truncated image"
    assert use.questions(0).dropped == {"used: truncated image": 1}
    cached = dataset(rows, vlm, cache=True)
    cached.image_processor = use.image_processor
    assert [cached[0, 0].dropped for _ in range(2)] == [{"used: truncated image": 1}] * 2  # at each visit


# Every way to give a picture


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_picture_from_every_place(tmp_path, kind, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data, ending = packed(kind), {"JPEG": "jpg", "JPEG2000": "png", "PPM": "png"}.get(kind, kind.lower())
    path = tmp_path / f"a.{ending}"
    path.write_bytes(data)
    letters = base64.b64encode(data).decode()
    given = [path.name, str(path), f"data:image/{ending};base64,{letters}", {"bytes": letters}, {"path": path.name}]
    if kind not in ("JPEG2000", "PPM"):
        given.append(letters)
    said = {"question": "is there a red shape?", "answer": "yes"}
    lines = "\n".join(json.dumps(said | {"image": one}) for one in given)
    (tmp_path / "rows.jsonl").write_text(lines)
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        for name, content in ((f"1.{ending}", data), ("1.json", json.dumps(said).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    table = datasets.Dataset.from_list([said | {"image": {"bytes": data, "path": None}}])
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    found = [row_of(data), row_of({"bytes": data, "path": None}), row_of(Image.open(path) if kind != "HEIC" else data)]
    for name in ("rows.jsonl", "rows.tar", "rows.parquet"):
        rows = load_rows(str(tmp_path / name))
        found += [rows[i] for i in range(len(rows))]
    assert len(found) == 3 + len(given) + 2
    samples = dataset(found)
    first = samples[0, 0].images
    for i in range(len(found)):
        assert (samples[0, i].images.int() - first.int()).abs().max() <= (8 if kind == "JPEG" else 0), found[i]


def test_an_image_as_pathlib_has_it(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(BLOCKS))
    assert difference(tmp_path / "a.png") == 0
