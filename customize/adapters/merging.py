"""LoRAs joined without training: for each layer, the updates up @ down of several LoRAs become one.

Ways to join (`HOW`); w are the weights, D the updates:

* `cat`: ranks are concatenated, which is the exact weighted sum. The rank grows. * `svd`: the best
approximation of that sum at a rank. * `linear`: the matrices are summed instead of their products, as
peft's `linear`; it mixes the LoRAs. * `ties`: small values are cut, signs are elected (Yadav et al.,
2023, arXiv 2306.01708); then `svd`. * `dare`: values are dropped at random and the others enlarged (Yu et
al., 2024, arXiv 2311.03099); then `svd`. * `orthogonal`: of each later LoRA, what lies in the rows or
columns of the earlier ones is left out. * `k_lora`: each layer takes the one LoRA whose largest values
are larger (after K-LoRA, Ouyang et al., 2025, arXiv 2502.18461; without its dependence on time). *
`b_lora`: SDXL's content block of the first and its style block of the second (B-LoRA, Frenkel et al.,
2024, arXiv 2403.14572).
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils.merge_utils import dare_linear, ties
from safetensors.torch import save_file
from torch import Tensor

from customize.adapters.base import Adapter
from customize.adapters.lora_files import LORA
from customize.adapters.lora_reading import Layers, Update
from customize.adapters.words import OUTPUTS
from customize.errors import UserError
from customize.randomness import fixed_randomness

CONTENT, STYLE = "up_blocks.0.attentions.0.", "up_blocks.0.attentions.1."  # of SDXL's UNet, for B-LoRA


def cat(updates: Sequence[Update], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(down, up) of the exact weighted sum."""
    up = torch.cat([w * own.up for own, w in zip(updates, weights, strict=True)], 1)
    return torch.cat([own.down for own in updates]), up


def svd(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down, up) of the best approximation of an update (out, in) at a rank (Eckart and Young)."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def linear(updates: Sequence[Update], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(down, up), each the sum of those of the LoRAs, times the root of the weight."""
    if len({len(own.down) for own in updates}) > 1 or min(weights) < 0:
        raise UserError("--how linear needs LoRAs of one rank and weights of 0 or more; use cat or svd.")
    pairs = list(zip(updates, weights, strict=True))
    down, up = (
        sum((w**0.5 * getattr(own, part) for own, w in pairs), torch.tensor(0.0)) for part in ("down", "up")
    )
    return down, up


def orthogonal(updates: Sequence[Update], weights: Sequence[float]) -> Tensor:
    """The sum of updates, each without what lies in the columns or rows of those before it."""
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    total = torch.zeros_like(updates[0].delta)
    for own, w in zip(updates, weights, strict=True):
        delta = own.delta
        if rows:
            left, right = (torch.linalg.qr(torch.cat(parts, 1)).Q for parts in (columns, rows))
            delta = delta - left @ (left.T @ delta)
            delta = delta - (delta @ right) @ right.T
        rows.append(own.down.T)
        columns.append(own.up)
        total = total + w * delta
    return total


def strongest(updates: Sequence[Update], weights: Sequence[float]) -> Tensor:
    """The update whose largest values, as many as the product of all ranks, have the greatest sum."""
    count = 1
    for own in updates:
        count *= len(own.down)
    deltas = [w * own.delta for own, w in zip(updates, weights, strict=True)]
    sums = [delta.abs().flatten().topk(min(count, delta.numel())).values.sum() for delta in deltas]
    return deltas[int(torch.stack(sums).argmax())]


DELTAS: dict[str, Callable[..., Tensor]] = {
    "svd": lambda updates, weights, density: sum_of(updates, weights),
    "ties": lambda updates, weights, density: ties(
        [u.delta for u in updates], torch.tensor(weights), density
    ),
    "dare": lambda updates, weights, density: dare_linear(
        [u.delta for u in updates], torch.tensor(weights), density
    ),
    "orthogonal": lambda updates, weights, density: orthogonal(updates, weights),
    "k_lora": lambda updates, weights, density: strongest(updates, weights),
}
HOW = ("cat", "linear", "b_lora", *DELTAS)


def sum_of(updates: Sequence[Update], weights: Sequence[float]) -> Tensor:
    down, up = cat(updates, weights)
    return up @ down


def merged(
    loras: Sequence[Layers],
    weights: Callable[[str], Sequence[float]],
    how: str,
    rank: int = 0,
    density: float = 0.5,
    seed: int = 0,
) -> Layers:
    """One LoRA of several. `weights` gives, for a layer's name, a weight for each LoRA; `rank` is that of
    the result where it is not exact, 0 the sum of the LoRAs' own. UserError for ways that these LoRAs
    cannot go."""
    if how == "b_lora":
        loras = _blocks(loras)
    keys = dict.fromkeys(key for lora in loras for key in lora)
    found: Layers = {}
    with fixed_randomness(seed), torch.no_grad():
        for key in keys:
            there = [i for i, lora in enumerate(loras) if key in lora]
            own, all_weights = [loras[i][key] for i in there], weights(key[1])
            some = [all_weights[i] for i in there]
            if len({update.delta.shape for update in own}) > 1:
                raise UserError(
                    f"'{key[0]}.{key[1]}' has other sizes in each LoRA; they are of other base models."
                )
            if how in ("cat", "b_lora") or len(own) == 1:
                down, up = cat(own, some)
            elif how == "linear":
                down, up = linear(own, some)
            else:
                most = min(own[0].delta.shape)
                down, up = svd(
                    DELTAS[how](own, some, density), min(rank or sum(len(u.down) for u in own), most)
                )
            if rank and len(down) > rank:
                down, up = svd(up @ down, rank)
            found[key] = Update(down, up, own[0].shape)
    return found


def _blocks(loras: Sequence[Layers]) -> list[Layers]:
    if len(loras) != 2:
        raise UserError(
            "--how b_lora takes the content of the first LoRA and the style of the second; give two."
        )
    parts = [
        {key: update for key, update in lora.items() if key[1].startswith(block)}
        for lora, block in zip(loras, (CONTENT, STYLE), strict=True)
    ]
    if not all(parts) or any(
        key[1].startswith("up_blocks.0.attentions.2.transformer_blocks.2.") for key in loras[0]
    ):
        raise UserError("--how b_lora is for LoRAs of SDXL's attention layers; use another way.")
    return parts


def lora_state(layers: Layers, older_names: bool) -> dict[str, Tensor]:
    """The tensors of diffusers' layout. All layers get the rank of the largest, filled up with zeros:
    readers then agree on the scale, 1."""
    rank = max(len(update.down) for update in layers.values())
    state = {}
    for (part, layer), update in layers.items():
        down, up = (
            update.down.new_zeros(rank, update.down.shape[1]),
            update.up.new_zeros(len(update.up), rank),
        )
        down[: len(update.down)], up[:, : update.up.shape[1]] = update.down, update.up
        if len(update.shape) == 4:
            down, up = down.view(rank, *update.shape[1:]), up[:, :, None, None]
        path = f"text_model.{layer.removeprefix('text_model.')}" if part.startswith("text_encoder") else layer
        names = ("lora.down", "lora.up") if older_names else ("lora_A", "lora_B")
        if part.startswith("text_encoder") and older_names:
            names = ("lora_linear_layer.down", "lora_linear_layer.up")
        for name, value in zip(names, (down, up), strict=True):
            state[f"{part}.{path}.{name}.weight"] = value.cpu().contiguous()
    return state


def words_of(runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> dict[str, Path]:
    """The files of the learned words of runs, with `run.json` each; UserError for words that files cannot
    hold together."""
    found: dict[str, Path] = {}
    for folder, info in runs:
        if (folder / OUTPUTS).exists() or info.get("dual_path"):
            raise UserError(
                f"'{folder}' has learned a word behind the text encoder, or two paths, which no merge holds."
            )
        for word, name in info.get("words", {}).items():
            if word in found:
                raise UserError(
                    f"'{word}' is a learned word of two of the runs; train one of them with another word."
                )
            found[word] = folder / name
    return found


class FoldedLora(Adapter):
    """LoRA that is trained or made in a form of its own, and saved as an ordinary one."""

    files = (LORA,)
    is_unet: bool  # whether the denoiser is a UNet, whose files have diffusers' older names
    made_from = ""  # what the file's header says of its origin

    def updates(self) -> Layers:
        """The update of each layer."""
        raise NotImplementedError

    def save(self, folder: Path) -> dict[str, Any]:
        header = {"format": "pt"} | ({"made_from": self.made_from} if self.made_from else {})
        save_file(lora_state(self.updates(), self.is_unet), folder / LORA, header)
        return {}

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: Any) -> None:
        """Nothing: it is an ordinary LoRA."""


class Merged(FoldedLora):
    """A merged LoRA, with the learned words of the runs it was made from."""

    def __init__(self, layers: Layers, words: Mapping[str, Path], is_unet: bool, made_from: str = ""):
        self.layers, self.words, self.is_unet, self.made_from = layers, words, is_unet, made_from

    def updates(self) -> Layers:
        return self.layers

    def save(self, folder: Path) -> dict[str, Any]:
        super().save(folder)
        names = {word: f"learned_embeds-{i}.safetensors" for i, word in enumerate(self.words)}
        for word, name in names.items():
            shutil.copyfile(self.words[word], folder / name)
        return {"words": names}
