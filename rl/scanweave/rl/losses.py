"""Losses of single steps.

choice_losses   cross-entropy of one or several choices
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def choice_losses(
    logits: Tensor, chosen: Tensor, choices: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (B, K), summed over choices, and whether every choice is the likeliest."""
    parts = logits.split(choices, dim=-1) if choices else [logits]
    answers = chosen.unbind(-1) if choices else [chosen]
    losses, hits = [], []
    for part, answer in zip(parts, answers, strict=True):
        losses.append(F.cross_entropy(part.movedim(-1, 1), answer, reduction="none"))
        hits.append(part.argmax(dim=-1) == answer)
    return torch.stack(losses).sum(dim=0), torch.stack(hits).all(dim=0)
