"""Attention maps: where in the image a denoiser looks at each word of the prompt.

Hooks on the attention layers compute the maps beside the model's own attention, from the same queries and
keys. So the model's output does not change by a bit, whatever attention backend it uses; LoRA and injected
subjects count; and gradients flow from a map into latents, text and weights, also under gradient
checkpointing.

* UNets (Stable Diffusion 1.x, 2.x, XL): the cross-attention layers.
* Stable Diffusion 3 and Flux: the joint attention's part from image queries to text keys.
"""

import math
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from customize.adapters.attention import CrossAttention, text_layers
from customize.backbones.text import expanded, text_parts
from customize.errors import UserError, shortened


def recorded_layers(denoiser: nn.Module) -> dict[str, Any]:
    """The attention layers where image meets text, by name; UserError for a model that has none we know."""
    if isinstance(denoiser, UNet2DConditionModel):
        return {name: denoiser.get_submodule(name) for name in text_layers(denoiser).values()}
    if isinstance(denoiser, SD3Transformer2DModel):
        return {f"transformer_blocks.{i}": block.attn for i, block in enumerate(denoiser.transformer_blocks)}
    if isinstance(denoiser, FluxTransformer2DModel):
        joint = {f"transformer_blocks.{i}": block.attn for i, block in enumerate(denoiser.transformer_blocks)}
        singles = enumerate(denoiser.single_transformer_blocks)
        return joint | {f"single_transformer_blocks.{i}": block.attn for i, block in singles}
    raise UserError(f"attention maps: a {type(denoiser).__name__} has no cross-attention that can be read.")


class AttentionRecorder:
    """Context in which every call of the denoiser leaves its attention maps in `maps`.

    `layers` chooses layers by the beginnings of their names; empty: all. `side` chooses those whose maps
    have sides nearest to it, as the maps of middle size show objects best; 0: all. Without `gradients`
    the maps are detached. UserError for a choice that leaves no layer.
    """

    def __init__(
        self, denoiser: nn.Module, layers: Sequence[str] = (), side: int = 0, gradients: bool = True
    ):
        known = recorded_layers(denoiser)
        self.layers = {
            name: layer
            for name, layer in known.items()
            if not layers or any(name.startswith(prefix) for prefix in layers)
        }
        if not self.layers:
            raise UserError(
                f"attention maps: no layer begins with {', '.join(map(repr, layers))}; the layers are "
                f"{', '.join(known)}."
            )
        self.denoiser, self.side, self.gradients = denoiser, side, gradients
        # of the last call, by layer: (samples, tokens, height, width), mean over heads, rows sum to 1 over
        # all keys
        self.maps: dict[str, Tensor] = {}
        self._size = (0, 0)
        self._text_length = 0
        self._records = False
        self._handles: list[Any] = []

    def __enter__(self) -> "AttentionRecorder":
        add = self.denoiser.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._handles = [add, self.denoiser.register_forward_hook(self._end)]
        for name, layer in self.layers.items():

            def record(module: Any, args: tuple, kwargs: dict, name: str = name) -> None:
                self._record(name, module, args, kwargs)

            self._handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.maps, self._records = {}, True
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        text = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        assert sample is not None
        self._text_length = text.shape[1] if isinstance(text, Tensor) else 0
        if isinstance(module, FluxTransformer2DModel):
            ids = kwargs["img_ids"]
            last = (ids[0] if ids.ndim == 3 else ids)[-1]
            self._size = int(last[1]) + 1, int(last[2]) + 1
        else:
            patch = getattr(module.config, "patch_size", 1)
            self._size = sample.shape[-2] // patch, sample.shape[-1] // patch

    def _end(self, *_: Any) -> None:
        self._records = False

    def _record(self, name: str, layer: Any, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        pixels = hidden.shape[1] - (self._text_length if name.startswith("single_") else 0)
        size = _size_of(self._size, pixels)
        # also where gradient checkpointing runs the layer again: it must compute the same
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            probabilities = self._probabilities(name, layer, hidden, kwargs)
        if self._records:
            self.maps[name] = probabilities.mT.unflatten(-1, size)

    def _probabilities(self, name: str, layer: Any, hidden: Tensor, kwargs: dict) -> Tensor:
        """The attention of image queries to text keys, (samples, pixels, tokens), mean over heads."""
        context = kwargs.get("encoder_hidden_states")
        if isinstance(self.denoiser, UNet2DConditionModel):
            context = _unet_context(layer, context, kwargs)
            query, key = (
                projection(value).unflatten(-1, (layer.heads, -1))
                for projection, value in ((layer.to_q, hidden), (layer.to_k, context))
            )
            return _mean_over_heads(query, key, slice(0, None))
        query, key = (
            _normed(norm, projection(hidden), layer)
            for norm, projection in ((layer.norm_q, layer.to_q), (layer.norm_k, layer.to_k))
        )
        length = self._text_length
        if context is not None and getattr(layer, "add_k_proj", None) is not None:
            length = context.shape[1]
            added = _normed(layer.norm_added_k, layer.add_k_proj(context), layer)
            if isinstance(self.denoiser, SD3Transformer2DModel):
                return _mean_over_heads(query, torch.cat([key, added], 1), slice(key.shape[1], None))
            key = torch.cat([added, key], 1)
            query = torch.cat([_normed(layer.norm_added_q, layer.add_q_proj(context), layer), query], 1)
        rotary = kwargs.get("image_rotary_emb")
        if rotary is not None:
            query, key = (apply_rotary_emb(value, rotary, sequence_dim=1) for value in (query, key))
        return _mean_over_heads(query[:, length:], key, slice(0, length))

    def chosen(self) -> list[Tensor]:
        """The maps of the sides nearest to `side`."""
        if not self.side:
            return list(self.maps.values())
        distances = [abs(math.log(max(maps.shape[-2:]) / self.side)) for maps in self.maps.values()]
        pairs = zip(self.maps.values(), distances, strict=True)
        return [maps for maps, distance in pairs if distance == min(distances)]

    def of_tokens(self, positions: Sequence[int], sample: int, size: tuple[int, int] | None = None) -> Tensor:
        """The maps of one sample's tokens, mean over layers: (tokens, height, width).

        `sample` counts from the end where it is negative, as Python's indices do. Maps of different sizes are
        brought to `size`, by default that of the latents.
        """
        wanted, indices = size or self._size, list(positions)
        found = [
            F.interpolate(maps[sample, indices][None], wanted, mode="bilinear", align_corners=False)[0]
            for maps in self.chosen()
        ]
        return torch.stack(found).mean(0)

    def shares(self, sample: int) -> Tensor:
        """How much a sample's image attends to each token of its text: mean over pixels and layers,
        (tokens,)."""
        return torch.stack([maps[sample].mean((-2, -1)) for maps in self.maps.values()]).mean(0)

    def mean(self, positions: Sequence[Sequence[int]], size: tuple[int, int] | None = None) -> Tensor:
        """The map of a word for each of the last samples of the batch, as many as `positions`, summed
        over the word's tokens: (samples, height, width)."""
        count = len(positions)
        each = [self.of_tokens(own, i - count, size).sum(0) for i, own in enumerate(positions)]
        return torch.stack(each)


def _size_of(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """Height and width of a layer of so many pixels: a UNet halves its sides, rounding up."""
    height, width = size
    while height * width > pixels:
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def _unet_context(layer: Any, context: Any, kwargs: dict) -> Tensor:
    """The text that a UNet's layer reads: with injected subjects, that of its own block; of two paths, that
    of the soft one."""
    length = getattr(layer, "soft_length", 0)
    if length and isinstance(context, Tensor) and context.shape[1] == 2 * length:
        context = context[:, :length]
    processor, subjects = layer.processor, kwargs.get("ip_hidden_states")
    if isinstance(processor, CrossAttention) and processor.branch is not None and subjects is not None:
        return processor.text_of(context, subjects)
    return context[0] if isinstance(context, tuple) else context  # stock IP-Adapters: text and image tokens


def _normed(norm: Any, projected: Tensor, layer: Any) -> Tensor:
    """Queries or keys (samples, tokens, heads, dim)."""
    split = projected.unflatten(-1, (layer.heads, -1))
    return split if norm is None else norm(split)


def _mean_over_heads(query: Tensor, key: Tensor, columns: slice) -> Tensor:
    """softmax(Q K^T / sqrt(d)) over all keys, of which `columns` are kept; head by head, to save memory."""
    total: Any = 0.0
    with torch.autocast(query.device.type, enabled=False):  # which would multiply in half precision
        for head in range(query.shape[2]):
            scores = query[:, :, head].float() @ key[:, :, head].float().mT / query.shape[-1] ** 0.5
            total = total + scores.softmax(-1)[..., columns]
    return total / query.shape[2]


def word_positions(pipe: DiffusionPipeline, prompt: str, word: str) -> list[int]:
    """Where the denoiser's text holds the tokens of `word`, or of several words in a row, in a prompt.

    Learned words of several vectors count with all of their tokens. UserError if the prompt does not hold the
    word, or no text encoder reads it.
    """
    tokenizers = text_parts(pipe)[0]
    found: list[int] = []
    for offset, tokenizer in _text_layout(pipe, tokenizers):
        texts = [expanded(text, tokenizer) for text in (prompt, word)]
        ids = tokenizer(texts[0], truncation=True, max_length=tokenizer.model_max_length).input_ids
        own = tokenizer(texts[1], add_special_tokens=False).input_ids
        starts = [i for i in range(len(ids) - len(own) + 1) if own and ids[i : i + len(own)] == own]
        found += [offset + start + i for start in starts for i in range(len(own))]
    if not found:
        raise UserError(
            f"the prompt '{shortened(prompt)}' does not say '{shortened(word)}', or says it beyond what "
            "the text encoders read: name words as they stand in the prompt."
        )
    return found


def context_pairs(
    pipe: DiffusionPipeline, prompts: tuple[str, str], words: tuple[str, str], length: int
) -> tuple[list[int], list[int]]:
    """The positions of the same tokens in texts of `length` tokens of two prompts that differ in a word: all
    of the first prompt's but those of its word, and where the second prompt has them. Padding counts."""
    own: list[int] = []
    other: list[int] = []
    taken = set(word_positions(pipe, prompts[0], words[0]))
    layout = _text_layout(pipe, text_parts(pipe)[0])
    ends = [*(offset for offset, _ in layout[1:]), length]
    for (start, tokenizer), end in zip(layout, ends, strict=True):
        texts = [expanded(prompt, tokenizer) for prompt in prompts]
        size = {"padding": "max_length", "truncation": True, "max_length": end - start}
        first, second = (tokenizer(text, **size).input_ids for text in texts)
        ids = [-1 if start + i in taken else token for i, token in enumerate(first)]
        # by matching and not by counting: tokenizers may split what follows an added word in another way
        for block in SequenceMatcher(None, ids, second, autojunk=False).get_matching_blocks():
            own += range(start + block.a, start + block.a + block.size)
            other += range(start + block.b, start + block.b + block.size)
    return own, other


def _text_layout(pipe: DiffusionPipeline, tokenizers: Sequence[Any]) -> list[tuple[int, Any]]:
    """The tokenizers whose tokens the denoiser attends to, each with the position of its first token."""
    if "Flux" in type(pipe).__name__ or hasattr(pipe, "tokenizer_3"):
        clip = getattr(pipe, "tokenizer_max_length", 0) if hasattr(pipe, "tokenizer_3") else 0
        first = [(0, tokenizers[0])] if clip else []
        return [*first, (clip, tokenizers[-1])]
    return [(0, tokenizers[0])]  # both encoders of SDXL share the positions
