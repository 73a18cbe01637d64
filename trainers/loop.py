"""The one training loop."""

import sys
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from tqdm import tqdm

from customize.data.dataset import to_device
from customize.data.training_data import TrainingData
from customize.errors import Stopped, UserError
from customize.trainers.interruption import Unfailing, interruption
from customize.trainers.methods.base import Method
from customize.trainers.progress import Progress
from customize.trainers.scorers import Scorer
from customize.trainers.session import Session, begin, not_finite
from customize.trainers.settings import TrainConfig
from customize.trainers.validation import say, validate


def train(
    method: Method,
    data: TrainingData,
    config: TrainConfig,
    accelerator: Accelerator,
    info: dict | None = None,
    scorer: Scorer | None = None,
) -> int:
    """Minimises the sum of `method(batch)` and writes the run folder; returns the last step.

    `scorer` rates the validation images if best/ is to go by them. Stops early by
    `early_stopping_patience`, at Ctrl-C after saving, and with a UserError when the loss is no longer
    finite.
    """
    session = begin(method, config, accelerator, data.held_out, scorer, info or {})
    schedule, ema, best = (session.train_state[name] for name in ("schedule", "ema", "best"))
    used = session.step * config.gradient_accumulation_steps
    place = accelerator.process_index, accelerator.num_processes
    batches = iter(data.batches(used, config.train_batch_size, config.seed, *place))
    progress = {
        "initial": session.step,
        "total": config.max_train_steps,
        "disable": not accelerator.is_main_process,
        "file": Unfailing(sys.stderr),
    }
    done = False
    log = Progress(
        session.output, session.info.get("method", ""), config.max_train_steps, accelerator.is_main_process
    )
    with interruption() as interrupted, tqdm(**progress) as bar, log:
        while session.step < config.max_train_steps:
            method.on_step(session.step, config.max_train_steps)
            losses = accumulate_gradients(session, batches)
            method.after_step()
            schedule.step()
            if ema:
                ema.step(session.trained.values())
            session.step += 1
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
            log.add(session.step, losses)
            accelerator.log(losses | {"lr": schedule.get_last_lr()[0]}, session.step)
            if done := session.step == config.max_train_steps:
                session.write(session.output)  # before anything that the last validation may meet
            if session.step % config.validation_steps == 0 or done:
                validate(session, bar)
                log.show(session.output / "samples" / f"step-{session.step:06d}.png")
            stop = stops(accelerator, interrupted()) and not done
            if session.step % config.checkpointing_steps == 0 or stop:
                session.write_checkpoint()
            if stop:
                end(accelerator)
                again = f"--resume_from_checkpoint latest --output_dir {session.output}"
                raise Stopped(f"stopped at step {session.step}; go on with {again}.")
            if config.early_stopping_patience and best.since >= config.early_stopping_patience:
                what = f"validation {config.validation_metric}"
                say(
                    bar,
                    f"no better {what} for {best.since} validations: see {session.output / 'best'}",
                )
                break
    if not done:
        session.write(session.output)
    end(accelerator)
    return session.step


def end(accelerator: Accelerator) -> None:
    """Ends the run on every process."""
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        # gloo's threads need the interpreter to let go of the last gathered tensors; the process group's
        # destructor waits for
        # them and does not yield it (a deadlock in about one run of ten): let them go first
        time.sleep(0.5)
    accelerator.end_training()


def accumulate_gradients(session: Session, batches: Iterator[dict]) -> dict[str, float]:
    """One optimizer step over `gradient_accumulation_steps` batches; returns each term's mean."""
    accelerator, optimizer, count = (
        session.accelerator,
        session.train_state["optimizer"],
        session.config.gradient_accumulation_steps,
    )
    sums: dict[str, float] = {}
    for _ in range(count):
        batch = to_device(next(batches), accelerator.device)
        with accelerator.accumulate(session.wrapped):
            losses = session.wrapped(batch)
            check_losses(losses)
            total = torch.stack([value.float() for value in losses.values()]).sum()
            if not total.isfinite():
                raise UserError(not_finite(session.step, session.output))
            accelerator.backward(total)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(list(session.trained.values()), session.config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item() / count
    return sums


def check_losses(losses: dict[str, torch.Tensor]) -> None:
    """UserError for a term that is not a tensor of one number."""
    for name, value in losses.items():
        if not isinstance(value, torch.Tensor) or value.ndim:
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(
                f"the loss '{name}' must be a tensor of one number, not {found}: end it with .mean()."
            )


def stops(accelerator: Accelerator, asked: bool) -> bool:
    """Whether any process was asked to stop: all of them must save the same step."""
    if accelerator.num_processes == 1:
        return asked
    if asked:
        accelerator.set_trigger()
    return accelerator.check_trigger()
