"""Attention processors: where subjects enter the cross-attention of a UNet.

`CrossAttention` serves every attention layer of a UNet. It computes the model's own text branch and,
where an adapter added one, a visual branch with its own keys and values for the subjects (the decoupled
cross-attention of IP-Adapter, arXiv 2308.06721, eq. 5). All attention goes through diffusers'
`dispatch_attention_fn`, so that `unet.set_attention_backend(...)` takes effect.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn

from customize.backbones.quantize import restored
from customize.errors import UserError

TextGate = Literal["none", "same", "complement"]


OPEN = 2.0  # a location's logit at the start, where the map is 1


@dataclass
class SubjectTokens:
    """The inputs of the visual branches, for each sample and each of its subjects."""

    visual: Tensor  # (samples, subjects, tokens, dim)
    weight: Tensor  # (samples, subjects): 0 where a sample lacks the subject
    mask: Tensor | None = None  # (samples, subjects, tokens): False where a token is padding
    # (samples, subjects, dim): time and subject, for the location maps
    location_embedding: Tensor | None = None
    # (samples, subjects, height, width) in [0, 1]: where a subject may be, at latent size
    regions: Tensor | None = None

    def repeat(self, count: int) -> "SubjectTokens":
        """Each sample `count` times in a row."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        repeated = {
            name: value.repeat_interleave(count, 0) for name, value in given.items() if value is not None
        }
        return SubjectTokens(**repeated)

    def with_unconditional(self, blank: Tensor) -> "SubjectTokens":
        """The same for classifier-free guidance: unconditional samples, which read the tokens `blank` (1,
        tokens, dim), are put before the conditional ones."""
        samples, subjects, tokens, _ = self.visual.shape
        own = blank.repeat(1, -(-tokens // blank.shape[1]), 1)[:, :tokens].expand(samples, subjects, -1, -1)
        mask = self.mask
        if mask is not None or blank.shape[1] < tokens:
            counts = torch.arange(tokens, device=own.device) < blank.shape[1]
            unconditional = counts.expand(samples, subjects, -1)
            mask = torch.cat([unconditional, torch.ones_like(unconditional) if mask is None else mask])
        place, regions = (
            None if x is None else torch.cat([x, x]) for x in (self.location_embedding, self.regions)
        )
        return SubjectTokens(torch.cat([own, self.visual]), self.weight.repeat(2, 1), mask, place, regions)


@dataclass
class Injected:
    """Subject conditioning for the attention processors; under classifier-free guidance it applies to the
    conditional half, which is the end of the batch."""

    tokens: SubjectTokens
    # (text_blocks, samples, length, dim): the text as each block of layers reads it
    block_texts: Tensor | None = None
    scales: dict[str, float] = field(
        default_factory=dict
    )  # of the visual branch by layer; 1 for layers without one
    cache: dict | None = None  # keys and values by layer, while no gradient is needed


class Location(nn.Module):
    """A spatial map of where a subject belongs: hidden states (batch, pixels, channels) and the embedding
    (batch, dim) of time and subject, to logits (batch, pixels, 1), which are 0 before training."""

    def __init__(self, channels: int, dim: int, hidden: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.modulate = nn.Linear(dim, 2 * channels)
        self.inner, self.outer = nn.Linear(channels, hidden), nn.Linear(hidden, 1)
        for layer in (self.modulate, self.outer):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding).unsqueeze(1).chunk(2, -1)
        return self.outer(F.silu(self.inner(self.norm(hidden) * (1 + scale) + shift)))


def gate(logits: Tensor) -> Tensor:
    """Logits to a gate that is exactly 1 at 0, falls to 0 below and rises to 1.14 above."""
    start = torch.full_like(logits, OPEN)
    return torch.sigmoid(start + logits) / torch.sigmoid(start)


class SubjectBranch(nn.Module):
    """One layer's keys and values of the subject tokens, named as released IP-Adapters name them, and its
    location map."""

    def __init__(self, dim: int, attn, location_dim: int = 0):
        super().__init__()
        self.to_k_ip = nn.Linear(dim, attn.inner_dim, bias=False)
        self.to_v_ip = nn.Linear(dim, attn.inner_dim, bias=False)
        if attn.to_k.in_features == dim:  # the text's own keys are a good start
            self.to_k_ip.weight.data.copy_(restored(attn.to_k.weight))
        nn.init.zeros_(self.to_v_ip.weight)  # before training the base model is unchanged
        self.location = Location(attn.query_dim, location_dim) if location_dim else None


class CrossAttention:
    """Not an `nn.Module`, so that the denoiser's state dict stays stock: the branch belongs to the
    adapter.

    Attention layers of a UNet's transformers have no spatial norm, group norm or residual of their own;
    none is handled.
    """

    _attention_backend = None

    def __init__(self, name: str = "", branch: Any = None, text_block: int = 0, text_gate: TextGate = "none"):
        """`branch` is the layer's `SubjectBranch`, or None."""
        self.name, self.branch, self.text_block, self.text_gate = name, branch, text_block, text_gate

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
        subjects = ip_hidden_states if self.branch is not None else None
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if subjects is not None:
            context = self.text_of(context, subjects)
        query, key, value, mask = self.projected(attn, hidden_states, context, attention_mask)
        out = self.attend(query, key, value, mask).flatten(2).to(query.dtype)
        if subjects is not None:
            out = self.add_subjects(attn, out, hidden_states, query, subjects)
        return attn.to_out[1](attn.to_out[0](out))

    @staticmethod
    def projected(
        attn: Any, hidden: Tensor, context: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The layer's own queries, keys and values (batch, tokens, heads, dim), and its mask of the text as
        (batch, heads, 1, tokens), to be added to scores."""
        projections = (attn.to_q, hidden), (attn.to_k, context), (attn.to_v, context)
        query, key, value = (layer(states).unflatten(-1, (attn.heads, -1)) for layer, states in projections)
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], len(context))
            mask = mask.view(len(context), attn.heads, -1, mask.shape[-1])
        return query, key, value, mask

    def text_of(self, context: Tensor, subjects: Injected) -> Tensor:
        """The text (samples, length, dim) that this layer reads; in the conditional half, that of its
        block."""
        if subjects.block_texts is None:
            return context
        own = subjects.block_texts[self.text_block].to(context.dtype)
        return torch.cat([context[: len(context) - own.shape[0]], own])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention over tensors (batch, tokens, heads, dim); a mask (batch, keys) is False where keys
        are padding."""
        if mask is not None and mask.ndim == 2 and self._attention_backend != AttentionBackendName.XFORMERS:
            mask = mask[
                :, None, None
            ]  # diffusers makes xformers' additive mask of a boolean one with two dimensions only
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)

    def add_subjects(
        self, attn: Any, text: Tensor, hidden: Tensor, query: Tensor, subjects: Injected
    ) -> Tensor:
        """Adds to the text branch's output (batch, pixels, channels) the visual branch's: the sum over
        subjects of weight x location x region x attention."""
        tokens = subjects.tokens
        samples, count = tokens.weight.shape
        scale = subjects.scales.get(self.name, 1.0)
        hidden, query = hidden[-samples:], query[-samples:]
        size = (samples, count, hidden.shape[1], 1)
        maps = None
        if self.branch.location is not None:
            each = hidden.repeat_interleave(count, 0)
            maps = self.branch.location(
                each, cast(Tensor, tokens.location_embedding).flatten(0, 1).to(hidden.dtype)
            ).view(size)
        if scale:
            key, value, mask = self.keys_values(attn, subjects, query.dtype)
            seen = (
                self.attend(query.repeat_interleave(count, 0), key, value, mask)
                .flatten(2)
                .unflatten(0, (samples, count))
            )
            weight = tokens.weight.view(samples, count, 1, 1).to(seen.dtype) * scale
            weight = weight if maps is None else weight * gate(maps)
            weight = (
                weight
                if tokens.regions is None
                else weight * at_size(tokens.regions, hidden.shape[1]).to(seen.dtype)
            )
            added = (weight * seen).sum(1)
        else:
            added = torch.zeros_like(text[-samples:])
        if maps is not None and self.text_gate != "none":
            kept = text[-samples:] * self.text_gates(maps, (tokens.weight != 0).view(samples, count, 1, 1))
        else:
            kept = text[-samples:]
        return torch.cat([text[: len(text) - samples], kept + added])

    def text_gates(self, maps: Tensor, present: Tensor) -> Tensor:
        """The factor of the text branch, (samples, pixels, 1). `same` keeps text where a subject that is
        `present` (samples, subjects, 1, 1) may be, `complement` where none may be. It is 1 without a
        subject."""
        if self.text_gate == "complement":
            return torch.where(present, gate(-maps), 1.0).prod(1)
        return torch.where(present.any(1), torch.where(present, gate(maps), 0.0).amax(1), 1.0)

    def keys_values(
        self, attn: Any, subjects: Injected, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (samples * subjects, tokens, heads, dim), from the cache if they were made
        before."""
        if subjects.cache is not None and self.name in subjects.cache:
            return subjects.cache[self.name]
        visual = subjects.tokens.visual.flatten(0, 1).to(self.branch.to_k_ip.weight.dtype)
        parts = (
            layer(visual).to(dtype).unflatten(-1, (attn.heads, -1))
            for layer in (self.branch.to_k_ip, self.branch.to_v_ip)
        )
        mask = None if subjects.tokens.mask is None else subjects.tokens.mask.flatten(0, 1)
        found = (*parts, mask)
        if subjects.cache is not None:
            subjects.cache[self.name] = found
        return found


def at_size(regions: Tensor, pixels: int) -> Tensor:
    """Regions (samples, subjects, height, width) as (samples, subjects, pixels, 1) for a layer of so many
    pixels."""
    height, width = regions.shape[-2:]
    while height * width > pixels:  # a UNet halves its sides, rounding up
        height, width = (height + 1) // 2, (width + 1) // 2
    return F.interpolate(regions, (height, width), mode="area").flatten(2).unsqueeze(-1)


def text_layers(denoiser: UNet2DConditionModel) -> dict[str, str]:
    """The cross-attention layers in the order in which they run: their names, by the numbers that
    released IP-Adapters give them (1, 3, 5, ... over all attention layers: down, up, middle)."""
    if not isinstance(denoiser, UNet2DConditionModel):
        raise TypeError(
            "subjects are injected into the cross-attention of UNets (Stable Diffusion 1.x, 2.x, XL) only"
        )
    names = [name.removesuffix(".processor") for name in denoiser.attn_processors]
    found = {str(i): name for i, name in enumerate(names) if name.endswith("attn2")}
    stages = ("down_blocks", "mid_block", "up_blocks")
    return dict(sorted(found.items(), key=lambda item: stages.index(item[1].partition(".")[0])))


def stacks(denoiser: UNet2DConditionModel) -> list[str]:
    """The stacks of transformer layers, in the order in which they run. The layers of a stack share one
    text: SDXL has 70 layers in 11 stacks, and one word for each layer would need 70 text encodings."""
    return list(
        dict.fromkeys(name.partition(".transformer_blocks")[0] for name in text_layers(denoiser).values())
    )


def make_branches(denoiser: UNet2DConditionModel, dim: int, location_dim: int = 0) -> nn.ModuleDict:
    """A new branch for each text layer, by its released number, for subject tokens of `dim` numbers; with
    `location_dim`, the width of `SubjectTokens.location_embedding`, each has a location map."""
    layers = text_layers(denoiser)
    return nn.ModuleDict(
        {
            number: SubjectBranch(dim, denoiser.get_submodule(name), location_dim)
            for number, name in layers.items()
        }
    )


def install(denoiser: UNet2DConditionModel, branches: nn.ModuleDict, text_gate: TextGate = "none") -> None:
    """Gives every attention layer of the denoiser our processor, and each text layer its branch."""
    blocks = stacks(denoiser)
    processors: dict[str, CrossAttention] = {name: CrossAttention() for name in denoiser.attn_processors}
    for number, name in text_layers(denoiser).items():
        block = blocks.index(name.partition(".transformer_blocks")[0])
        processors[f"{name}.processor"] = CrossAttention(name, branches[number], block, text_gate)
    set_processors(denoiser, processors)


def set_processors(denoiser: UNet2DConditionModel, processors: Mapping[str, "CrossAttention"]) -> None:
    """Gives attention layers our processors, by their names; a backend that was chosen before counts on."""
    for name, before in denoiser.attn_processors.items():
        processors[name]._attention_backend = getattr(before, "_attention_backend", None)
    denoiser.set_attn_processor(dict(processors))


def is_installed(
    denoiser: UNet2DConditionModel, branches: nn.ModuleDict, layers: Iterable[str] | None = None
) -> bool:
    """Whether the denoiser's `layers`, by default those of cross-attention, have exactly these branches;
    UserError if their processors are not ours."""
    names = text_layers(denoiser).values() if layers is None else layers
    found = [denoiser.attn_processors[f"{name}.processor"] for name in names]
    if foreign := [
        type(processor).__name__ for processor in found if not isinstance(processor, CrossAttention)
    ]:
        raise UserError(
            f"the denoiser has {foreign[0]} instead of a subject encoder's processors: load the encoder "
            "again."
        )
    return all(processor.branch is branch for processor, branch in zip(found, branches.values(), strict=True))


def use_xformers(denoiser: Any) -> None:
    """xformers' attention: by diffusers' switch, or as the backend of our processors, which that switch
    would replace."""
    if any(isinstance(processor, CrossAttention) for processor in denoiser.attn_processors.values()):
        denoiser.set_attention_backend("xformers")
    else:
        denoiser.enable_xformers_memory_efficient_attention()
