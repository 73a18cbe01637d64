"""Names of a Swin transformer's parameters in its authors' files, which SeeCoder's hold, and in
transformers."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# pairs of patterns and what they become, from transformers' names to the authors'
RENAMED = (
    (r"^swin\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^swin\.embeddings\.norm", "patch_embed.norm"),
    (r"^swin\.encoder\.", ""),
    (r"\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
QUERY = re.compile(r"\.attention\.q_proj\.")
STAGE = re.compile(r"^hidden_states_norms\.stage(\d+)")


def authors_name(name: str) -> str:
    """The authors' name of a parameter of transformers' `SwinBackbone`, other than queries, keys and
    values."""
    for pattern, becomes in RENAMED:
        name = re.sub(pattern, becomes, name)
    return STAGE.sub(lambda found: f"norm{int(found[1]) - 1}", name)


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of transformers' `SwinBackbone` under the authors' names."""
    found = {}
    for name, value in state.items():
        if QUERY.search(name):
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[authors_name(QUERY.sub(".attn.qkv.", name))] = torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            found[authors_name(name)] = value
    return found


def from_authors(state: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The state under transformers' `names`. KeyError where a tensor is missing. What follows from the
    window's size is left out."""
    found, used = {}, set()
    for name in names:
        letter = re.search(r"\.attention\.([qkv])_proj\.", name)
        source = re.sub(r"\.attention\.[qkv]_proj\.", ".attn.qkv.", name) if letter else name
        own = authors_name(source)
        found[name] = state[own].chunk(3)["qkv".index(letter[1])] if letter else state[own]
        used.add(own)
    unknown = [name for name in state if name not in used and not name.endswith("relative_position_index")]
    if unknown:
        raise KeyError(unknown[0])
    return found


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `SwinConfig` that the shapes of the authors' tensors say. KeyError for other files."""
    depths: list[int] = []
    heads: list[int] = []
    while f"layers.{len(depths)}.blocks.0.norm1.weight" in state:
        stage = f"layers.{len(depths)}.blocks"
        heads.append(state[f"{stage}.0.attn.relative_position_bias_table"].shape[1])
        depths.append(len({name.split(".")[3] for name in state if name.startswith(f"{stage}.")}))
    table = state["layers.0.blocks.0.attn.relative_position_bias_table"]
    window = (round(table.shape[0] ** 0.5) + 1) // 2
    width = state["patch_embed.proj.weight"].shape[0]
    return {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": window}
