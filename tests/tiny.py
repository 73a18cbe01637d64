"""Tiny base models with the real layouts, made from configurations alone: no download."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from customize.adapters.lora import Lora

WORDS = ["a", "photo", "of", "the", "dog", "cat", "on", "grass", "sks", "red", "blue", "toy", "in", "style"]


def tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(["<pad>", "<start>", "<end>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special, model_max_length=length)


def clip(projection: bool = False, dim: int = 16):
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=dim,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=dim,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(dim: int = 32):
    return T5EncoderModel(T5Config(vocab_size=32, d_model=dim, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def vae(shift: float | None = None):
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
    }
    return AutoencoderKL(
        latent_channels=4, norm_num_groups=2, layers_per_block=1, shift_factor=shift, **blocks
    )


def unet(cross: int = 16, xl: bool = False, depth: int = 1):
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross,
        transformer_layers_per_block=depth,
        **(added if xl else {}),
    )


def ddim():
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False, **betas)


def sd15():
    parts = {
        "vae": vae(),
        "text_encoder": clip(),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "scheduler": ddim(),
    }
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def sdxl():
    encoders = {
        "text_encoder": clip(),
        "text_encoder_2": clip(True),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
    }
    return StableDiffusionXLPipeline(
        vae=vae(), unet=unet(32, True), scheduler=ddim(), add_watermarker=False, **encoders
    )


def sd3():
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
    )
    encoders = {"text_encoder": clip(True), "text_encoder_2": clip(True), "text_encoder_3": t5()}
    tokenizers = {"tokenizer": tokenizer(), "tokenizer_2": tokenizer(), "tokenizer_3": tokenizer()}
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(0.0),
        **encoders,
        **tokenizers,
    )


def flux():
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    encoders = {
        "text_encoder": clip(),
        "text_encoder_2": t5(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
    }
    return FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(0.0), **encoders
    )


BASES = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def woken(module, std: float = 0.4):
    """The module with every parameter random."""
    generator = torch.Generator().manual_seed(11)
    for p in module.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * std)
    return module


def tiny(base: str):
    """The pipeline `base` with the same random weights at every call, quiet and in evaluation mode."""
    torch.manual_seed(0)
    return woken_at_zero(BASES[base]())


def woken_at_zero(pipe):
    """A new pipeline made quiet, in evaluation mode, and with no layer that is all zeros: diffusers starts
    some output layers so."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            for p in part.parameters():
                if not p.any():
                    torch.nn.init.normal_(p, std=0.05)
    return pipe


def draw(pipe, prompt: str):
    """One image as an array in [0, 1], always from the same noise."""
    short = {"max_sequence_length": 16} if "transformer" in pipe.components else {}
    generator = torch.Generator().manual_seed(1)
    return pipe(
        prompt, height=32, width=32, num_inference_steps=3, output_type="np", generator=generator, **short
    ).images[0]


def save_adapter(adapter, folder, half: bool = False):
    """The file of a subject adapter."""
    adapter.save(folder, half)
    return folder / ("ip_adapter.safetensors" if adapter.encoder.released else "subject.safetensors")


def lora_of(backbone) -> Lora:
    """The adapter of LoRA that `add_lora` gave a backbone's modules one by one."""
    adapter = object.__new__(Lora)
    adapter.backbone = backbone
    return adapter
