"""Settings of every run: base model and training."""

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed

from customize import embedded
from customize.backbones.quantize import Quantization
from customize.config import option
from customize.errors import UserError, first_line, shortened
from customize.trainers.methods.base import Method


@dataclass
class ModelConfig:
    """The base model, caching and upload."""

    pretrained_model_name_or_path: str = option(
        embedded.NAME,
        "base model: a diffusers folder, hub id or .safetensors file, or stickers (embedded in the toolkit)",
        essential=True,
    )
    single_file_config: str = option(
        "",
        "for a base model in one file: the diffusers folder or hub id of the same kind of model, which says "
        "how it is built and gives what the file lacks, such as text encoders; empty: as diffusers knows it",
    )
    pretrained_vae_model_name_or_path: str = option(
        "", "autoencoder to use instead of the base model's: a folder or a hub id"
    )
    revision: str = option("", "revision of the base model on the hub")
    variant: str = option("", "variant of the base model's weight files, such as fp16")
    guidance_scale: float = option(
        1.0, "guidance that a guidance-distilled model (Flux.1 dev, Flux.2 dev) is given in training", least=0
    )
    max_sequence_length: int = option(
        0,
        "tokens of a prompt that T5 or a language model reads (SD 3, Flux and later); 0: as the model's "
        "pipeline",
        least=0,
        most=512,
    )
    timestep_sampling: Literal["auto", "uniform", "cubic", "logit_normal", "shifted"] = option(
        "auto",
        "how times are drawn: uniform; cubic, mostly noisy, where an image's content is decided; "
        "logit_normal, more in the middle; shifted, uniform under the shift that a flow model (SD 3, Flux "
        "and later) draws images with; auto: as the official script of the model does",
    )
    timestep_shift: float = option(
        0.0,
        "shift s of the times of flow models, t -> s t / (1 + (s - 1) t); above 1 it means more noise; 0: as "
        "the model's scheduler says",
        least=0,
    )
    assistant_lora: str = option(
        "",
        "LoRA, a run or a file, that undoes a few-step model's distillation while it is trained; images are "
        "drawn without it, and it is not part of what is saved; empty: none",
    )
    quantize: Quantization = option(
        "none",
        "how the frozen weights of the denoiser's attention and feed-forward layers are held in memory: "
        "none, as --mixed_precision says; int8 or fp8, 1 byte each; nf4, half a byte. What is saved works "
        "with the base model as it is",
    )
    quantize_text_encoder: Quantization = option(
        "none", "how the frozen weights of the text encoders' layers are held in memory: none, int8, fp8, nf4"
    )
    cache_latents: bool = option(True, "encode images and prompts once, then free the encoders")
    cache_dir: str = option("", "folder that keeps encoded images and prompts for later runs; empty: none")
    push_to_hub: bool = option(False, "upload the finished run to the Hugging Face Hub")
    hub_model_id: str = option("", "repository on the hub to upload to, as USER/NAME")
    hub_private_repo: bool = option(
        True, "upload to a private repository; --no_hub_private_repo makes a new one public"
    )


Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
]

OptimizerName = Literal["adamw", "adamw8bit", "prodigy", "adafactor", "lion", "schedule_free_adamw"]


@dataclass
class TrainConfig:
    """How a run is trained, and where it is written."""

    output_dir: str = option("runs/out", "folder that the run is written to", essential=True)
    overwrite_output_dir: bool = option(False, "replace an earlier run in --output_dir")
    seed: int = option(
        0, "seed of data order, noise and times", least=0, most=4_000_000_000
    )  # numpy's take 32 bits
    train_batch_size: int = option(1, "images in a batch, on each device", least=1, essential=True)
    gradient_accumulation_steps: int = option(1, "batches added up before each optimizer step", least=1)
    max_train_steps: int = option(500, "optimizer steps", least=1, essential=True)
    num_train_epochs: int = option(
        0,
        "times that every image is shown, instead of --max_train_steps; in --concepts_list, those of the "
        "smallest weight; 0: go by steps",
        least=0,
    )
    learning_rate: float = option(1e-4, "learning rate after warm-up", above=0, essential=True)
    scale_lr: bool = option(False, "multiply the learning rate by devices, batch size and accumulation")
    lr_scheduler: Schedule = option("constant", "how the learning rate changes after warm-up")
    lr_warmup_steps: int = option(0, "steps in which the learning rate rises from 0", least=0)
    lr_num_cycles: int = option(1, "restarts of the schedule cosine_with_restarts", least=1)
    lr_power: float = option(1.0, "power of the schedule polynomial", least=0)
    optimizer: OptimizerName = option(
        "adamw",
        "what updates the trained weights: adamw; adamw8bit, with a state of 8 bits; prodigy, which finds "
        "its learning rate; adafactor, which keeps almost no state; lion, which keeps half of it; "
        "schedule_free_adamw, which averages its steps instead of following a schedule",
    )
    adam_beta1: float | None = option(
        None,
        "decay of the optimizer's average of gradients; none: its own, 0.9 (adafactor: no average)",
        least=0,
        below=1,
    )
    adam_beta2: float | None = option(
        None,
        "decay of the optimizer's average of squared gradients; none: its own, 0.999 (lion: 0.99)",
        least=0,
        below=1,
    )
    adam_weight_decay: float | None = option(
        None, "weight decay of the optimizer; none: its own, 0.01", least=0
    )
    adam_epsilon: float | None = option(
        None, "number that keeps the optimizer from dividing by zero; none: its own, 1e-8", above=0
    )
    use_8bit_adam: bool = option(False, "AdamW with a state of 8 bits, as --optimizer adamw8bit")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = option(
        "no", "precision of the frozen model; trained tensors stay float32", essential=True
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time", essential=True
    )
    allow_tf32: bool = option(False, "faster float32 matrix products on NVIDIA GPUs")
    enable_xformers_memory_efficient_attention: bool = option(False, "xformers attention in the denoiser")
    use_ema: bool = option(False, "save and validate a running average of the trained weights")
    ema_decay: float = option(0.999, "decay of the running average of --use_ema", least=0, most=1)
    checkpointing_steps: int = option(500, "steps between checkpoints that can be resumed", least=1)
    checkpoints_total_limit: int = option(2, "checkpoints kept, 0 for all", least=0)
    resume_from_checkpoint: str = option(
        "", "go on from a checkpoint-N folder, or from the latest one of --output_dir: latest"
    )
    validation_prompt: list[str] = option([], "prompts drawn at every validation", essential=True)
    num_validation_images: int = option(1, "images for each validation prompt", least=1)
    validation_inference_steps: int = option(
        25, "denoising steps of each validation image; distilled models need fewer", least=1
    )
    validation_guidance_scale: float | None = option(
        None, "guidance of validation images; none leaves it to the model's pipeline", least=0
    )
    validation_steps: int = option(100, "steps between validations", least=1)
    validation_metric: Literal["loss", "score"] = option(
        "loss",
        "what best/ goes by: the loss on --holdout images, or subject fidelity times prompt fidelity of the "
        "--validation_prompt images",
    )
    validation_clip: str = option(
        "openai/clip-vit-base-patch32",
        "CLIP that measures prompt fidelity for --validation_metric score: hub id or folder",
    )
    validation_dino: str = option(
        "facebook/dino-vits16",
        "DINO that measures subject fidelity for --validation_metric score: hub id or folder",
    )
    early_stopping_patience: int = option(
        0, "stop after this many validations without a better --validation_metric; 0: never", least=0
    )
    report_to: str = option("", "tracker of accelerate that gets the losses, such as tensorboard or wandb")
    export_kohya: bool = option(False, "also write the LoRA in kohya's layout, for A1111 and ComfyUI")
    dry_run: bool = option(
        False, "check settings and data, print the memory that the run would take, and write nothing"
    )
    memory_limit: str = option(
        "",
        "memory of a device, such as 12GB (of 10^9 bytes) or 12GiB: --dry_run says which settings bring a "
        "run below it; empty: none",
    )


UNITS = {"MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30}


def size_of(text: str) -> int:
    """Bytes of a size such as 12GB or 12 GiB; UserError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,6}(?:\.\d+)?)\s*([MG]i?B)\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if not size:
        raise UserError(f"--memory_limit: '{shortened(text)}' is no size; write it as 12GB, 12GiB or 900MB.")
    return size


def is_first_process() -> bool:
    """Whether this process writes and prints; known before accelerate is started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


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


def check_settings(
    method: type[Method], model_config: ModelConfig, data_config: Any, train_config: TrainConfig
) -> None:
    """UserError for settings of a run that do not go together."""
    if method.needs_captions and data_config.caption_dropout:
        raise UserError(
            "--caption_dropout: this method learns a word, which a dropped caption does not say; leave it "
            "out."
        )
    given = (name for name in ("holdout", "caption_dropout") if getattr(data_config, name))
    if not method.denoises and (name := next(given, "")):
        raise UserError(f"--{name}: this method has no diffusion loss; leave it out.")
    if not method.denoises and train_config.validation_metric == "score":
        raise UserError("--validation_metric score rates runs of one subject; leave it out here.")
    if model_config.push_to_hub and not model_config.hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id USER/NAME.")
    if train_config.memory_limit:
        size_of(train_config.memory_limit)
        if not train_config.dry_run:
            raise UserError("--memory_limit is for --dry_run, which compares with it; add that one.")
    scored = train_config.validation_metric == "score"
    if scored and not train_config.validation_prompt:
        raise UserError(
            "--validation_metric score needs --validation_prompt, prompts of the subject to draw and rate."
        )
    if train_config.early_stopping_patience and not scored and not data_config.holdout:
        raise UserError(
            "--early_stopping_patience needs --holdout N, images kept from training for the validation loss."
        )
