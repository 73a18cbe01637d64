"""Context regularization (CoRe, Wu et al., 2024, arXiv 2408.15914): the words around a learned word must mean
what they mean around the word of its class."""

import torch
import torch.nn.functional as F
from torch import Tensor


def context_embedding(embeds: Tensor, class_embeds: Tensor) -> Tensor:
    """Mean of 1 - cosine between the text encoder's outputs (tokens, dim) of the same context tokens,
    with the learned word and with its class's word in the prompt (eq. 3)."""
    return (1 - F.cosine_similarity(embeds.float(), class_embeds.float(), dim=-1)).mean()


def context_attention(shares: Tensor, class_shares: Tensor) -> Tensor:
    """Mean squared difference of how much the image attends to each context token in both prompts (eq. 4).
    `shares` (tokens,) are means of attention maps over pixels and layers."""
    return F.mse_loss(shares.float(), class_shares.float())


def with_norms_of(vectors: Tensor, norms: Tensor) -> Tensor:
    """The vectors (..., dim), scaled to the given norms (..., 1) (eq. 6)."""
    return vectors * (norms / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=1e-12))
