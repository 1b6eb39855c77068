"""What the sections of check_cuda.py share: small models and rows, comparisons, and how a result is told."""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from models.config import VLMConfig
from models.vision_language_model import VisionLanguageModel
from scripts.check_cuda import RESULT
from training import setup

KINDS = ("plain", "padded", "packed")
# Widths of the 222M recipe with two blocks a tower.
SIZES: dict[str, Any] = {
    "vit_hidden_dim": 768, "vit_inter_dim": 3072, "vit_patch_size": 16, "vit_img_size": 224, "vit_n_heads": 12,
    "vit_n_blocks": 2, "lm_hidden_dim": 576, "lm_inter_dim": 1536, "lm_n_heads": 9, "lm_n_kv_heads": 3,
    "lm_n_blocks": 2, "mp_pixel_shuffle_factor": 2, "mp_image_token_length": 49, "max_img_size": 224,
    "lm_base_vocab_size": 1000, "extra_token_amount": 1, "vlm_extra_tokens": {"image_token": "<|image|>"},
    "lm_max_length": 512, "vlm_load_backbone_weights": False,
}  # fmt: skip
TINY_SIZES: dict[str, Any] = {
    "vit_hidden_dim": 32, "vit_inter_dim": 64, "vit_patch_size": 4, "vit_img_size": 16, "vit_n_heads": 2,
    "lm_hidden_dim": 96, "lm_inter_dim": 64, "lm_n_heads": 6, "lm_n_kv_heads": 2, "mp_image_token_length": 4,
    "max_img_size": 16,
}  # fmt: skip


class Case:
    """The device and the size of what runs on it."""

    def __init__(self, arguments: argparse.Namespace):
        self.tiny: bool = arguments.tiny
        self.folder: Path = arguments.folder
        self.device = setup.pick_device() if arguments.device == "auto" else torch.device(arguments.device)
        self.on_cuda = self.device.type == "cuda"
        self.in_blocks, self.length = 256, 200  # tokens a row: FlexAttention takes the first on CUDA, not the second
        if not self.on_cuda:
            trace_only()

    def model(self, seed: int = 0, **changes: Any) -> VisionLanguageModel:
        """Random weights, the same for the same seed, on the CPU."""
        torch.manual_seed(seed)
        return VisionLanguageModel(VLMConfig(**(SIZES | (TINY_SIZES if self.tiny else {}) | changes)))

    def bfloat16(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def trace_only() -> None:
    """Without a GPU torch.compile only traces: that takes a second, and no C++ compiler."""
    compile_function: Any = torch.compile
    torch.compile = functools.partial(compile_function, backend="aot_eager")


def run_section(sections: Mapping[str, Callable[[Case], None]]) -> int:
    """The section that the command line names; returns the exit code."""
    made = argparse.ArgumentParser(allow_abbrev=False)
    made.add_argument("name", choices=list(sections))
    made.add_argument("--device", default="auto")
    made.add_argument("--folder", type=Path, required=True)
    made.add_argument("--tiny", action="store_true")
    arguments = made.parse_args()
    case = Case(arguments)
    print(RESULT + json.dumps({"machine": machine(case.device)}), flush=True)
    sections[arguments.name](case)
    return 0


def machine(device: torch.device) -> str:
    """Device and versions in a line."""
    parts = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    parts += [f"transformers {version('transformers')}", f"{os.cpu_count()} cores"]
    if device.type != "cuda":
        return ", ".join([str(device), *parts])
    gpu = torch.cuda.get_device_properties(0)
    cuda = [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    return ", ".join([gpu.name, f"{gpu.total_memory / 2**30:.0f} GiB", f"{gpu.major}.{gpu.minor}", *cuda, *parts])


def tell(name: str, value: Any, ok: bool | None = None, **more: Any) -> None:
    """A line for the report. ok: None where there is nothing to be wrong."""
    print(RESULT + json.dumps({"name": name, "value": value, "ok": ok, **more}), flush=True)


def leave_out(why: str) -> None:
    """Nothing to check here."""
    print(RESULT + json.dumps({"left_out": why}), flush=True)


@contextlib.contextmanager
def attempt(name: str) -> Iterator[None]:
    """An error is a result of that name, and the section goes on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().splitlines()[:1]
        tell(name, f"{type(error).__name__}: {''.join(first)[:200]}", False)


def exact_products() -> None:
    """float32 products in float32: a comparison then says more than one of TF32's ten bits."""
    torch.set_float32_matmul_precision("highest")


def make_batch(cfg: VLMConfig, length: int, kind: str, seed: int = 0, rows: int = 2) -> dict[str, Any]:
    """Rows as the collator makes them, on the CPU: one image each, labels on some of the tokens.

    padded: the first row is shorter and padded on the left, with attention_mask. packed: three documents and padding,
    of which the first holds the image.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, cfg.lm_base_vocab_size, (rows, length), generator=generator)
    targets = torch.randint(0, cfg.lm_base_vocab_size, (rows, length), generator=generator)
    targets[torch.rand(rows, length, generator=generator) < 0.6] = -100
    images = torch.randint(0, 256, (rows, 3, cfg.vit_img_size, cfg.vit_img_size), generator=generator)
    first = 3 + cfg.mp_image_token_length
    ids[:, 3:first], targets[:, :first] = cfg.image_token_id, -100
    batch = {"input_ids": ids, "targets": targets, "images": images.to(torch.uint8)}
    if kind == "padded":
        padding = length // 5
        ids[0] = ids[0].roll(padding)
        ids[0, :padding], targets[0, : padding + first] = 0, -100
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        batch["attention_mask"] = mask
    if kind == "packed":
        ends = torch.tensor([length * 2 // 5, length * 3 // 5, length * 9 // 10])
        documents = (torch.arange(length)[:, None] >= ends).sum(1)
        starts = torch.cat((torch.zeros(1, dtype=torch.long), ends))[documents]
        documents[documents == len(ends)] = -1
        targets[:, documents == -1] = -100
        batch["document_ids"] = documents.int().expand(rows, -1).contiguous()
        batch["position_ids"] = (torch.arange(length) - starts).expand(rows, -1).contiguous()
    batch["image_slots"] = (ids.flatten() == cfg.image_token_id).nonzero().squeeze(1)
    batch["label_positions"] = (targets.flatten() != -100).nonzero().squeeze(1)
    return batch | {"num_labels": len(batch["label_positions"])}


def gradients(
    model: VisionLanguageModel, batch: dict[str, Any], device: torch.device, context: Any = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss per label and the gradients by name, on the CPU in float32."""
    from training.step import forward_backward

    model.zero_grad(set_to_none=True)
    loss = forward_backward(model, [batch], device, context or contextlib.nullcontext())
    return loss.item(), {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


def distance(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """L2 norm of the difference over that of theirs, all tensors together; infinite where the names differ."""
    if ours.keys() != theirs.keys():
        return math.inf
    apart = sum((ours[name].double() - theirs[name].double()).square().sum().item() for name in theirs)
    whole = sum(tensor.double().square().sum().item() for tensor in theirs.values())
    return math.sqrt(apart / whole) if whole else math.inf if apart else 0.0


def compare(name: str, ours: tuple[float, dict], theirs: tuple[float, dict], limit: float) -> None:
    """Losses and gradients: as near as the limit together, each gradient as near as ten times that."""
    (loss, found), (loss_0, expected) = ours, theirs
    relative, total = abs(loss - loss_0) / abs(loss_0), distance(found, expected)
    common = found.keys() & expected.keys()
    # What is small beside all others (a bias that softmax cancels) is rounding alone.
    floor = 1e-3 * math.sqrt(sum(g.double().square().sum().item() for g in expected.values()) / max(len(expected), 1))
    off = {n: (found[n] - expected[n]).norm().item() / max(expected[n].norm().item(), floor) for n in common}
    worst = max(off, key=lambda n: math.inf if math.isnan(off[n]) else off[n], default="")
    ok = relative < limit and total < limit and bool(worst) and off[worst] < 10 * limit
    told = f"loss off by {relative:.1e}, gradients by {total:.1e}, at most {off.get(worst, math.nan):.1e} ({worst})"
    tell(name, told, ok)
