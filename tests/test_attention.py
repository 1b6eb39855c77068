"""The path of plain matrix products, which bfloat16 on a CPU takes, against SDPA."""

import pytest
import torch
import torch.nn.functional as F

from models.attention import attention, plain_attention
from models.config import VLMConfig
from models.language_model import attention_mask_4d
from models.vision_language_model import VisionLanguageModel


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
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(theirs, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_on_the_cpu_takes_the_plain_path_and_stays_near_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    ours = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, causal=True, dropout=0.0)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(
        ours.float(), F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=0.05, atol=0.03
    )


def test_autocast_generates_with_padding_and_cache_as_without():
    torch.manual_seed(0)
    cfg = VLMConfig(
        vit_hidden_dim=16, vit_inter_dim=32, vit_patch_size=4, vit_img_size=16, vit_n_heads=2, vit_n_blocks=1,
        lm_hidden_dim=32, lm_inter_dim=64, lm_n_heads=4, lm_n_kv_heads=2, lm_n_blocks=2, lm_base_vocab_size=40,
        extra_token_amount=1, vlm_extra_tokens={"image_token": "<|image|>"}, mp_pixel_shuffle_factor=2,
        mp_image_token_length=4, max_img_size=16, lm_max_length=64,
    )  # fmt: skip
    model = VisionLanguageModel(cfg).eval()
    short, image = torch.tensor([[40, 40, 40, 40, 5, 6]]), torch.randn(1, 3, 16, 16)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), short), dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(short, image, targets=short)[1]
        alone = model.generate(short, image, max_new_tokens=5, greedy=True)
        together = model.generate(padded, image, mask, max_new_tokens=5, greedy=True)
        grown = short
        for _ in range(5):
            grown = torch.cat((grown, model(grown, image)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(alone, together)
    assert torch.equal(alone, grown[:, 6:])
    assert loss.item() == pytest.approx(model(short, image, targets=short)[1].item(), rel=0.02)
