"""Sections of check_cuda.py: whether a forward and backward pass on the device is right, and what it runs on."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data.collators import to_device
from grades import GradESConfig, GradESMonitor
from models.attention import attention, takes_flex_attention
from models.config import TrainConfig
from models.vision_language_model import VisionLanguageModel
from scripts.cuda_cases import (
    KINDS,
    Case,
    attempt,
    compare,
    exact_products,
    gradients,
    leave_out,
    make_batch,
    run_section,
    tell,
)
from training import setup
from training.step import clip_gradients, forward_backward


def check_parity(case: Case) -> None:
    """Loss and gradients against those of the CPU in float32."""
    exact_products()
    model = case.model()
    cases = [(kind, case.in_blocks) for kind in KINDS] + [("packed", case.length), ("plain", 77)]
    batches = {(kind, length): make_batch(model.cfg, length, kind) for kind, length in cases}
    cpu = torch.device("cpu")
    expected = {key: gradients(model, batch, cpu) for key, batch in batches.items()}
    model.to(case.device)
    for key, batch in batches.items():
        with attempt(name := f"float32, {key[0]}, {key[1]} tokens"):
            compare(name, gradients(model, batch, case.device), expected[key], 1e-4)
    torch.compiler.reset()  # FlexAttention's kernels were compiled for full float32
    setup.prepare_backend(case.device)
    for key, batch in batches.items():
        with attempt(name := f"as train.py sets float32, {key[0]}, {key[1]} tokens"):
            compare(name, gradients(model, batch, case.device), expected[key], 1e-2)
        with attempt(name := f"bfloat16, {key[0]}, {key[1]} tokens"):
            compare(name, gradients(model, batch, case.device, case.bfloat16()), expected[key], 6e-2)


def check_documents(case: Case) -> None:
    """No gradient and no bit crosses from one packed document, or row, to another."""
    setup.prepare_backend(case.device)
    for compiled in (False, True):
        model = case.model().to(case.device)
        if compiled:
            setup.compile_blocks(model)
        for length in (case.in_blocks, case.length):
            flex = takes_flex_attention(case.device, length, model.cfg.head_dim, 0.0)
            how = f"{'compiled' if compiled else 'eager'}, {length} tokens, {'FlexAttention' if flex else 'mask'}"
            with attempt(how):
                _check_crossing(case, model, length, how)
    if case.on_cuda:
        tell("FlexAttention runs", flex_runs(case), flex_runs(case))


def flex_runs(case: Case) -> bool:
    """Whether rows in whole blocks go through FlexAttention at all: Triton and a C compiler are here."""
    return takes_flex_attention(case.device, case.in_blocks, 64, 0.0)


def _check_crossing(case: Case, model: VisionLanguageModel, length: int, how: str) -> None:
    batch = to_device(make_batch(model.cfg, length, "packed"), case.device)
    documents, positions = batch["document_ids"], batch["position_ids"]
    inside = torch.zeros_like(documents, dtype=torch.bool)
    inside[0] = documents[0] == 1
    generator = torch.Generator().manual_seed(1)
    shape = (*documents.shape, model.cfg.lm_hidden_dim)
    x = torch.randn(shape, generator=generator).to(case.device).requires_grad_()
    weights = torch.randn(shape, generator=generator).to(case.device)
    with case.bfloat16():
        hidden = model.decoder(x, None, positions, documents)
    (hidden.float() * weights)[inside].sum().backward()
    assert x.grad is not None
    leaked, reached = x.grad[~inside].abs().max().item(), x.grad[inside].abs().max().item()
    tell(f"{how}: gradient that leaves a document", leaked, leaked == 0 < reached)
    others = torch.where(inside[..., None], x.detach(), x.detach().flip(1) + 1).requires_grad_()
    with case.bfloat16():
        changed = model.decoder(others, None, positions, documents)
    apart = int((changed != hidden)[inside].sum())
    moved = not torch.equal(changed[~inside], hidden[~inside])
    tell(f"{how}: elements that other documents' tokens change", apart, apart == 0 and moved)


def check_generation(case: Case) -> None:
    """Greedy answers of padded rows: on the device as on the CPU; in bfloat16 of all rows as of each alone."""
    exact_products()
    model, new = case.model().eval(), 8
    batch = make_batch(model.cfg, 96, "padded", rows=6)
    given: dict[str, Any] = {name: batch[name] for name in ("input_ids", "images", "attention_mask")}
    expected = model.generate(**given, max_new_tokens=new, greedy=True)
    model.to(case.device)
    given = {name: value.to(case.device) for name, value in given.items()}
    found = model.generate(**given, max_new_tokens=new, greedy=True).cpu()
    wrong = int((found != expected).any(1).sum())
    tell("float32: rows that answer unlike the CPU", f"{wrong} of {len(expected)}", wrong == 0)
    with case.bfloat16():
        together = model.generate(**given, max_new_tokens=new, greedy=True)
        for row in range(len(expected)):
            seen = given["attention_mask"][row].bool()
            prompt, image = given["input_ids"][row][seen][None], given["images"][row : row + 1]
            alone = model.generate(prompt, image, max_new_tokens=new, greedy=True)[0]
            _compare_answers(model, prompt, image, together[row], alone, row)


def _compare_answers(
    model: VisionLanguageModel,
    prompt: torch.Tensor,
    image: torch.Tensor,
    together: torch.Tensor,
    alone: torch.Tensor,
    row: int,
) -> None:
    """Equal, or apart only from a token on at which bfloat16 cannot tell the two best ones from each other."""
    name = f"bfloat16: row {row} together as alone"
    if torch.equal(together, alone):
        tell(name, "the same tokens", True)
        return
    at = int((together != alone).nonzero()[0])
    with torch.no_grad():
        logits = model(torch.cat((prompt, alone[None, :at]), dim=1), image)[0][0, -1].float()
    gap = (logits[alone[at]] - logits[together[at]]).abs().item() / logits.std().item()
    tell(name, f"another token {at}, whose logit is {gap:.3f} standard deviations from the best", gap < 0.1)


def check_waiting(case: Case) -> None:
    """Nothing between two checks asks the device for a number."""
    if not case.on_cuda:
        leave_out("not applicable: a CPU has nothing to wait for")
        return
    setup.prepare_backend(case.device)
    for compiled in (False, True):
        for kind, length in (("plain", case.in_blocks), ("packed", case.in_blocks), ("packed", case.length)):
            with attempt(name := f"{'compiled' if compiled else 'eager'}, {kind}, {length} tokens"):
                torch.compiler.reset()
                _step_without_waiting(case, compiled, kind, length)
                tell(name, "no wait", True)


def _step_without_waiting(case: Case, compiled: bool, kind: str, length: int) -> None:
    model = case.model().to(case.device)
    cfg = TrainConfig()
    optimizer = setup.make_optimizer(model, cfg)
    config = GradESConfig(alpha=0.0, freeze_vision=False, freeze_language=False, compute_interval=4)
    monitor = GradESMonitor(config, model, optimizer, 8, log=lambda line: None)
    if compiled:
        setup.compile_blocks(model)
    batch = make_batch(model.cfg, length, kind)
    pinned = {n: v.pin_memory() if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
    try:
        for step in range(1, 8):  # a check after step 4, where kernels and buffers are warm, is the only wait
            torch.cuda.set_sync_debug_mode("error" if step > 4 else "default")
            forward_backward(model, [pinned, pinned], case.device, case.bfloat16())
            monitor.after_backward(step)
            clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            monitor.after_step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_kernels(case: Case) -> None:
    """Which of SDPA's kernels the product's attention takes."""
    setup.prepare_backend(case.device)
    mask = torch.ones(4, 1, 192, 192, dtype=torch.bool, device=case.device).tril()
    low, full = torch.bfloat16, torch.float32
    for name, heads, queries, keys, dtype, seen, causal in (
        ("vision, bfloat16", (12, 12), 196, 196, low, None, False),
        ("vision, bfloat16, 1,024 patches", (12, 12), 1024, 1024, low, None, False),
        ("vision, float32", (12, 12), 196, 196, full, None, False),
        ("language, causal, bfloat16", (9, 3), 192, 192, low, None, True),
        ("language, causal, float32", (9, 3), 192, 192, full, None, True),
        ("language, mask, bfloat16", (9, 3), 192, 192, low, mask, False),
        ("language, mask, float32", (9, 3), 192, 192, full, mask, False),
        ("decoding one token, bfloat16", (9, 3), 1, 192, low, None, False),
        ("decoding one token, mask, bfloat16", (9, 3), 1, 192, low, mask[:, :, -1:], False),
        ("decoding one token, float32", (9, 3), 1, 192, full, None, False),
    ):
        with attempt(name):
            q = torch.randn(4, queries, heads[0], 64, device=case.device, dtype=dtype).transpose(1, 2)
            k, v = (torch.randn(4, keys, heads[1], 64, device=case.device, dtype=dtype).transpose(1, 2) for _ in "kv")
            kernel = kernel_of(q.requires_grad_(queries > 1), k, v, seen, causal)
            tell(name, kernel, kernel != "math" if case.on_cuda else None)


def kernel_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, causal: bool) -> str:
    """By the operator that SDPA calls: flash, efficient, cudnn or math; "plain products" where SDPA is not asked."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        attention(q, k, v, mask, causal, 0.0)
    prefix = "aten::_scaled_dot_product_"
    names = {event.key.removeprefix(prefix) for event in profiler.key_averages() if event.key.startswith(prefix)}
    kernels = {name.removesuffix("_for_cpu").replace("_attention", "") for name in names}
    return ", ".join(sorted(kernels)) or "plain products"


if __name__ == "__main__":
    sys.exit(
        run_section(
            {
                "parity": check_parity,
                "documents": check_documents,
                "generation": check_generation,
                "waiting": check_waiting,
                "kernels": check_kernels,
            }
        )
    )
