"""What a kind gets as its sampler without Ray."""

from __future__ import annotations

import pytest
import torch

from poise.engine import local
from poise.errors import UserError
from poise.spec import SamplerSpec


def test_vllm_without_ray_is_refused_and_transformers_opens(tmp_path):
    with pytest.raises(UserError, match=r"--engine ray, or --set sampler\.backend=transformers"):
        local._sampler(torch.device("cpu"), SamplerSpec(), tmp_path).__enter__()
    with pytest.raises(UserError, match="holds no model"):  # it looks
        local._sampler(torch.device("cpu"), SamplerSpec(backend="transformers"), tmp_path).__enter__()
