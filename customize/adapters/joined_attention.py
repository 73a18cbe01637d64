"""Attention that is joined with references: their keys and values stand beside a layer's own, in one softmax.

Every key has a multiplicity m: 1 for the layer's own, and for a key of a reference the product of its
subject's weight, of the reference's mask and of the subject's region at the query. With scores s,

    out = sum_k m_k exp(s_k) v_k / sum_k m_k exp(s_k)

so that a weight of 0 leaves the base model's layer, and a weight of 2 counts a reference twice. It stands for
the masked, concatenated attention of Face Fusion (arXiv 2409.19111, eq. 4).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from customize.adapters.attention import CrossAttention, at_size
from customize.backbones.quantize import restored


@dataclass
class JoinedTokens:
    """The references of each sample and of each of its subjects."""

    states: dict[str, Tensor]  # by layer: (samples, subjects, references, pixels, width)
    # (samples, subjects, references, height, width) in [0, 1] at latent size: how far a reference shows the
    # subject; 0 where there is no reference
    mask: Tensor
    weight: Tensor  # (samples, subjects): 0 where a sample lacks the subject
    regions: Tensor | None = None  # (samples, subjects, height, width) in [0, 1]: where a subject may be

    def repeat(self, count: int) -> "JoinedTokens":
        """Each sample `count` times in a row."""
        states = {name: value.repeat_interleave(count, 0) for name, value in self.states.items()}
        regions = None if self.regions is None else self.regions.repeat_interleave(count, 0)
        mask, weight = (value.repeat_interleave(count, 0) for value in (self.mask, self.weight))
        return JoinedTokens(states, mask, weight, regions)

    def multiplicity(self, keys: int, queries: int) -> Tensor:
        """m of a reference's `keys` in a layer of `queries` pixels, (samples, queries or 1, subjects *
        references * keys)."""
        mask = at_size(self.mask.flatten(1, 2), keys).unflatten(1, self.mask.shape[1:3]).flatten(2)
        of_keys = (self.weight[:, :, None] * mask).flatten(1).unsqueeze(1)
        if self.regions is None:
            return of_keys
        regions = at_size(self.regions, queries).squeeze(-1).transpose(1, 2)
        return of_keys * regions.repeat_interleave(mask.shape[2], 2)


@dataclass
class Joined:
    """Conditioning for the processors; under classifier-free guidance it applies to the conditional half,
    which is the end of the batch."""

    tokens: JoinedTokens
    scales: dict[str, float] = field(default_factory=dict)  # of the weights by layer; 1 for others
    block_texts: Tensor | None = None  # a reference gives no words
    cache: dict | None = None  # keys and values by layer, while no gradient is needed


class ReferenceBranch(nn.Module):
    """One layer's keys and values of references, which start as those of the self-attention of its block."""

    def __init__(self, attn: Any):
        super().__init__()
        self.to_k = nn.Linear(attn.query_dim, attn.inner_dim, bias=False)
        self.to_v = nn.Linear(attn.query_dim, attn.inner_dim, bias=False)
        self.to_k.weight.data.copy_(restored(attn.to_k.weight))
        self.to_v.weight.data.copy_(restored(attn.to_v.weight))


class JoinedAttention(CrossAttention):
    """A layer's own attention, joined with references where it has a `ReferenceBranch`."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
        ip_hidden_states=None,
        **_,
    ):
        if ip_hidden_states is None or self.branch is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value, mask = self.projected(attn, hidden_states, context, attention_mask)
        plain = len(query) - len(ip_hidden_states.tokens.weight)
        unconditional = [None if x is None else x[:plain] for x in (query, key, value, mask)]
        own = [None if x is None else x[plain:] for x in (query, key, value, mask)]
        out = self.attend_joined(attn, *own, ip_hidden_states)
        out = torch.cat([self.attend(*unconditional), out]) if plain else out
        return attn.to_out[1](attn.to_out[0](out.flatten(2).to(query.dtype)))

    def attend_joined(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, given: Joined
    ) -> Tensor:
        """Attention (samples, pixels, heads, dim) over a layer's own tokens and those of the references."""
        keys = given.tokens.states[self.name].shape[3]
        scaled = given.tokens.multiplicity(keys, query.shape[1]) * given.scales.get(self.name, 1.0)
        bias = scaled.float().log().to(query.dtype).unsqueeze(1)
        shape = (len(query), attn.heads if mask is not None else 1, bias.shape[2])
        own = bias.new_zeros(*shape, key.shape[1]) if mask is None else mask.expand(*shape, -1)
        more_keys, more_values = self.keys_values(attn, given, query.dtype)
        bias = torch.cat([own, bias.expand(*shape, -1)], -1)
        return self.attend(query, torch.cat([key, more_keys], 1), torch.cat([value, more_values], 1), bias)

    def keys_values(self, attn: Any, subjects: Any, dtype: torch.dtype) -> Any:
        """Keys and values of all references of a sample, (samples, tokens, heads, dim), from the cache if
        they were made before."""
        if subjects.cache is not None and self.name in subjects.cache:
            return subjects.cache[self.name]
        states = subjects.tokens.states[self.name].flatten(1, 3).to(self.branch.to_k.weight.dtype)
        layers = self.branch.to_k, self.branch.to_v
        found = tuple(layer(states).to(dtype).unflatten(-1, (attn.heads, -1)) for layer in layers)
        if subjects.cache is not None:
            subjects.cache[self.name] = found
        return found
