"""LoRA of two halves (Break-for-Make, Xu et al., 2024, arXiv 2403.19456, section 3.2): partly learnable
projections.

A layer's update is up @ down with up = [A; B] and down = [C D]. A and C, the parts of the first outputs
and of the first inputs, are frozen. D learns the one thing (content), B the other (style), and both can
be taken from different runs. A and C are orthonormal and use different halves of the rank. D starts at
zero in A's half, and in C's half as an orthonormal basis, so that B reads all inputs; B starts at zero.
So the untrained model is the base model, and what D and B learn lies in orthogonal subspaces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from customize.adapters.lora import LoraFields, add_lora
from customize.adapters.lora_files import LORA
from customize.adapters.lora_reading import Layers, Update
from customize.adapters.merging import FoldedLora, lora_state
from customize.backbones.base import Backbone
from customize.errors import UserError
from customize.files import tensors_of
from customize.randomness import fixed_randomness


class Half(nn.Module):
    """A weight of which the first part along `dim` is frozen; the parameter is the rest alone. While
    `is_still`, it gets no gradient."""

    frozen: Tensor

    def __init__(self, frozen: Tensor, dim: int):
        super().__init__()
        self.register_buffer("frozen", frozen, persistent=False)
        self.dim, self.is_still = dim, False

    def forward(self, rest: Tensor) -> Tensor:
        return torch.cat([self.frozen.to(rest.dtype), rest.detach() if self.is_still else rest], self.dim)

    def right_inverse(self, weight: Tensor) -> Tensor:
        first = self.frozen.shape[self.dim]
        return weight.narrow(self.dim, first, weight.shape[self.dim] - first).contiguous()


class SplitLora(FoldedLora):
    """LoRA of the denoiser whose first `split` of inputs and outputs is frozen, by `seed`."""

    def __init__(
        self, backbone: Backbone, settings: LoraFields, split: float, seed: int, orthogonal: bool = True
    ):
        if settings.rank % 2:
            raise UserError(f"--rank {settings.rank} must be even: each frozen half uses one half of it.")
        self.backbone, self.is_unet = backbone, backbone.denoiser_name == "unet"
        add_lora(backbone.denoiser, settings, presets=backbone.lora_presets, without=backbone.unused_layers)
        self.layers: dict[str, Any] = {
            name: layer for name, layer in backbone.denoiser.named_modules() if isinstance(layer, LoraLayer)
        }
        self.content: list[Half] = []  # D of each layer
        self.style: list[Half] = []  # B of each layer
        with fixed_randomness(seed):
            for layer in self.layers.values():
                self._split(layer, settings.rank, split, orthogonal)

    def _split(self, layer: Any, rank: int, split: float, orthogonal: bool) -> None:
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        inputs, outputs = (max(int(split * n), 1) for n in (down.weight.shape[1], up.weight.shape[0]))
        own, others, sides = slice(0, rank // 2), slice(rank // 2, None), down.weight.shape[2:]
        c = _basis(rank, (inputs, *sides), others, orthogonal)
        d = _basis(rank, (down.weight.shape[1] - inputs, *sides), others, orthogonal)
        a = _basis(rank, (outputs,), own, orthogonal).T.reshape(outputs, rank, *up.weight.shape[2:])
        b = torch.zeros_like(up.weight[outputs:])
        for part, frozen, start, dim, halves in ((down, c, d, 1, self.content), (up, a, b, 0, self.style)):
            half = Half(frozen.to(part.weight), dim)
            with torch.no_grad():
                part.weight.copy_(torch.cat([frozen.to(part.weight), start.to(part.weight)], dim))
            parametrize.register_parametrization(part, "weight", half)
            halves.append(half)

    def train_halves(self, content: bool, style: bool) -> None:
        """Which of the halves get a gradient from what is computed next."""
        for half in self.content:
            half.is_still = not content
        for half in self.style:
            half.is_still = not style

    def precondition(self) -> None:
        """Multiplies the gradients of D by (up^T up + delta I)^-1 and those of B by (down down^T + delta
        I)^-1, before the optimizer and clipping see them (Riemannian preconditioning of LoRA, Zhang and
        Pilanci, 2024, arXiv 2402.02347)."""
        for layer in self.layers.values():
            down, up = layer.lora_A["default"], layer.lora_B["default"]
            d, b = (part.parametrizations.weight.original for part in (down, up))
            d.register_hook(partial(_preconditioned, up, 1, False))
            b.register_hook(partial(_preconditioned, down, 0, True))

    @property
    def trained(self) -> tuple[bool, bool]:
        """Whether the halves of content and of style get a gradient now."""
        return not self.content[0].is_still, not self.style[0].is_still

    @contextmanager
    def training(self, content: bool, style: bool) -> Iterator[None]:
        """Context in which these halves get a gradient."""
        before = self.trained
        self.train_halves(content, style)
        try:
            yield
        finally:
            self.train_halves(*before)

    def parameters_of(self, content: bool) -> list[nn.Parameter]:
        """The trained halves for content, or those for style."""
        name = "lora_A" if content else "lora_B"
        return [
            getattr(layer, name)["default"].parametrizations.weight.original for layer in self.layers.values()
        ]

    @torch.no_grad()
    def take(self, folder: Path, content: bool) -> None:
        """Takes the content's, or else the style's, halves of a run. UserError unless it has the same
        layers, rank and frozen halves."""
        state, flag = tensors_of(folder / LORA), "content" if content else "style"
        own = lora_state(self.updates(), self.is_unet)
        ends = (".down.weight", ".lora_A.weight") if content else (".up.weight", ".lora_B.weight")
        for (_, name), key in zip(self.updates(), [k for k in own if k.endswith(ends)], strict=True):
            layer = self.layers[name]
            part = (layer.lora_A if content else layer.lora_B)["default"]
            half = part.parametrizations.weight[0]
            found = state.get(key)
            if found is None or found.shape != part.weight.shape:
                raise UserError(
                    f"--{flag}_run: '{folder}' has another rank, other layers or another base model "
                    f"('{key}'); train both stages with the same settings."
                )
            first = found.narrow(half.dim, 0, half.frozen.shape[half.dim])
            if not torch.allclose(first.to(half.frozen), half.frozen, atol=1e-6):
                raise UserError(
                    f"--{flag}_run: the frozen halves of '{folder}' are others; give its "
                    "--projection_seed, --split and --orthogonal."
                )
            part.parametrizations.weight.original.copy_(half.right_inverse(found))

    def updates(self) -> Layers:
        """The dense updates of all layers."""
        found = {}
        for name, layer in self.layers.items():
            down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            shape = tuple(down.shape)
            found[self.backbone.denoiser_name, name] = Update(
                down.flatten(1).float(), layer.scaling["default"] * up.flatten(1).float(), shape
            )
        return found


DAMPING = 1e-2  # delta; a matrix that is still zero has no inverse


def _preconditioned(other: Any, rank_dim: int, on_right: bool, gradient: Tensor) -> Tensor:
    """A gradient times the inverse of the other matrix's Gram matrix, whose rank lies along `rank_dim`."""
    weight = other.weight.detach().float().movedim(rank_dim, 0).flatten(1)  # (rank, features)
    gram = weight @ weight.T + DAMPING * torch.eye(len(weight), device=weight.device)
    flat = gradient.float().flatten(1)
    solved = torch.linalg.solve(gram, flat.T).T if on_right else torch.linalg.solve(gram, flat)
    return solved.view_as(gradient).to(gradient.dtype)


def _basis(rank: int, shape: tuple[int, ...], rows: slice, orthogonal: bool) -> Tensor:
    """A frozen part (rank, *shape) in which only `rows` are not zero: orthonormal as far as there is room
    for it, or else random of the same norm."""
    count = len(range(rank)[rows])
    size = int(torch.tensor(shape).prod())
    drawn = torch.randn(size, count)
    made = torch.linalg.qr(drawn).Q if orthogonal else drawn / size**0.5
    found = torch.zeros(rank, size)
    found[range(rank)[rows].start : range(rank)[rows].start + made.shape[1]] = made.T
    return found.view(rank, *shape)
