"""Where in its inputs a network sees a class: Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391).

Import this module only where torch is wanted: it loads torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_IMAGE_RANK = 4


def class_map(value: Tensor, logits: Tensor, classes: Tensor) -> Tensor:
    """ReLU(Σ_k α_k·A_k), α_k the mean over places of ∂(logit of the class)/∂A_k; `[B, places]`.

    A is `value`, channels `[B, C, H, W]` or tokens `[B, T, C]`; one of `classes` per row of
    `logits` (equations 1 and 2). It can be differentiated again. Zero where the logits do not
    depend on the value by way of anything that requires a gradient.
    """
    channel, places = (1, (2, 3)) if value.dim() == _IMAGE_RANK else (2, (1,))
    if not value.requires_grad:
        return torch.zeros_like(value).sum(channel).flatten(1)
    score = logits.gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, value, create_graph=True)
    weighted = gradient.mean(places, keepdim=True) * value
    return weighted.sum(channel).clamp_min(0).flatten(1)
