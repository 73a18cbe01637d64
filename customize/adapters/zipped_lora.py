"""Several LoRAs whose updates are added with a coefficient for each input of each layer (ZipLoRA, Shah et
al., 2023, arXiv 2311.13600)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from customize.adapters.lora_reading import Layers, Update
from customize.adapters.merging import FoldedLora
from customize.backbones.base import Backbone
from customize.errors import UserError


class Zipped(nn.Module):
    """The down matrices of the LoRAs of a layer, one below the other; the parameter holds the coefficients
    of their columns (loras, inputs). With `only`, one LoRA alone, as it was."""

    down: Tensor
    only: int | None = None

    def __init__(self, down: Tensor, ranks: Sequence[int]):
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.ranks = torch.tensor(ranks)

    def forward(self, coefficients: Tensor) -> Tensor:
        if self.only is not None:
            coefficients = torch.zeros_like(coefficients)
            coefficients[self.only] = 1
        rows = coefficients.repeat_interleave(self.ranks.to(coefficients.device), 0)
        return self.down * rows.view(*rows.shape, *[1] * (self.down.ndim - 2))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.new_ones(len(self.ranks), weight.shape[1])


class ZippedLora(FoldedLora):
    """LoRAs of the denoiser in one, whose column coefficients are trained; all 1 at the start, which is
    their sum."""

    def __init__(self, backbone: Backbone, loras: Sequence[Layers]):
        """UserError for LoRA of text encoders."""
        self.backbone, self.is_unet = backbone, backbone.denoiser_name == "unet"
        parts = {part for lora in loras for part, _ in lora}
        if others := parts - {backbone.denoiser_name}:
            raise UserError(
                f"--loras: one has LoRA of the {', '.join(sorted(others))} too, and ziplora joins that of "
                f"the {backbone.denoiser_name} alone; use `customize merge`."
            )
        ranks = [max(len(update.down) for update in lora.values()) for lora in loras]
        names = list(dict.fromkeys(name for lora in loras for _, name in lora))
        config = LoraConfig(r=sum(ranks), lora_alpha=sum(ranks), target_modules=names)
        backbone.denoiser.add_adapter(config)
        backbone.denoiser.requires_grad_(False)
        self.layers: dict[str, Any] = {
            name: layer for name, layer in backbone.denoiser.named_modules() if isinstance(layer, LoraLayer)
        }
        self.columns: list[Zipped] = []  # of each layer
        for name, layer in self.layers.items():
            self._zip(layer, [lora.get((backbone.denoiser_name, name)) for lora in loras], ranks)

    @torch.no_grad()
    def _zip(self, layer: Any, updates: Sequence[Update | None], ranks: Sequence[int]) -> None:
        """Fills a layer with the updates of the LoRAs that have it, and makes its coefficients trainable."""
        down, up = (part["default"].float() for part in (layer.lora_A, layer.lora_B))
        down.weight.zero_()
        up.weight.zero_()
        start = 0
        for update, rank in zip(updates, ranks, strict=True):
            if update is not None:
                own = slice(start, start + len(update.down))
                down.weight[own] = update.down.view(-1, *update.shape[1:]).to(down.weight)
                up.weight[:, own] = update.up.view(*up.weight[:, own].shape).to(up.weight)
            start += rank
        zipped = Zipped(down.weight.clone(), ranks)
        parametrize.register_parametrization(down, "weight", zipped)
        down.parametrizations.weight.original.requires_grad_(True)
        self.columns.append(zipped)

    @property
    def coefficients(self) -> list[Tensor]:
        """Those of each layer, (loras, inputs)."""
        return [layer.lora_A["default"].parametrizations.weight.original for layer in self.layers.values()]

    @contextmanager
    def only(self, index: int) -> Iterator[None]:
        """Context in which one of the LoRAs is applied, as it was."""
        for zipped in self.columns:
            zipped.only = index
        try:
            yield
        finally:
            for zipped in self.columns:
                zipped.only = None

    def overlap(self) -> Tensor:
        """Sum over layers, and pairs of LoRAs, of the mean over columns of |m_1 m_2|: the second term of
        eq. 5."""
        own = [
            (some[i] * some[j]).abs().mean()
            for some in self.coefficients
            for i, j in combinations(range(len(some)), 2)
        ]
        return torch.stack(own).sum()

    def updates(self) -> Layers:
        return {
            (self.backbone.denoiser_name, name): Update(
                layer.lora_A["default"].weight.detach().flatten(1).float(),
                layer.lora_B["default"].weight.detach().flatten(1).float(),
                tuple(layer.lora_A["default"].weight.shape),
            )
            for name, layer in self.layers.items()
        }
