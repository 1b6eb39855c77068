"""The loss as it is compiled with the blocks: the plain one's value and gradient, and less that it keeps."""

import functools

import pytest
import torch
from tiny.grades import make_model
from torch.autograd.graph import saved_tensors_hooks

from models.vision_language_model import summed_cross_entropy
from training import setup

LABELS, WORDS = 64, 500


@pytest.fixture
def compiled(monkeypatch):
    """A model's loss; traced and divided into passes as for inductor, but without its kernels."""
    traced = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", traced)
    torch.compiler.reset()
    model = make_model()
    setup.compile_blocks(model)
    yield model.cross_entropy
    torch.compiler.reset()


def measured(loss, dtype) -> tuple[float, torch.Tensor, int]:
    """(loss, gradient of the logits, bytes kept for the backward pass)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LABELS, WORDS, generator=generator).mul(3).to(dtype).requires_grad_()
    labels = torch.randint(0, WORDS, (LABELS,), generator=generator)
    kept: dict = {}
    with saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        value = loss(logits, labels)
    value.backward()
    return value.item(), logits.grad, sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_plain_loss(compiled, dtype):
    value, gradient, _ = measured(compiled, dtype)
    plain, expected, _ = measured(summed_cross_entropy, dtype)
    reference = torch.nn.functional.cross_entropy
    assert value == pytest.approx(plain, rel=1e-6)
    assert plain == pytest.approx(measured(lambda x, y: reference(x.float(), y, reduction="sum"), dtype)[0])
    torch.testing.assert_close(gradient, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_in_bfloat16_it_keeps_the_logits_and_no_float32_of_their_size(compiled):
    logits = 2 * LABELS * WORDS
    *_, kept = measured(compiled, torch.bfloat16)
    *_, plain = measured(summed_cross_entropy, torch.bfloat16)
    assert logits <= kept < 1.1 * logits
    assert plain >= 2 * logits
