"""Tiny models as their authors name the weights: the files that model sites offer."""

import re

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import tiny

Tensors = dict[str, Tensor]
TIME = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
SIZE = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet(blocks: int, xl: bool = False) -> UNet2DConditionModel:
    """Two layers in each of three or four blocks, as in the released models."""
    down, up = ["CrossAttnDownBlock2D"] * (blocks - 1), ["CrossAttnUpBlock2D"] * (blocks - 1)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    }
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8,) * blocks,
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=(*down, "DownBlock2D"),
        up_block_types=("UpBlock2D", *up),
        cross_attention_dim=16 + 24 if xl else 16,
        use_linear_projection=xl,
        **(added if xl else {}),
    )


def sd15() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        **tiny.sd15().components | {"unet": unet(4)}, requires_safety_checker=False
    )


def sdxl() -> StableDiffusionXLPipeline:
    """An SDXL file is told by the tenth layer of its second text encoder, the encoders by their widths."""
    config = CLIPTextConfig(**tiny.clip(True, 24).config.to_dict() | {"num_hidden_layers": 10})
    parts = {"unet": unet(3, True), "text_encoder_2": CLIPTextModelWithProjection(config)}
    return StableDiffusionXLPipeline(**tiny.sdxl().components | parts, add_watermarker=False)


def renamed(name: str, names: dict[str, str]) -> str:
    for own, original in names.items():
        if name.startswith(own + "."):
            return original + name[len(own) :]
    return name


def unet_name(name: str, with_attention: set[str]) -> str:
    """A UNet's tensor in the original layout; `with_attention`: the up blocks that have attention."""
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        way, block, kind, layer, rest = found.groups()
        first = int(block) * 3 + int(layer)
        if kind == "downsamplers":
            return f"input_blocks.{int(block) * 3 + 3}.0.op{rest.removeprefix('conv')}"
        if kind == "upsamplers":
            return f"output_blocks.{int(block) * 3 + 2}.{2 if block in with_attention else 1}.{rest}"
        place = f"input_blocks.{first + 1}" if way == "down" else f"output_blocks.{first}"
        return f"{place}.0.{renamed(rest, RESNET)}" if kind == "resnets" else f"{place}.1.{rest}"
    if found := re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", name):
        kind, layer, rest = found.groups()
        resnet = f"middle_block.{int(layer) * 2}.{renamed(rest, RESNET)}"
        return resnet if kind == "resnets" else f"middle_block.1.{rest}"
    return renamed(name, TIME | SIZE | ENDS)


def original_unet(tensors: Tensors) -> Tensors:
    up = {name.split(".")[1] for name in tensors if name.startswith("up_blocks") and "attentions" in name}
    return {"model.diffusion_model." + unet_name(name, up): value for name, value in tensors.items()}


def original_vae(tensors: Tensors) -> Tensors:
    blocks = 1 + max(int(name.split(".")[2]) for name in tensors if ".up_blocks." in name)
    found = {}
    for name, value in tensors.items():
        if parts := re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
            side, way, block, kind, layer, rest = parts.groups()
            block = block if way == "down" else blocks - 1 - int(block)
            rest = renamed(rest, {"conv_shortcut": "nin_shortcut"})
            inner = f"block.{layer}.{rest}" if kind == "resnets" else f"{kind.removesuffix('rs')}.{rest}"
            name = f"{side}.{way}.{block}.{inner}"
        elif parts := re.fullmatch(r"(\w+)\.mid_block\.(\w+)\.(\d+)\.(.+)", name):
            side, kind, layer, rest = parts.groups()
            if kind == "resnets":
                name = f"{side}.mid.block_{int(layer) + 1}.{rest}"
            else:
                name = f"{side}.mid.attn_1.{renamed(rest, VAE_ATTENTION)}"
                value = value[:, :, None, None] if value.ndim == 2 else value  # convolutions, once
        found["first_stage_model." + name.replace("conv_norm_out", "norm_out")] = value
    return found


def original_clip(tensors: Tensors, prefix: str) -> Tensors:
    return {
        f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}": v for name, v in tensors.items()
    }


def open_clip(tensors: Tensors, prefix: str) -> Tensors:
    """The second text encoder of SDXL: queries, keys and values in one matrix."""
    own = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    found = {
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "ln_final.weight": own["final_layer_norm.weight"],
        "ln_final.bias": own["final_layer_norm.bias"],
        "text_projection": own["text_projection.weight"].T.contiguous(),
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names["self_attn.out_proj"] = "attn.out_proj"
    for name, value in own.items():
        if parts := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name):
            layer, rest = parts.groups()
            place = f"transformer.resblocks.{layer}"
            if joint := re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", rest):
                three = [own[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                found[f"{place}.attn.in_proj_{joint[1]}"] = torch.cat(three)
            elif not re.match(r"self_attn\.[kv]_proj", rest):
                found[f"{place}.{renamed(rest, names)}"] = value
    return {prefix + name: value for name, value in found.items()}


def original_sd15(pipe: DiffusionPipeline) -> Tensors:
    text = original_clip(pipe.text_encoder.state_dict(), "cond_stage_model.")
    return original_unet(pipe.unet.state_dict()) | original_vae(pipe.vae.state_dict()) | text


def original_sdxl(pipe: DiffusionPipeline) -> Tensors:
    text = original_clip(pipe.text_encoder.state_dict(), "conditioner.embedders.0.")
    text |= open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    return original_unet(pipe.unet.state_dict()) | original_vae(pipe.vae.state_dict()) | text


def original_z_image(pipe: DiffusionPipeline) -> Tensors:
    """The denoiser alone, with queries, keys and values in one matrix."""
    own, found = pipe.transformer.state_dict(), {}
    names = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder."}
    names |= {"attention.to_out.0.": "attention.out.", "attention.norm_k.": "attention.k_norm."}
    names |= {"attention.norm_q.": "attention.q_norm."}
    for name, value in own.items():
        if name.endswith("attention.to_q.weight"):
            three = [own[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            name, value = name.replace("to_q", "qkv"), torch.cat(three)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if not re.search(r"to_[kv]\.weight", name):
            found["model.diffusion_model." + name] = value
    return found


def prefixed(pipe: DiffusionPipeline) -> Tensors:
    """The denoiser alone under diffusers' names, behind a prefix."""
    return {"model.diffusion_model." + name: value for name, value in pipe.transformer.state_dict().items()}
