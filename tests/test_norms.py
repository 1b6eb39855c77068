"""Norms in the dtype of their input."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.norms import LayerNorm, RMSNorm


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_on_cuda_norms_under_autocast_stay_in_bfloat16(norm):
    with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
        made = norm(8, device="cuda")
        x = torch.empty(2, 3, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = made(x)
        assert (y.dtype, made.weight.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("norm", "plain"), [(LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)])
def test_in_float32_they_are_pytorchs(norm, plain):
    x = torch.randn(4, 8)
    torch.testing.assert_close(norm(8, eps=1e-5)(x), plain(8, eps=1e-5)(x))
