"""Layouts of a picture: tokens by the published counts, the raster of patches, and what a batch says of it."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny.data import dataset, encoded, picture, row, same, tiny_train, tiny_vlm, turn
from tiny.families import CROP_EXTRA, CROPS
from tiny.grades import TINY

from data.collators import PromptCollator, TrainCollator
from data.images import ImageProcessor
from data.inspection_page import make_page
from data.layouts import FRAME, count_image_tokens, grid_of, image_tokens_in_words, largest_grid, pool_index
from data.packing import PackedCollator
from data.text import get_tokenizer, image_string
from eval.asking import ModelAsker
from eval.prompt_cache import PromptCache
from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel
from training.feature_cache import FeatureCache

SIGLIP, CLIP = (378, 14, 8), (336, 14, 12)


def tiny(**changes) -> VLMConfig:
    """4 x 4 patches an image, of which a crop adds 2 x 2; windows of 2 x 2."""
    return tiny_vlm(**CROPS | {"max_crops": 6} | changes)


def published(side: int, patch: int, crops: int) -> VLMConfig:
    length = (-(-side // patch // 2)) ** 2
    return tiny(
        vit_img_size=side, vit_patch_size=patch, mp_image_token_length=length, max_crops=crops, overlap_margin=4
    )


@pytest.mark.parametrize(
    ("shape", "low", "counts", "frame"),
    [
        (SIGLIP, 196, {(1, 1): 410, (2, 2): 752, (2, 4): 1189}, 81),
        (CLIP, 144, {(1, 1): 304, (2, 2): 568, (2, 4): 888, (3, 4): 1184}, 64),
    ],
)
def test_tokens_are_as_many_as_molmos(shape, low, counts, frame):
    cfg = published(*shape)
    tokenizer = get_tokenizer(cfg)
    assert cfg.mp_image_token_length == low
    assert cfg._layout_relations() == [(True, *rest) for _, *rest in cfg._layout_relations()]
    for grid, count in counts.items():
        ids = tokenizer.backend_tokenizer.encode(image_string([grid], cfg), add_special_tokens=False).ids
        assert (len(ids), min(ids)) == (count, cfg.image_token_id)
        assert ids.count(cfg.image_token_id) == count_image_tokens(grid, cfg) == len(pool_index([grid], cfg))
    assert (count_image_tokens(FRAME, cfg), pool_index([FRAME] * 5, cfg).shape) == (frame, (5 * frame, 9))


def test_the_text_of_a_picture():
    cfg = tiny()
    whole, row_of = "<im_patch>" * 4, "<im_patch>" * 3 + "<im_col>"
    wanted = f"<low_res_im_start>{whole}<im_end><im_start>{row_of * 2}<im_end>"
    assert image_string([(1, 2)], cfg) == wanted
    assert image_string([(1, 1)], tiny_vlm(image_layout="resize")) == "<|global_image|>" + "<|image|>" * 4


def slow_windows(grid, cfg) -> list[set[int]]:
    """Of a canvas on which each patch has a number, cut into crops: where the window of each image token is."""
    side, margin, window = cfg.vit_grid, cfg.overlap_margin, cfg.mp_window
    step = side - 2 * margin
    rows, cols = (n * step + 2 * margin for n in grid)
    place = {}
    for r in range(rows):
        for c in range(cols):
            inside = []
            for i in range(grid[0]):
                for j in range(grid[1]):
                    y, x = r - i * step, c - j * step
                    if 0 <= y < side and 0 <= x < side:
                        edge = min(y if i else side, x if j else side)  # distance to neighbours before it
                        edge = min(edge, side - 1 - y if i < grid[0] - 1 else side)
                        edge = min(edge, side - 1 - x if j < grid[1] - 1 else side)
                        if edge >= margin:
                            inside.append((i * grid[1] + j + 1) * side * side + y * side + x)
            assert len(inside) == 1, "a patch is taken once"
            place[r, c] = inside[0]
    found = []
    for table, height, width in (({divmod(n, side): n for n in range(side * side)}, side, side), (place, rows, cols)):
        top, left = (-height % window) // 2, (-width % window) // 2
        for r in range(-top, height, window):
            for c in range(-left, width, window):
                spots = [(r + y, c + x) for y in range(window) for x in range(window)]
                found.append([table.get(spot, -1) for spot in spots])
    return found


@pytest.mark.parametrize("changes", [{}, {"overlap_margin": 0}, {"mp_pool_size": 3, "mp_image_token_length": 4}])
@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (2, 2), (3, 2)])
def test_windows_against_a_slow_raster(grid, changes):
    cfg = tiny(**changes)
    assert pool_index([grid], cfg).tolist() == slow_windows(grid, cfg)


@pytest.mark.parametrize("size", [(24, 24), (40, 16), (16, 40), (24, 32), (40, 24)])
def test_each_patch_of_a_picture_comes_once_and_in_order(size):
    """Every patch of the picture has a colour of its own; the picture is just as large as its canvas."""
    cfg = tiny(mp_type="linear", mp_image_token_length=16, max_crops=8)
    cols, rows = size[0] // 4, size[1] // 4
    numbers = np.arange(rows * cols, dtype=np.uint8).reshape(rows, cols)
    image = Image.fromarray(np.kron(numbers, np.ones((4, 4), np.uint8)))
    crops, grid = ImageProcessor(cfg)(image)
    assert grid == (rows // 2 - 1, cols // 2 - 1)
    patches = crops[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)  # [n, 4, 4, 16]
    assert (patches[1:].amin(3) == patches[1:].amax(3)).all()
    shown = patches[..., 0].flatten()[pool_index([grid], cfg)[16:, 0]]
    assert shown.tolist() == numbers.flatten().tolist()
    columns = image_string([grid], cfg).split("<im_start>")[1].split("<im_col>")[0].count("<im_patch>")
    assert columns == cols


def test_tiling_patches_and_pixels_are_transformers():
    molmo = pytest.importorskip("transformers.models.molmo2.image_processing_molmo2")
    for side, patch, most, margin in ((378, 14, 8, 4), (336, 14, 12, 4), (336, 14, 24, 4), (16, 4, 6, 1)):
        cfg = tiny(vit_img_size=side, vit_patch_size=patch, max_crops=most, overlap_margin=margin)
        rng = np.random.default_rng(0)
        sizes = [*rng.integers(1, 4000, (25, 2)).tolist(), [112, 900], [100, 3000], [378, 378], [1, 1], [644, 378]]
        for width, height in sizes:
            found = molmo.compute_crop_geometry(height, width, most, [margin, margin], side, patch)
            assert grid_of(width, height, cfg) == found[:2], (width, height)

    class Backend:
        """In place of torchvision's: its resizing of a tensor is PyTorch's."""

        def resize(self, image, size, resample, antialias):
            return torch.nn.functional.interpolate(image, (size.height, size.width), mode="bilinear")

        def rescale_and_normalize(self, image, *args):
            return image

        _build_overlapping_crops = molmo.Molmo2ImageProcessor._build_overlapping_crops

    cfg = tiny()
    for size in ((50, 30), (17, 40), (9, 9)):
        image = picture(*size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        found = molmo.Molmo2ImageProcessor._image_batch_to_patches_and_grids(
            Backend(), pixels, 6, [1, 1], 16, None, False, 1.0, False, [0.0], [1.0], 4, 2, 2
        )
        crops, grid = ImageProcessor(cfg)(image)
        assert torch.equal(pool_index([grid], cfg), found[2][0].long())
        ours = crops.permute(0, 2, 3, 1).unflatten(1, (4, 4)).unflatten(3, (4, 4)).transpose(2, 3).reshape(-1, 16, 48)
        assert (ours.int() - found[1][0].int()).abs().max() <= 1


@pytest.mark.parametrize("keep_aspect", [False, True])
@pytest.mark.parametrize("size", [(24, 24), (40, 20), (16, 37), (60, 44), (20, 10)])
@pytest.mark.parametrize("layout", ["resize", "molmo_crops"])
def test_mirror_is_the_mirrored_picture(layout, size, keep_aspect):
    cfg = tiny(image_layout=layout, keep_aspect=keep_aspect)
    processor = ImageProcessor(cfg)
    image = picture(*size)
    images, grid = processor(image)
    wanted = processor(ImageOps.mirror(image))[0]
    assert images.shape == (processor.count(grid), 3, 16, 16)
    mirrored = processor.mirror(images, grid)
    pads = [np.flatnonzero(one[0].float().mean(dim=(0, 1)) == 0) for one in (mirrored, wanted)]
    if not keep_aspect or np.array_equal(*pads):
        torch.testing.assert_close(mirrored, wanted, atol=2, rtol=0)


def test_black_fills_up_what_keeps_its_aspect():
    white = Image.new("RGB", (40, 10), "white")
    image, grid = ImageProcessor(tiny(image_layout="resize", keep_aspect=True))(white)
    assert (grid, image[0, 0].float().mean(dim=1).tolist()) == ((1, 1), [0] * 6 + [255] * 4 + [0] * 6)
    whole = ImageProcessor(tiny(keep_aspect=True))(white)[0][0]
    assert torch.equal(whole, image[0])


def rows():
    pictures = [encoded(picture(*size, seed=i)) for i, size in enumerate([(24, 24), (60, 20), (16, 40)])]
    return [row(pictures[:2], name="a"), row([], name="text"), row(pictures[2:], [turn(), turn("what?", "red")], "b")]


def test_a_batch_counts_patches_over_all_its_images():
    cfg = tiny()
    data = dataset(rows(), cfg)
    samples = [data[0, i] for i in range(3)]
    batch = TrainCollator(0, cfg)(samples)
    first, second = samples[0].pool_index, samples[2].pool_index
    assert samples[1].pool_index is None
    shifted = torch.where(second >= 0, second + len(samples[0].images) * 16, -1)
    assert torch.equal(batch["pool_index"], torch.cat([first, shifted]))
    assert len(batch["image_slots"]) == len(batch["pool_index"])
    assert batch["image_sources"] is None
    packed = PackedCollator(0, cfg)([samples])
    assert torch.equal(packed["pool_index"], batch["pool_index"])
    asked = PromptCollator(0, cfg)([data.questions(0), data.questions(2)])
    assert torch.equal(asked["pool_index"], batch["pool_index"])
    assert len(asked["image_sources"]) == len(first) + 2 * len(second)  # two questions share a picture
    assert "pool_index" not in TrainCollator(0, cfg)(samples[1:2])


def test_frames_and_pictures_join_in_one_batch():
    cfg = tiny(image_layout="resize", mp_video_pool_size=4)
    both = pool_index([FRAME, FRAME, (1, 1)], cfg)
    assert both[:2].tolist() == [list(range(16)), list(range(16, 32))]
    assert both[2].tolist() == [32, 33, 36, 37] + [-1] * 12
    assert pool_index([FRAME] * 2, tiny(mp_type="linear")) is None


def test_batches_of_other_layouts_have_no_windows():
    one = tiny_vlm(max_img_size=16)
    tiled, resized = (
        TrainCollator(0, cfg)([dataset(rows(), cfg)[0, i] for i in range(3)])
        for cfg in (one, tiny_vlm(image_layout="resize"))
    )
    assert "pool_index" not in tiled
    assert same(tiled, resized)  # one tile is the resized picture


def test_a_model_sees_crops_as_windows_of_one_raster():
    model = crops_model()
    cfg = model.cfg
    assert cfg.problems() == []
    data = dataset(rows(), cfg)
    samples = [data[0, i] for i in range(3)]
    names = ("input_ids", "images", "image_slots", "image_sources", "pool_index")
    together = TrainCollator(0, cfg)(samples)
    with torch.no_grad():
        logits = model(**{name: together[name] for name in names})[0]
        for place, sample in ((0, samples[0]), (2, samples[2])):
            alone = TrainCollator(0, cfg)([sample])
            found = model(**{name: alone[name] for name in names})[0]
            torch.testing.assert_close(logits[place, : found.shape[1]], found[0], atol=1e-4, rtol=1e-4)
        lone = {name: alone[name] for name in names} | {"images": alone["images"].flip(0)}
        assert not torch.allclose(model(**lone)[0], found)


def test_what_a_layout_needs_is_checked():
    wrong = tiny(vlm_extra_tokens={"image_token": "<im_patch>"}, overlap_margin=2)
    problems = "\n".join(wrong.problems())
    for words in ("--overlap_margin 2: must be less than half of the 4 patches", "im_col for molmo_crops"):
        assert words in problems
    assert "--keep_aspect True: must be off" in "\n".join(tiny_vlm(keep_aspect=True).problems())
    assert "--image_layout crops: must be one of" in "\n".join(tiny_vlm(image_layout="crops").problems())


def test_image_tokens_in_words():
    assert image_tokens_in_words(published(*CLIP)) == (
        "144 image tokens for the whole image and at most 1,200 for its crops, 64 per frame of a video"
    )
    assert count_image_tokens((1, 12), published(*CLIP)) == 144 + 12 * 100  # of 24 x 200 patches
    assert image_tokens_in_words(tiny_vlm()) == "4 image tokens per image or tile"
    assert image_tokens_in_words(tiny_vlm(max_img_size=16)) == "4 image tokens per image"


def test_the_largest_picture():
    assert largest_grid(tiny()) == (1, 6)
    assert count_image_tokens((1, 6), tiny()) == max(
        count_image_tokens((i, j), tiny()) for i, j in ((1, 6), (2, 3), (3, 2), (6, 1))
    )
    assert largest_grid(tiny_vlm()) == (4, 4)
    assert TrainCollator(0, tiny())([dataset(rows(), tiny(), tiny_train())[0, 0]])["images"].dtype == torch.uint8


def crops_model() -> VisionLanguageModel:
    base = tiny()
    names = ("lm_base_vocab_size", "lm_tokenizer", "lm_max_length", "vit_img_size", "vit_patch_size", "max_crops")
    cfg = VLMConfig(
        **TINY | CROPS | {"extra_token_amount": len(CROP_EXTRA)} | {name: getattr(base, name) for name in names}
    )
    torch.manual_seed(0)
    return VisionLanguageModel(cfg).eval()


def test_a_conversation_about_crops_is_read_in_parts():
    """What the cache leaves to be read gives the logits of the whole, with the images that it still needs."""
    model = crops_model()
    asker = ModelAsker(model, get_tokenizer(model.cfg), torch.device("cpu"), contextlib.nullcontext())
    first, second = (asker.reader.image(picture(*size, seed=size[0])) for size in ((60, 20), (16, 40)))
    said, shown = asker.reader.spoken("is there a red shape?", [first])
    more, _ = asker.reader.spoken("is there a blue shape?", [second])
    known = PromptCache()
    answer = "".join(asker.stream(asker.reader.conversation([said], shown), 4, known=known))
    contents = [said, answer, more]
    whole = asker.reader.conversation(contents, [first, second])
    rest = replace(known).continued(whole, 4, model.cfg, torch.device("cpu"), torch.float32)
    assert torch.equal(rest.images, second.tiles)
    assert torch.equal(rest.pool_index, pool_index([second.grid], model.cfg))
    assert "".join(asker.stream(whole, 4, known=known)) == asker.answer([whole], 4)[0]


def test_held_features_of_crops_are_those_computed():
    model = crops_model()
    model.vision_encoder.requires_grad_(False)
    batch = TrainCollator(0, model.cfg, with_keys=True)([dataset(rows(), model.cfg)[0, 0]])
    inputs = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    cache = FeatureCache(model, 1.0)
    cache.complete(inputs, batch["image_keys"])
    held, hits = cache.complete(inputs, batch["image_keys"])
    assert hits == len(batch["images"])
    torch.testing.assert_close(model(**held), model(**inputs))


def test_a_page_shows_which_crop_a_token_is_of():
    cfg = tiny()
    batch = TrainCollator(0, cfg)([dataset(rows(), cfg)[0, 2]])
    page = make_page("crops", [], [batch], get_tokenizer(cfg), cfg, 1)
    count = len(batch["images"])
    assert page.count("<figure>") == count
    assert f"tile {count}: " in page
    assert "tile 1: 4 tokens" in page
    assert page.count("&lt;im_col&gt;") == image_string([grid_of(16, 40, cfg)], cfg).count("<im_col>")
