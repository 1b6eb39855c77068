"""The path of plain matrix products, which bfloat16 on a CPU takes, against SDPA."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from models.attention import attention, plain_attention
from models.language_model import attention_mask_4d
from training.setup import prepare_backend


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["full", "causal", "left padded"])
def test_plain_attention_is_sdpa_forward_and_backward(kv_heads, kind):
    torch.manual_seed(0)
    q = torch.randn(3, 4, 7, 8, requires_grad=True)
    k, v = (torch.randn(3, kv_heads, 7, 8, requires_grad=True) for _ in range(2))
    mask = None
    if kind == "left padded":
        mask = attention_mask_4d(torch.tensor([[0] * n + [1] * (7 - n) for n in (0, 2, 5)]), None, 7)
    causal = kind == "causal"
    ours = plain_attention(q, k, v, mask, causal)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    gradients = [torch.autograd.grad(y, (q, k, v), upstream) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_bfloat16_on_the_cpu_takes_the_plain_path_and_stays_near_float32(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    ours = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, causal=True, dropout=0.0)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("masked", [None, 1, 5])
def test_more_rows_than_a_kernel_takes_are_attended_in_parts(monkeypatch, masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 4, 3, 8), torch.randn(5, 2, 6, 8), torch.randn(5, 2, 6, 8)
    mask = None if masked is None else torch.rand(masked, 1, 3, 6) < 0.7
    expected = attention(q, k, v, mask, causal=False, dropout=0.0)
    rows, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **b: rows.append(len(q)) or real(q, *a, **b))
    monkeypatch.setattr("models.attention.MAX_ROWS", 2)
    torch.testing.assert_close(attention(q, k, v, mask, causal=False, dropout=0.0), expected, equal_nan=True)
    assert rows == [2, 2, 1]


# On CUDA: what SDPA is asked for decides which kernel it takes (docs/performance.md). Fake tensors have no memory.
@pytest.mark.parametrize(
    ("dtype", "masked", "grouped"),
    [
        (torch.bfloat16, False, True),  # flash
        (torch.bfloat16, True, False),  # memory-efficient, as the two below
        (torch.float32, False, False),
        (torch.float32, True, False),
    ],
)
def test_on_cuda_no_case_is_left_to_the_kernel_that_keeps_all_scores(dtype, masked, grouped, monkeypatch):
    asked = {}

    def sdpa(q, k, v, **flags):
        asked.update(flags, heads=(q.shape[1], k.shape[1], v.shape[1]))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    with FakeTensorMode():
        q = torch.empty(2, 6, 5, 8, device="cuda", dtype=dtype)
        k, v = (torch.empty(2, 2, 5, 8, device="cuda", dtype=dtype) for _ in range(2))
        mask = torch.ones(2, 1, 5, 5, device="cuda", dtype=torch.bool) if masked else None
        attention(q, k, v, mask, causal=not masked, dropout=0.0)
    assert asked["heads"] == ((6, 2, 2) if grouped else (6, 6, 6))
    assert asked["enable_gqa"] is grouped
    assert (asked["attn_mask"] is None) is not masked


def test_on_cuda_cudnns_kernel_is_off():
    assert torch.backends.cuda.cudnn_sdp_enabled()
    try:
        prepare_backend(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.set_float32_matmul_precision("highest")
