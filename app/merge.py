"""`customize merge`: one LoRA of several, without training."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from customize.app.shared import split
from customize.config import option
from customize.errors import UserError

How = Literal["cat", "svd", "linear", "ties", "dare", "orthogonal", "k_lora", "b_lora"]


@dataclass
class MergeConfig:
    """How LoRAs are joined."""

    output_dir: str = option("", "folder of the merged run", essential=True)
    how: How = option(
        "cat",
        "how updates are joined. cat: their exact sum; svd: the sum at --rank; linear: matrices summed as in "
        "peft; ties: small values cut, signs elected; dare: values dropped at random; orthogonal: of each "
        "later LoRA what the earlier ones leave free; k_lora: each layer from one of them; b_lora: content "
        "of the first, style of the second (SDXL)",
        essential=True,
    )
    weights: list[float] = option([], "a weight for each LoRA, in their order; none: 1 each", essential=True)
    block_weights: list[str] = option(
        [],
        "weights for layers whose names begin so, such as down_blocks=1,0 up_blocks.1=0.5,1, times --weights",
    )
    rank: int = option(0, "rank of the result; 0: the sum of the LoRAs' ranks, where it is needed", least=0)
    density: float = option(
        0.5, "for ties and dare: share of each update's values that is kept", above=0, most=1
    )
    seed: int = option(0, "for dare: seed of what is dropped", least=0)
    base_model: str = option("", "base model of the LoRAs; empty: that of the runs among them")
    export_kohya: bool = option(False, "also write the LoRA in kohya's layout, for A1111 and ComfyUI")
    overwrite_output_dir: bool = option(False, "replace an earlier run in --output_dir")


def merge(words: list[str]) -> None:
    names, config = split(words, MergeConfig, ["A", "B"], more=True)
    folder = merge_loras(names, config)
    print(f"the run is in {folder}")


def merge_loras(names: Sequence[str], config: MergeConfig) -> Path:
    """Writes the run of the LoRAs (runs or files) joined; UserError before anything is written for what
    does not go together."""
    from customize import embedded
    from customize.adapters.kohya import KohyaLora
    from customize.adapters.lora_reading import read_lora
    from customize.adapters.merging import Merged, merged, words_of
    from customize.backbones.families import wrap
    from customize.backbones.load import load_base
    from customize.data.concepts import Concept
    from customize.quiet import quiet_libraries, quietly
    from customize.runs import checkpoint
    from customize.runs.card import write_card
    from customize.runs.folder import INFO, base_options, base_settings, check_free

    if not config.output_dir:
        raise UserError("--output_dir: name the folder of the merged run.")
    weights, paths, output = (
        weights_for(config, len(names)),
        [Path(name) for name in names],
        Path(config.output_dir),
    )
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no '{path}': give runs or LoRA files.")
        if path.resolve() == output.resolve():
            raise UserError(f"--output_dir: '{output}' is one of the runs to merge; choose another folder.")
    check_free(output, config.overwrite_output_dir, False)
    runs = [(path, checkpoint.open_run(path)) for path in paths if (path / INFO).exists()]
    base = base_of(config.base_model, runs)
    loaded = {} if config.base_model else base_settings(runs[0][1]["config"])
    found = words_of(runs)
    quiet_libraries()
    with quietly():
        pipe = load_base(base, **base_options(loaded))
        loras = [read_lora(path, pipe) for path in paths]
    joined = merged(loras, weights, config.how, config.rank, config.density, config.seed)
    sources = {
        "how": config.how,
        "merged": [path.name for path in paths],
        "weights": list(weights("")),
    } | loaded
    about = {"base_model": embedded.lasting_name(base), "method": "merge", "config": sources}
    adapter = Merged(joined, found, "unet" in pipe.components, json.dumps(sources))
    exports = [KohyaLora(wrap(pipe, base), [adapter])] if config.export_kohya else []
    checkpoint.save(output, [adapter, *exports], about)
    prompts = [info["config"].get("instance_prompt", "") for _, info in runs]
    write_card(output, [Concept("", prompt) for prompt in dict.fromkeys(prompts) if prompt])
    return output


def base_of(named: str, runs: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    """The base model of all runs; UserError where they differ, or none is known."""
    bases = {named} if named else {info["base_model"] for _, info in runs}
    if len(bases) > 1:
        raise UserError(f"the runs are of different base models: {', '.join(sorted(bases))}.")
    if not bases:
        raise UserError("--base_model: name the base model that the LoRA files were made for.")
    return bases.pop()


def weights_for(config: MergeConfig, count: int) -> Callable[[str], list[float]]:
    """The weights of the LoRAs in a layer, by its name; UserError for other than a number for each."""
    whole = config.weights or [1.0] * count
    groups = {}
    for text in config.block_weights:
        prefix, _, numbers = text.partition("=")
        try:
            groups[prefix] = [float(number) for number in numbers.split(",")]
        except ValueError:
            raise UserError(f"--block_weights: '{text}' is not NAME=NUMBER,NUMBER; mend it.") from None
    for name, own in {
        "--weights": whole,
        **{f"--block_weights {prefix}": own for prefix, own in groups.items()},
    }.items():
        if len(own) != count or not all(map(math.isfinite, own)):
            raise UserError(f"{name} must give {count} numbers, one for each LoRA, not {own}.")

    def of_layer(layer: str) -> list[float]:
        best = max((prefix for prefix in groups if layer.startswith(prefix)), key=len, default=None)
        return whole if best is None else [a * b for a, b in zip(whole, groups[best], strict=True)]

    return of_layer
