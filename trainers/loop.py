"""The one training loop."""

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from customize import checkpoint
from customize.batches import Batches
from customize.data import collate
from customize.errors import UserError
from customize.trainers.method import Method
from customize.trainers.state import latest_checkpoint, load_state, save_state
from customize.trainers.validation import sample, sheet, validation_loss


def _flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    output_dir: str = _flag("runs/out", "where the run is written")
    seed: int = _flag(0, "seed of data order, noise and times")
    train_batch_size: int = _flag(1, "pictures in a batch, on each device")
    gradient_accumulation_steps: int = _flag(1, "batches added up before the optimizer steps")
    max_train_steps: int = _flag(500, "optimizer steps")
    learning_rate: float = _flag(1e-4, "learning rate after warm-up")
    scale_lr: bool = _flag(False, "multiply the learning rate by devices, batch size and accumulation")
    lr_scheduler: str = _flag("constant", "linear, cosine, cosine_with_restarts, polynomial, constant or constant_with_warmup")
    lr_warmup_steps: int = _flag(0, "steps until the learning rate is reached")
    lr_num_cycles: int = _flag(1, "restarts of cosine_with_restarts")
    lr_power: float = _flag(1.0, "power of polynomial")
    adam_beta1: float = _flag(0.9, "AdamW's beta1")
    adam_beta2: float = _flag(0.999, "AdamW's beta2")
    adam_weight_decay: float = _flag(1e-2, "AdamW's weight decay")
    adam_epsilon: float = _flag(1e-8, "AdamW's epsilon")
    use_8bit_adam: bool = _flag(False, "AdamW of bitsandbytes, which must be installed")
    max_grad_norm: float = _flag(1.0, "gradients are clipped to this norm")
    mixed_precision: Literal["no", "fp16", "bf16"] = _flag("no", "precision of the frozen model; trained tensors stay float32")
    gradient_checkpointing: bool = _flag(False, "less memory for activations, more time")
    allow_tf32: bool = _flag(False, "faster float32 matrix products on NVIDIA GPUs")
    enable_xformers_memory_efficient_attention: bool = _flag(False, "xformers attention in the denoiser")
    use_ema: bool = _flag(False, "save and validate a running average of what is trained")
    ema_decay: float = _flag(0.999, "decay of that average")
    checkpointing_steps: int = _flag(500, "steps between checkpoints that can be resumed")
    checkpoints_total_limit: int = _flag(2, "checkpoints kept, 0 for all")
    resume_from_checkpoint: str = _flag("", "a checkpoint-N folder, or latest")
    validation_prompt: list[str] = field(default_factory=list, metadata={"help": "prompts drawn at every validation"})
    num_validation_images: int = _flag(1, "pictures for each validation prompt")
    validation_steps: int = _flag(100, "steps between validations")
    early_stopping_patience: int = _flag(
        0, "stop after so many validations without a better validation loss (needs --holdout); 0: never"
    )
    report_to: str = _flag("", "tensorboard, wandb or another tracker of accelerate")
    export_kohya: bool = _flag(False, "also write the LoRA in kohya's layout")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Also seeds every process differently (but reproducibly), so that they do not draw the same noise."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 or config.allow_tf32
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to or None,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_seed(config.seed, device_specific=True)
    return accelerator


def make_optimizer(method: Method, config: TrainConfig, processes: int) -> torch.optim.Optimizer:
    lr = config.learning_rate
    if config.scale_lr:
        lr *= processes * config.train_batch_size * config.gradient_accumulation_steps
    options = {
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


def train(
    method: Method,
    dataset,
    config: TrainConfig,
    accelerator: Accelerator,
    held_out: list[dict] | None = None,
    info: dict | None = None,
):
    """Minimises the sum of `method(batch)` and writes the run folder; returns the last step.

    `dataset` gives items for the keys of `Batches`; `held_out` are collated batches for the validation loss. Stops early by
    `early_stopping_patience`, at Ctrl-C after saving, and with a UserError when the loss is no longer finite.
    """
    output, info = Path(config.output_dir), info or {}
    method.train()
    trained = method.trainable()
    if config.gradient_checkpointing:
        method.backbone.denoiser.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        method.backbone.denoiser.enable_xformers_memory_efficient_attention()
    optimizer = make_optimizer(method, config, accelerator.num_processes)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    ema = EMAModel(list(trained.values()), decay=config.ema_decay) if config.use_ema else None
    wrapped, optimizer = accelerator.prepare(method, optimizer)
    if ema:
        ema.to(accelerator.device)
    parts = {"optimizer": optimizer, "schedule": schedule, "ema": ema, "scaler": accelerator.scaler, "best": (best := Best())}
    step = resume(config, accelerator, trained, parts)
    loader = make_loader(dataset, config, accelerator, step)
    if config.report_to:
        accelerator.init_trackers("customize", config={k: str(v) for k, v in asdict(config).items()})

    def write(folder: Path, resumable: bool = False):
        with averaged(ema, trained):
            if accelerator.is_main_process:
                checkpoint.save(folder, method.backbone, method.tokens, info | {"step": step}, config.export_kohya)
        if resumable:
            save_state(folder, accelerator, step, trained, **parts)

    def write_checkpoint():
        with checkpoint.atomic_folder(output / f"checkpoint-{step}") if accelerator.is_main_process else _no_folder() as folder:
            write(folder, resumable=True)
        if accelerator.is_main_process:
            drop_old_checkpoints(output, config.checkpoints_total_limit)

    bar = tqdm(total=config.max_train_steps, initial=step, disable=not accelerator.is_main_process, file=sys.stderr)
    batches = iter(loader)
    with interruption() as interrupted:
        while step < config.max_train_steps:
            method.on_step(step, config.max_train_steps)
            losses = accumulate_gradients(accelerator, wrapped, batches, optimizer, trained, config, step)
            schedule.step()
            if ema:
                ema.step(trained.values())
            step += 1
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
            accelerator.log(losses | {"lr": schedule.get_last_lr()[0]}, step)
            last = step == config.max_train_steps
            if (step % config.validation_steps == 0 or last) and (held_out or config.validation_prompt):
                with averaged(ema, trained):
                    better = validate(method, held_out, config, accelerator, step, best, bar)
                if better:
                    write(output / "best")
            if step % config.checkpointing_steps == 0 or interrupted():
                write_checkpoint()
            if interrupted():
                raise UserError(f"stopped at step {step}; go on with --resume_from_checkpoint latest --output_dir {output}.")
            if config.early_stopping_patience and best.since >= config.early_stopping_patience:
                bar.write(f"no better validation loss for {best.since} validations: stopped, the best is in {output / 'best'}")
                break
    bar.close()
    write(output)
    accelerator.end_training()
    return step


def accumulate_gradients(accelerator, wrapped, batches, optimizer, trained, config: TrainConfig, step: int) -> dict[str, float]:
    """One optimizer step over `gradient_accumulation_steps` batches; returns each term's mean."""
    sums: dict[str, float] = {}
    for _ in range(config.gradient_accumulation_steps):
        batch = to_device(next(batches), accelerator.device)
        with accelerator.accumulate(wrapped):
            losses = wrapped(batch)
            total = torch.stack([value.float() for value in losses.values()]).sum()
            if not torch.isfinite(total):
                raise UserError(not_finite(step, Path(config.output_dir)))
            accelerator.backward(total)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(list(trained.values()), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item() / config.gradient_accumulation_steps
    return sums


def not_finite(step: int, output: Path) -> str:
    kept = latest_checkpoint(output)
    good = f"'{kept}' is the last good checkpoint" if kept else "no checkpoint was written yet"
    return (
        f"the loss is not finite at step {step}; {good}. Lower --learning_rate, or use --mixed_precision bf16 instead of fp16."
    )


def make_loader(dataset, config: TrainConfig, accelerator: Accelerator, step: int) -> DataLoader:
    """Endless batches, beginning with the one that step `step` would have taken."""
    batches = Batches(
        dataset,
        config.train_batch_size,
        config.seed,
        start=step * config.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        flip=dataset.config.random_flip,
    )
    # a generator of its own: without one, starting the loader would draw from training's generator
    options = {"num_workers": dataset.config.dataloader_num_workers, "generator": torch.Generator().manual_seed(config.seed)}
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **options)


def to_device(batch: dict, device: torch.device) -> dict:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }


class Best:
    """The best validation loss so far, and how many validations ago it was."""

    def __init__(self):
        self.loss, self.since = float("inf"), 0

    def improves(self, loss: float) -> bool:
        self.loss, self.since = (loss, 0) if loss < self.loss else (self.loss, self.since + 1)
        return self.since == 0

    def state_dict(self):
        return {"loss": self.loss, "since": self.since}

    def load_state_dict(self, state):
        self.loss, self.since = state["loss"], state["since"]


def validate(method, held_out, config: TrainConfig, accelerator, step: int, best: Best, bar) -> bool:
    """Logs the validation loss and draws the validation prompts; returns whether the loss is the lowest so far."""
    better = False
    with accelerator.autocast():
        if held_out:
            loss = validation_loss(method, held_out, config.seed)
            better = best.improves(loss)
            accelerator.log({"validation_loss": loss}, step)
            bar.write(f"step {step}: validation loss {loss:.4f}{' (best)' if better else ''}")
        if config.validation_prompt and accelerator.is_main_process:
            pictures = sample(
                method, config.validation_prompt, config.num_validation_images, method.backbone.resolution, config.seed
            )
            folder = Path(config.output_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            sheet(pictures).save(folder / f"step-{step:06d}.png")
    return better


@contextmanager
def averaged(ema: EMAModel | None, trained: dict) -> Iterator[None]:
    """Inside, what is trained holds its running average."""
    if ema is None:
        yield
        return
    ema.store(trained.values())
    ema.copy_to(trained.values())
    try:
        yield
    finally:
        ema.restore(trained.values())


def resume(config: TrainConfig, accelerator, trained, parts) -> int:
    if not config.resume_from_checkpoint:
        return 0
    folder = Path(config.resume_from_checkpoint)
    if config.resume_from_checkpoint == "latest":
        found = latest_checkpoint(Path(config.output_dir))
        if found is None:
            raise UserError(
                f"--resume_from_checkpoint latest: '{config.output_dir}' holds no checkpoint; leave the flag out to start anew."
            )
        folder = found
    return load_state(folder, accelerator, trained, **parts)


def drop_old_checkpoints(output: Path, limit: int) -> None:
    found = sorted(output.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]) if p.name[11:].isdigit() else -1)
    for folder in found[:-limit] if limit else []:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _no_folder():
    """Stands for the checkpoint folder on processes that do not write."""
    yield Path()


@contextmanager
def interruption():
    """Gives a function that says whether Ctrl-C was pressed: the step is finished and saved first; a second is immediate."""
    pressed: list[float] = []

    def handle(signum, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(time.time())
        print("\nfinishing this step and saving; press Ctrl-C again to stop at once", file=sys.stderr)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread, as under the web page
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
