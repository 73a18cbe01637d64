"""The model card that every run gets. It names no place on the user's machine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from customize.adapters import holds, holds_encoder
from customize.adapters.lora_files import LORA
from customize.data.concepts import Concept
from customize.embedded import is_embedded
from customize.files import header, tensors_of
from customize.runs.folder import CARD, read_info, samples, staged
from customize.runs.output import is_own_image
from customize.runs.privacy import without_places

USE = """```python
from customize.pipelines import load_pipeline

pipe = load_pipeline("{folder}")  # the folder of these files
pipe({prompt}).images[0].save("image.png")
```"""


USE_ENCODER = """```python
from customize.pipelines import load_subject_pipeline

pipe = load_subject_pipeline("{folder}")  # the folder of these files
pipe("{prompt}", subject_images=["1.png", "2.png"]).images[0].save("image.png")
```"""


USE_DIRECTIONS = """```python
from customize.pipelines import load_pipeline
from customize.pipelines.directions import Direction, directed

pipe = load_pipeline("{folder}")  # the base model
with directed(pipe, [Direction("{folder}", 0, 1.0)]):  # the folder of these files, a number, a strength
    pipe({prompt}).images[0].save("image.png")
```"""


STOCK_WORDS = ("clip_l", "t5")  # text encoders of models whose stock pipelines load learned words


STOCK = """The files are diffusers' own{where}:

```python
from diffusers import {kind}
{imports}
pipe = {kind}.from_pretrained({base})
{loads}
```"""


def write_card(folder: Path, concepts: Sequence[Concept]) -> None:
    """`README.md` with front matter for the hub, how to use the run, its settings and its last validation
    images."""
    info = read_info(folder)
    with staged(folder, info) as (new, _):
        (new / CARD).write_text(card(folder, info, concepts), encoding="utf-8")


def last_sample(folder: Path) -> Path | None:
    """The sheet of the last validation, which the card shows."""
    found = [
        path for path in samples(folder / "samples") if path.name.startswith("step-") and is_own_image(path)
    ]
    return max(found, default=None)


def card(folder: Path, info: dict[str, Any], concepts: Sequence[Concept]) -> str:
    name, base, local = (
        folder.resolve().name,
        without_places(info["base_model"]),
        is_local(info["base_model"]),
    )
    prompts = [concept.instance_prompt for concept in concepts if concept.instance_prompt] or ["..."]
    sample = last_sample(folder)
    images = f"## Images\n\n![validation images](samples/{sample.name})\n\n" if sample else ""
    config = sorted(without_places(info["config"]).items())
    unset: tuple = ("", "none", None, [], False, 0)
    settings = "\n".join(f"| {key} | {value} |" for key, value in config if value not in unset)
    about = f"""{_made(info, base)}
{"Prompt" if len(prompts) == 1 else "Prompts"} of the subject: {", ".join(f"`{p}`" for p in prompts)}."""
    use = USE.format(folder=name, prompt=json.dumps(prompts[0]))
    if "in_context" in info:
        use = USE_ENCODER.format(folder=name, prompt="a photo of a dog on the beach")
    if holds(folder, "directions"):
        about = f"Directions found in `{base}` by **{info['method']}** in {info['step']} steps."
        use = USE_DIRECTIONS.format(folder=name, prompt=json.dumps(prompts[0]))
    if holds_encoder(folder):
        about = (
            f"An encoder of subjects for `{base}`, trained by **{info['method']}** in {info['step']} steps."
        )
        about = " ".join([about, *_quantized(info["config"])])
        prompts = ["a photo of <s>"]
        use = USE_ENCODER.format(folder=name, prompt="a photo of a <s> dog on the beach")
    text = f"""# {name}

{about}

{images}## Use

{use}

{_stock(folder, info)}

## Settings

| | |
|---|---|
{settings}
"""
    tags = [
        "text-to-image",
        "diffusers",
        "diffusers-training",
        info["method"],
        *(["lora"] if holds(folder, "lora") else []),
    ]
    data = ModelCardData(
        library_name="diffusers", base_model=None if local else base, tags=tags, instance_prompt=prompts[0]
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _made(info: dict[str, Any], base: str) -> str:
    """How a run came about, in a sentence."""
    if "step" in info:
        taught = f"A subject taught to `{base}` by **{info['method']}** in {info['step']} steps."
        return " ".join([taught, *_quantized(info["config"])])
    sources = " and ".join(map(str, info["config"]["merged"]))
    return f"LoRA of {sources} for `{base}`, joined by `customize merge --how {info['config']['how']}`."


def _quantized(config: dict[str, Any]) -> list[str]:
    """A sentence for each kind of weights that were quantised in training."""
    parts = {"quantize": "denoiser", "quantize_text_encoder": "text encoder"}
    return [
        f"In training the {part}'s frozen weights were held in {kind}; draw with them as they are."
        for flag, part in parts.items()
        if (kind := config.get(flag, "none")) != "none"
    ]


def is_local(base: str) -> bool:
    return is_embedded(base) or Path(base).exists()


def _stock(folder: Path, info: dict[str, Any]) -> str:
    name, base, loads = folder.resolve().name, info["base_model"], []
    if holds(folder, "lora"):
        loads.append(f'pipe.load_lora_weights("{name}", weight_name="{LORA}")')
    for word, file in info["words"].items():
        known = header(folder / file).get("encoders", "clip_l")
        if known in STOCK_WORDS and "clip_l" not in tensors_of(folder / file):
            loads.append(f'pipe.load_textual_inversion("{name}", weight_name="{file}", token="{word}")')
    imports = "\nfrom customize.stickers import MODEL  # a folder\n" if is_embedded(base) else ""
    shown = "MODEL" if is_embedded(base) else f'"{without_places(base)}"'
    where = (
        "; stock pipelines load them, here with the base model that this toolkit brings"
        if is_embedded(base)
        else "; without this toolkit"
    )
    # the automatic one knows no models that only edit images
    kind = "DiffusionPipeline" if "in_context" in info else "AutoPipelineForText2Image"
    parts = {"where": where, "base": shown, "imports": imports, "kind": kind}
    return STOCK.format(loads="\n".join(loads), **parts) if loads else ""
