"""The model card that every run gets."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from customize import stickers
from customize.checkpoint import LORA, read_info
from customize.files import tensors_of
from customize.subject import ADAPTER_FILES

USE = """```python
from customize.pipelines import load_pipeline

pipe = load_pipeline("{folder}")
pipe({prompt}).images[0].save("picture.png")
```"""
USE_ENCODER = """```python
from customize.pipelines import load_subject_pipeline

pipe = load_subject_pipeline("{folder}")
pipe("{prompt}", subject_images=["1.png", "2.png"]).images[0].save("picture.png")
```"""
STOCK = """The files are diffusers' own; without this toolkit:

```python
from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained("{base}")
{loads}
```"""


def write_card(folder: Path, info: dict, concepts) -> None:
    """`README.md` with front matter for the hub, how to use the run, its settings and its last validation pictures."""
    prompts = [concept.instance_prompt for concept in concepts if concept.instance_prompt] or ["..."]
    samples = sorted((folder / "samples").glob("step-*.png"))
    pictures = f"## Pictures\n\n![validation pictures](samples/{samples[-1].name})\n\n" if samples else ""
    defaults_last = sorted(info["config"].items())
    settings = "\n".join(f"| {name} | {value} |" for name, value in defaults_last if value not in ("", [], False, 0))
    about = f"""A subject taught to `{info["base_model"]}` by **{info["method"]}** in {info["step"]} steps.
{"Prompt" if len(prompts) == 1 else "Prompts"} of the subject: {", ".join(f"`{p}`" for p in prompts)}."""
    use = USE.format(folder=folder, prompt=json.dumps(prompts[0]))
    if any((folder / name).exists() for name in ADAPTER_FILES):
        about = f"An encoder of subjects for `{info['base_model']}`, trained by **{info['method']}** in {info['step']} steps."
        prompts = ["a photo of <s>"]
        use = USE_ENCODER.format(folder=folder, prompt="a photo of a <s> dog on the beach")
    text = f"""# {folder.name}

{about}

{pictures}## Use

{use}

{_stock(folder, info["base_model"])}

## Settings

| | |
|---|---|
{settings}
"""
    tags = ["text-to-image", "diffusers", "diffusers-training", info["method"], *(["lora"] if (folder / LORA).exists() else [])]
    base = None if info["base_model"] == "stickers" or Path(info["base_model"]).exists() else info["base_model"]
    data = ModelCardData(library_name="diffusers", base_model=base, tags=tags, instance_prompt=prompts[0])
    (folder / "README.md").write_text(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")))


def _stock(folder: Path, base: str) -> str:
    base = str(stickers.MODEL) if base == "stickers" else base
    info, loads = read_info(folder), []
    if (folder / LORA).exists():
        loads.append(f'pipe.load_lora_weights("{folder}", weight_name="{LORA}")')
    for word, name in info["words"].items():
        if "clip_l" not in tensors_of(folder / name):
            loads.append(f'pipe.load_textual_inversion("{folder / name}", token="{word}")')
    return STOCK.format(base=base, loads="\n".join(loads)) if loads else ""
