"""Two paths through cross-attention (Arar et al., 2023, arXiv 2307.06925, section 4.3): a soft one with the
predicted word and the adapted weights, and a hard one with the nearest ordinary word and the original
weights. Their outputs are blended, so that what the base model knows stays part of every image.

The two texts follow one another in `encoder_hidden_states`. A text of the usual length, as other pipelines
give it, goes the soft path alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from customize.adapters.attention import text_layers
from customize.adapters.base import Adapter
from customize.adapters.embedding_hooks import substitute
from customize.adapters.words import pieces
from customize.backbones.layers import without_lora
from customize.backbones.text import embedding_table, text_parts
from customize.errors import UserError


def check_paths(denoiser: Any) -> None:
    """UserError unless both paths can be installed in a denoiser."""
    if not isinstance(denoiser, UNet2DConditionModel):
        raise UserError("--hard_path needs a UNet (Stable Diffusion 1.x, 2.x, XL); set it to 0.")
    if any(hasattr(layer, "soft_length") for layer in denoiser.modules()):
        raise UserError(
            "this pipeline draws with a hard path already, and a second one would undo both: load one run "
            "that was trained with --hard_path at a time."
        )


def install_paths(denoiser: Any, blend: float, length: int) -> None:
    """Makes the cross-attention of a UNet blend both paths, `blend` being the share of the hard one, for
    texts of twice `length` tokens. UserError for other denoisers, and for one that has both paths."""
    check_paths(denoiser)
    for name in text_layers(denoiser).values():
        layer = denoiser.get_submodule(name)
        layer.forward = partial(_attend, layer, layer.forward, blend, length)
        layer.soft_length = length  # of the text that attention maps are read from


def _attend(
    layer: Any, attend: Any, blend: float, length: int, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    text = kwargs.pop("encoder_hidden_states", None) if not args else args[0]
    if not isinstance(text, Tensor) or text.shape[1] != 2 * length:
        return attend(hidden, text, *args[1:], **kwargs)
    soft, hard = text.chunk(2, 1)
    with _original_weights(layer):
        kept = attend(hidden, hard, *args[1:], **kwargs)
    return torch.lerp(attend(hidden, soft, *args[1:], **kwargs), kept, blend)


@contextmanager
def _original_weights(layer: Any) -> Iterator[None]:
    """Context without the LoRA, or the predicted one, of an attention layer."""
    layer.on_hard_path = True
    try:
        with without_lora(layer):
            yield
    finally:
        layer.on_hard_path = False


def nearest_words(vectors: Tensor, table: Any) -> Tensor:
    """The ids (n,) of the vocabulary's words that are most similar to vectors (n, dim)."""
    with torch.no_grad():
        weight = F.normalize(table.weight.float(), dim=-1)
        return (F.normalize(vectors.float(), dim=-1).to(weight.device) @ weight.T).argmax(-1)


class DualPath(Adapter):
    """The hard path of learned words, in a pipeline. `nearest` holds, for each text encoder, the ids of the
    ordinary words for all vectors."""

    files = ()

    def __init__(self, pipe: DiffusionPipeline, words: Mapping[str, int], blend: float):
        self.pipe, self.words, self.blend = pipe, dict(words), blend
        self.nearest: list[list[int]] = []

    @property
    def changes_text(self) -> bool:
        return True

    def install(self, nearest: Sequence[Sequence[int]]) -> None:
        pipe: Any = self.pipe
        install_paths(getattr(pipe, "unet", None), self.blend, pipe.tokenizer.model_max_length)
        self.nearest = [list(ids) for ids in nearest]
        # of this pipeline alone: another one of the same components draws the soft path
        pipe.encode_prompt = partial(self._encode, pipe.encode_prompt)

    def _encode(self, encode: Any, *args: Any, **kwargs: Any) -> tuple:
        soft = encode(*args, **kwargs)
        if signature(encode).bind_partial(*args, **kwargs).arguments.get("prompt_embeds") is not None:
            return soft  # of words that are not known here; what encode_prompt made of them holds both paths
        with self._ordinary_words():
            hard = encode(*args, **kwargs)
        texts = [a if a is None else torch.cat([a, b], 1) for a, b in zip(soft[:2], hard[:2], strict=True)]
        return (*texts, *soft[2:])

    @contextmanager
    def _ordinary_words(self) -> Iterator[None]:
        tokens = [piece for word, count in self.words.items() for piece in pieces(word, count)]
        with ExitStack() as stack:
            for tokenizer, encoder, ids in zip(*text_parts(self.pipe), self.nearest, strict=True):
                table = embedding_table(encoder)
                vectors = table.weight[torch.tensor(ids, device=table.weight.device)].detach()
                own = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
                stack.callback(substitute(table, own, partial(_itself, vectors)))
            yield

    def save(self, folder: Path) -> dict[str, Any]:
        return {"dual_path": {"words": self.words, "blend": self.blend, "nearest": self.nearest}}

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        if about := info.get("dual_path"):
            DualPath(pipe, about["words"], about["blend"]).install(about["nearest"])


def _itself(vectors: Tensor) -> Tensor:
    return vectors
