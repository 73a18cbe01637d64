"""Will it fit? Dry runs of DreamBooth LoRA on models of true size, for devices of 8, 12, 16 and 24 GB.

    python examples/benchmarks/true_sizes.py [MODEL ...]

Each model is a folder of configurations alone, written here from public numbers; no weights are needed. The
tokenizers are the tests' small ones: a prompt has about as many tokens, and Flux.2's is padded to 512.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from PIL import Image
from transformers import CLIPTextConfig, PretrainedConfig, Qwen2_5_VLConfig, Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from customize.quiet import quiet_libraries
from customize.trainers.dry_run import Search, remedies, shown, size
from customize.trainers.launch import complete
from customize.trainers.memory import RunPlan, estimate, priced
from customize.trainers.registry import find_method
from customize.trainers.settings import make_accelerator, size_of
from tiny import tokenizer
from tiny_families import chat_tokenizer

LIMITS = ("8GB", "12GB", "16GB", "24GB")
Parts = dict[str, Any]


def clip(kind: str, width: int, depth: int, heads: int) -> PretrainedConfig:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    made = CLIPTextConfig(num_hidden_layers=depth, num_attention_heads=heads, **sizes)
    made.architectures = [kind]
    return made


def qwen3(kind: str, width: int, inner: int, tied: bool) -> PretrainedConfig:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 36}
    sizes = {"hidden_size": width, "intermediate_size": inner, "vocab_size": 151_936}
    made = Qwen3Config(tie_word_embeddings=tied, **heads, **sizes)
    made.architectures = [kind]
    return made


def autoencoder(channels: int, **settings: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    blocks |= {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    return AutoencoderKL(latent_channels=channels, sample_size=1024, **blocks, **settings)


def sdxl() -> tuple[str, Parts]:
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return "StableDiffusionXLPipeline", {
        "vae": autoencoder(4, scaling_factor=0.13025),
        "unet": unet,
        "text_encoder": clip("CLIPTextModel", 768, 12, 12),
        "text_encoder_2": clip("CLIPTextModelWithProjection", 1280, 32, 20),
        "tokenizer": tokenizer(77),
        "tokenizer_2": tokenizer(77),
        "scheduler": partial(EulerDiscreteScheduler),
    }


def klein(double: int, single: int, heads: int, text: PretrainedConfig) -> tuple[str, Parts]:
    transformer = Flux2Transformer2DModel(
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=heads,
        joint_attention_dim=3 * text.hidden_size,
        guidance_embeds=False,
    )
    return "Flux2KleinPipeline", {
        "vae": AutoencoderKLFlux2(),
        "transformer": transformer,
        "text_encoder": text,
        "tokenizer": chat_tokenizer(),
        "scheduler": partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
    }


def qwen_image() -> tuple[str, Parts]:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "vocab_size": 152_064}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "rope_parameters": rope}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    encoder = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"out_hidden_size": 3584})
    encoder.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return "QwenImagePipeline", {
        "vae": AutoencoderKLQwenImage(),
        "transformer": QwenImageTransformer2DModel(),
        "text_encoder": encoder,
        "tokenizer": chat_tokenizer(),
        "scheduler": partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
    }


def z_image() -> tuple[str, Parts]:
    return "ZImagePipeline", {
        "vae": autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159),
        "transformer": ZImageTransformer2DModel(),
        "text_encoder": qwen3("Qwen3Model", 2560, 9728, True),
        "tokenizer": chat_tokenizer(),
        "scheduler": partial(FlowMatchEulerDiscreteScheduler, shift=3.0),
    }


KLEIN = "Qwen3ForCausalLM"
MODELS: dict[str, Callable[[], tuple[str, Parts]]] = {
    "SDXL": sdxl,
    "Flux.2 Klein 4B": lambda: klein(5, 20, 24, qwen3(KLEIN, 2560, 9728, True)),
    "Flux.2 Klein 9B": lambda: klein(8, 24, 32, qwen3(KLEIN, 4096, 12_288, False)),
    "Z-Image": z_image,
    "Qwen-Image": qwen_image,
}


def write(folder: Path, make: Callable[[], tuple[str, Parts]]) -> None:
    """A pipeline's folder with configurations and tokenizers, without weights."""
    with torch.device("meta"):
        name, parts = make()
    index: dict[str, Any] = {"_class_name": name}
    for part, made in parts.items():
        own = made() if isinstance(made, partial) else made  # schedulers compute, which meta tensors cannot
        if isinstance(own, PretrainedConfig):
            own.save_pretrained(folder / part)
            index[part] = ["transformers", own.architectures[0]]
            continue
        save = own.save_config if hasattr(own, "save_config") else own.save_pretrained
        save(folder / part)
        library = "transformers" if part.startswith("tokenizer") else "diffusers"
        index[part] = [library, type(own).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


def main(names: list[str]) -> None:
    quiet_libraries()
    warnings.simplefilter("ignore")
    print(
        "| model | parameters, billions | as asked |", " | ".join(LIMITS), "|\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as place:
        images = Path(place) / "images"
        images.mkdir()
        Image.new("RGB", (1024, 1024), "gray").save(images / "0.png")
        for name in names or MODELS:
            write(Path(place) / name, MODELS[name])
            print(row(name, Path(place) / name, images), flush=True)


def row(name: str, model: Path, images: Path) -> str:
    """A row of the table: the peak as asked, and for each limit the peak below it and its flags."""
    asked = {"pretrained_model_name_or_path": str(model), "instance_data_dir": str(images), "rank": 16}
    asked |= {"instance_prompt": "a photo of sks dog", "resolution": 1024, "mixed_precision": "bf16"}
    parts, _ = complete("dreambooth", asked)
    kind = find_method("dreambooth")
    plan = RunPlan(kind, *parts, kind.Source.read(parts[1], str(model), 0))
    accelerator = make_accelerator(parts[2])
    first = estimate(plan, accelerator)
    search = Search(plan, accelerator, first)
    cells = []
    for limit in map(size_of, LIMITS):
        chosen, best = remedies(plan, limit, search)
        fits = best.peak <= limit
        cells.append(f"{size(best.peak)} {shown(chosen)}".strip() if fits else f"no: {size(best.peak)}")
    billions = " + ".join(f"{count / 1e9:.2f}" for count in first.parameters.values())
    return " | ".join([f"| {name}", billions, size(priced(first, plan).peak), *cells]) + " |"


if __name__ == "__main__":
    main(sys.argv[1:])
