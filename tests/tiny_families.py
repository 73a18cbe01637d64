"""Tiny pipelines of today's flow models, with the true layouts and key names, from configurations alone."""

import sys

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from tiny import WORDS, flux, t5, tokenizer, woken_at_zero

SIGNS = [".", ",", ":", "\n", "'s", "'", "(", ")", "/", "-", ">", "<"]
TEMPLATE_WORDS = [
    "system",
    "user",
    "assistant",
    "Describe",
    "the",
    "image",
    "by",
    "detailing",
    "color",
    "shape",
    "size",
    "texture",
    "quantity",
    "text",
    "spatial",
    "relationships",
    "of",
    "objects",
    "and",
    "background",
    "You",
    "are",
    "an",
]
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
THINKING = ["<think>", "</think>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{{ message['content'][0]['text'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not "
    "enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
VOCABULARY = 256


def chat_tokenizer(ends: bool = False) -> PreTrainedTokenizerFast:
    """Splits words, signs and line ends, as the templates of the language models expect; with `ends` it adds
    start and end tokens, as T5's and Gemma's do."""
    listed = dict.fromkeys(["<pad>", "<start>", "<end>", "<unk>", *WORDS, *TEMPLATE_WORDS, *SIGNS])
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="<unk>"))
    pattern = Regex(r"'s|\w+|\n|[^\w\s]")
    core.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    if ends:
        core.post_processor = processors.TemplateProcessing(
            single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
        )
    special = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, **special, model_max_length=512, padding_side="right"
    )
    made.add_special_tokens({"additional_special_tokens": MARKS + THINKING})
    made.chat_template = CHAT
    return made


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def flow(**settings) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def vae(depth: int = 2) -> AutoencoderKL:
    """An autoencoder of factor 2 ** (depth - 1)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=(8,) * depth,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        shift_factor=0.1,
        scaling_factor=0.7,
    )


def flux2_vae() -> AutoencoderKLFlux2:
    made = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    made.bn.running_mean.copy_(torch.linspace(-0.3, 0.4, 16))
    made.bn.running_var.copy_(torch.linspace(0.5, 1.5, 16))
    return made


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.2, 0.8, 1.0, 0.9],
    )


def flux2_transformer(guidance: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        timestep_guidance_channels=32,
        guidance_embeds=guidance,
    )


def klein() -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=flow(use_dynamic_shifting=True, shift=3.0),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=27, **SIZES)),
        tokenizer=chat_tokenizer(),
        transformer=flux2_transformer(False),
    )


def flux2() -> Flux2Pipeline:
    text = {"model_type": "mistral", "num_hidden_layers": 30, **SIZES}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8, "head_dim": 8}
    return Flux2Pipeline(
        scheduler=flow(use_dynamic_shifting=True, shift=3.0),
        vae=flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(
            Mistral3Config(text_config=text, vision_config=vision, image_token_index=250)
        ),
        tokenizer=chat_tokenizer(),
        transformer=flux2_transformer(True),
    )


class ImageAndTextProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without its video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


# saved and loaded in its place; diffusers' imports may replace the module
ImageAndTextProcessor.__module__, ImageAndTextProcessor.__name__ = "transformers", "Qwen2VLProcessor"
sys.modules["transformers"].Qwen2VLProcessor = ImageAndTextProcessor


def qwen_image() -> QwenImagePipeline:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {"num_hidden_layers": 2, "rope_parameters": rope, **SIZES}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    tokenizer = chat_tokenizer()
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    marks = dict(zip(names, map(tokenizer.convert_tokens_to_ids, MARKS[2:]), strict=True))
    return QwenImagePipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
        ),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
    )


def qwen_image_edit() -> QwenImageEditPlusPipeline:
    """Its language model sees images of 2 x 2 tokens, whatever their size."""
    image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)
    processor = ImageAndTextProcessor(image_processor, chat_tokenizer())
    return QwenImageEditPlusPipeline(processor=processor, **qwen_image().components)


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 64, 64],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # uninitialised memory
        torch.nn.init.normal_(token, std=0.1)
    return ZImagePipeline(
        scheduler=flow(shift=3.0),
        vae=vae(),
        text_encoder=Qwen3Model(Qwen3Config(num_hidden_layers=3, **SIZES)),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
    )


def krea2() -> Krea2Pipeline:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {"num_hidden_layers": 3, "rope_parameters": rope, **SIZES}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return Krea2Pipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
        tokenizer=chat_tokenizer(),
        transformer=Krea2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
        ),
        text_encoder_select_layers=(1, 2, 3),
    )


def chroma() -> ChromaPipeline:
    t5 = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return ChromaPipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=T5EncoderModel(t5),
        tokenizer=chat_tokenizer(ends=True),
        transformer=ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
    )


def gemma(layers: int = 2) -> Gemma2Model:
    sizes = {**SIZES, "num_hidden_layers": layers, "query_pre_attn_scalar": 8}
    return Gemma2Model(Gemma2Config(**sizes))


def sana() -> SanaPipeline:
    blocks = {
        "encoder_block_types": ("ResBlock", "ResBlock"),
        "decoder_block_types": ("ResBlock", "ResBlock"),
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
    }
    return SanaPipeline(
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
        vae=AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=8, scaling_factor=0.7, **blocks
        ),
        text_encoder=gemma(),
        tokenizer=chat_tokenizer(ends=True),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=32,
            patch_size=1,
        ),
    )


def lumina2() -> Lumina2Pipeline:
    return Lumina2Pipeline(
        scheduler=flow(shift=6.0),
        vae=vae(4),
        text_encoder=gemma(3),
        tokenizer=chat_tokenizer(ends=True),
        transformer=Lumina2Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(512, 64, 64),
            cap_feat_dim=16,
        ),
    )


def hidream() -> HiDreamImagePipeline:
    clip = CLIPTextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        projection_dim=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return HiDreamImagePipeline(
        scheduler=flow(shift=3.0),
        vae=vae(),
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer(128),
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=tokenizer(128),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(128),
        text_encoder_4=LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES)),
        tokenizer_4=chat_tokenizer(ends=True),
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[32, 16],
            text_emb_dim=32,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=[0, 1],
        ),
    )


def kontext() -> FluxKontextPipeline:
    return FluxKontextPipeline(**flux().components)


FAMILIES = {
    "klein": klein,
    "flux2": flux2,
    "qwen_image": qwen_image,
    "qwen_image_edit": qwen_image_edit,
    "z_image": z_image,
    "krea2": krea2,
    "chroma": chroma,
    "sana": sana,
    "lumina2": lumina2,
    "hidream": hidream,
    "kontext": kontext,
}

EDIT = "qwen_image_edit"  # is always shown images, and encodes prompts together with them
OF_TEXT = [name for name in FAMILIES if name != EDIT]


def tiny_family(name: str):
    """The pipeline with the same random weights at every call, quiet and in evaluation mode."""
    torch.manual_seed(0)
    return woken_at_zero(FAMILIES[name]())
