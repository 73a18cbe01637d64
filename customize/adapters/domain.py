"""The domain-agnostic tuning encoder (Arar et al., 2023, arXiv 2307.06925): from images of any subject to a
word and to LoRA, which a few steps of tuning then finish.

The paper's hypernetwork predicts weight offsets. Here each layer's offset is B C A: A and B are learned for
all subjects, and the small matrix C is predicted. So it is LoRA, and is saved as such. The paper's encoder
also reads the noisy image at every step; this one reads the subject's images alone, so that the word is one
vector, as in any learned word.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from customize.adapters.base import Adapter
from customize.adapters.encoders.resampler import Resampler
from customize.backbones.base import Backbone
from customize.errors import UserError
from customize.files import header, tensors_of
from customize.tensor_checks import check_finite, misfit

FILE = "domain_encoder.safetensors"


@dataclass
class DomainConfig:
    """Sizes of the encoder; `layers` holds the widths [in, out] of the layers that get LoRA."""

    image_dim: int
    text_dims: list[int]
    layers: dict[str, list[int]]
    starting_word: str
    num_vectors: int = 1
    rank: int = 4
    dim: int = 768
    depth: int = 4
    heads: int = 12


@dataclass
class Predicted:
    """What the encoder makes of subjects."""

    words: list[Tensor]  # offsets from the starting word, for each text encoder (subjects, num_vectors, dim)
    cores: Tensor  # C of each layer, (subjects, layers, rank, rank)


class DomainEncoder(nn.Module, Adapter):
    """`starts` are the embeddings (dim,) of the starting word, one for each text encoder. Untrained, it gives
    the starting word and no LoRA."""

    files = (FILE,)

    def __init__(self, config: DomainConfig, starts: Sequence[Tensor]):
        super().__init__()
        self.config = config
        self.starts = nn.ParameterList(nn.Parameter(s.detach().float().clone(), False) for s in starts)
        count, rank = len(config.layers), config.rank
        self.resampler = Resampler(config.image_dim, config.dim, config.dim, 2, config.depth, config.heads)
        self.word = nn.Linear(config.dim, config.num_vectors * sum(config.text_dims))
        self.core = nn.Linear(config.dim, count * rank * rank)
        for silent in (self.word, self.core):
            nn.init.zeros_(silent.weight)
            nn.init.zeros_(silent.bias)
        self.down = nn.ParameterList(
            torch.randn(rank, width) / width**0.5 for width, _ in config.layers.values()
        )
        self.up = nn.ParameterList(
            torch.randn(width, rank) / rank**0.5 for _, width in config.layers.values()
        )
        self.cores: Tensor | None = None  # of the samples that the denoiser is called with

    @property
    def changes_text(self) -> bool:
        return True

    def forward(self, features: Tensor) -> Predicted:
        """Features (subjects, tokens, image_dim) of the image encoder's last layer but one."""
        state, hyper = self.resampler(features).unbind(1)
        config = self.config
        words = self.word(state).unflatten(-1, (config.num_vectors, -1)).split(config.text_dims, -1)
        shape = len(config.layers), config.rank, config.rank
        return Predicted(list(words), self.core(hyper).unflatten(-1, shape))

    def vectors(self, predicted: Predicted) -> list[Tensor]:
        """The predicted words, for each text encoder (subjects, num_vectors, dim)."""
        return [start + offset for start, offset in zip(self.starts, predicted.words, strict=True)]

    def lora(self, cores: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For each layer the matrices down (rank, in) and up (out, rank) of the LoRA that cores (layers,
        rank, rank) mean."""
        parts = zip(self.config.layers, self.down, self.up, cores, strict=True)
        return {name: (down, up @ core) for name, down, up, core in parts}

    def install(self, denoiser: Any) -> "DomainEncoder":
        """Adds the LoRA of `cores`, each sample's own, to the denoiser's layers."""
        for i, name in enumerate(self.config.layers):
            layer = denoiser.get_submodule(name)
            attention = denoiser.get_submodule(name.partition(".to_")[0])
            layer.register_forward_hook(partial(self._add, i, attention))
        return self

    def _add(self, index: int, attention: Any, layer: Any, args: tuple, output: Tensor) -> Tensor:
        if self.cores is None or getattr(attention, "on_hard_path", False):
            return output
        x = args[0]
        core = self.cores[:, index].to(x.dtype)
        core = core.repeat(len(x) // len(core), 1, 1)  # both halves of guidance
        down, up = self.down[index].to(x.dtype), self.up[index].to(x.dtype)
        return output + (x @ down.T) @ core.mT @ up.T

    def save(self, folder: Path) -> dict:
        state = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / FILE, {"format": "pt", "domain": json.dumps(asdict(self.config))})
        return {}

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        """Nothing: `domain_tuning` reads it."""


def layers_of(backbone: Backbone) -> dict[str, list[int]]:
    """The widths [in, out] of the denoiser's linear layers of attention."""
    ends = backbone.lora_presets["attention"]
    return {
        name: [layer.in_features, layer.out_features]
        for name, layer in backbone.denoiser.named_modules()
        if isinstance(layer, nn.Linear)
        and any(name.endswith("." + end) for end in ends)
        and name not in backbone.unused_layers
    }


def load_domain_encoder(folder: str | Path, fits: Callable[[DomainConfig], bool]) -> DomainEncoder:
    """The encoder of a run of domain_encoder; UserError if it is damaged, or was made for other models."""
    path = Path(folder) / FILE
    state = tensors_of(path)
    try:
        known = json.loads(header(path).get("domain", "{}"))
        config = DomainConfig(**{f.name: known[f.name] for f in fields(DomainConfig)})
        with torch.device("meta"):
            made = DomainEncoder(config, [torch.zeros(dim) for dim in config.text_dims])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"'{path}' is damaged ({error}); use another checkpoint of its run.") from error
    if reason := misfit(state, made.state_dict()):
        raise UserError(f"'{path}' is damaged ({reason}); use another checkpoint of its run.")
    check_finite(state, path)
    if not fits(config):
        raise UserError(
            f"--domain_encoder: '{folder}' was trained with another base model or image encoder; give the "
            "--pretrained_model_name_or_path and --image_encoder of its run."
        )
    made.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    return made.eval().requires_grad_(False)
