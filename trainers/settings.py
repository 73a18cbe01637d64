"""What every run begins with: its base model, and settings that can be checked at once."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed

from customize import embedded
from customize.config import option
from customize.errors import UserError, first_line
from customize.trainers.methods.base import Method


@dataclass
class ModelConfig:
    """Which base model, and what is kept of its work."""

    pretrained_model_name_or_path: str = field(
        default=embedded.NAME, metadata={"help": "a diffusers folder, a hub id, or stickers (embedded)"}
    )
    revision: str = field(default="", metadata={"help": "revision of the model on the hub"})
    variant: str = field(default="", metadata={"help": "variant of the weight files, such as fp16"})
    cache_latents: bool = field(
        default=True, metadata={"help": "encode images and prompts once, then free the encoders"}
    )
    cache_dir: str = field(
        default="",
        metadata={"help": "keep the encoded images and prompts in this folder; empty: in memory"},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "upload the finished run"})
    hub_model_id: str = field(default="", metadata={"help": "the repository to upload to, as USER/NAME"})
    hub_private_repo: bool = field(
        default=True,
        metadata={"help": "upload to a private repository; --no_hub_private_repo makes a new one public"},
    )


Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]


@dataclass
class TrainConfig:
    output_dir: str = option("runs/out", "where the run is written")
    overwrite_output_dir: bool = option(False, "write over an earlier run in --output_dir")
    seed: int = option(
        0, "seed of data order, noise and times", least=0, most=4_000_000_000
    )  # numpy's take 32 bits
    train_batch_size: int = option(1, "images in a batch, on each device", least=1)
    gradient_accumulation_steps: int = option(1, "batches added up before the optimizer steps", least=1)
    max_train_steps: int = option(500, "optimizer steps", least=1)
    learning_rate: float = option(1e-4, "learning rate after warm-up", above=0)
    scale_lr: bool = option(False, "multiply the learning rate by devices, batch size and accumulation")
    lr_scheduler: Schedule = option("constant", "how the learning rate falls")
    lr_warmup_steps: int = option(0, "steps until the learning rate is reached", least=0)
    lr_num_cycles: int = option(1, "restarts of cosine_with_restarts", least=1)
    lr_power: float = option(1.0, "power of polynomial", least=0)
    adam_beta1: float = option(0.9, "AdamW's beta1", least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's beta2", least=0, below=1)
    adam_weight_decay: float = option(1e-2, "AdamW's weight decay", least=0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", above=0)
    use_8bit_adam: bool = option(False, "AdamW of bitsandbytes, which must be installed")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", "precision of the frozen model; trained tensors stay float32"
    )
    gradient_checkpointing: bool = option(False, "less memory for activations, more time")
    allow_tf32: bool = option(False, "faster float32 matrix products on NVIDIA GPUs")
    enable_xformers_memory_efficient_attention: bool = option(False, "xformers attention in the denoiser")
    use_ema: bool = option(False, "save and validate a running average of what is trained")
    ema_decay: float = option(0.999, "decay of that average", least=0, most=1)
    checkpointing_steps: int = option(500, "steps between checkpoints that can be resumed", least=1)
    checkpoints_total_limit: int = option(2, "checkpoints kept, 0 for all", least=0)
    resume_from_checkpoint: str = option("", "a checkpoint-N folder, or latest")
    validation_prompt: list[str] = field(
        default_factory=list, metadata={"help": "prompts drawn at every validation"}
    )
    num_validation_images: int = option(1, "images for each validation prompt", least=1)
    validation_steps: int = option(100, "steps between validations", least=1)
    validation_metric: Literal["loss", "score"] = option(
        "loss",
        "what best/ goes by: the loss on --holdout images, or likeness x obedience of the "
        "--validation_prompt images",
    )
    validation_clip: str = option(
        "openai/clip-vit-base-patch32", "CLIP for the score (not on stickers): hub id or folder"
    )
    validation_dino: str = option(
        "facebook/dino-vits16", "DINO for the score (not on stickers): hub id or folder"
    )
    early_stopping_patience: int = option(
        0, "stop after so many validations without a better --validation_metric; 0: never", least=0
    )
    report_to: str = option("", "tensorboard, wandb or another tracker of accelerate")
    export_kohya: bool = option(False, "also write the LoRA in kohya's layout")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Also seeds every process differently (but reproducibly), so that they do not draw the same noise."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 or config.allow_tf32
    if (
        AcceleratorState._shared_state.get("_mixed_precision", config.mixed_precision)
        != config.mixed_precision
    ):
        AcceleratorState._reset_state()  # an earlier run in this process, as the web page has them
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=config.report_to or None,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"
            ),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except (ValueError, ImportError) as error:
        raise UserError(
            f"--report_to or --mixed_precision cannot be had here: {first_line(error)}"
        ) from error
    set_seed(config.seed, device_specific=True)
    return accelerator


def make_optimizer(method: Method, config: TrainConfig, processes: int) -> torch.optim.Optimizer:
    lr = config.learning_rate
    if config.scale_lr:
        lr *= processes * config.train_batch_size * config.gradient_accumulation_steps
    options: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(method.parameter_groups(lr), **options, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.") from None
    return AdamW8bit(method.parameter_groups(lr), **options)


def check_settings(model: ModelConfig, data: Any, settings: TrainConfig) -> None:
    if model.push_to_hub and not model.hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id USER/NAME.")
    if settings.validation_metric == "score" and not settings.validation_prompt:
        raise UserError(
            "--validation_metric score needs --validation_prompt, prompts of the subject to draw and rate."
        )
    if settings.early_stopping_patience and settings.validation_metric == "loss" and not data.holdout:
        raise UserError(
            "--early_stopping_patience needs --holdout N, images kept from training for the validation loss."
        )
