"""The one training loop."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from customize.batches import Batches
from customize.data import collate, to_device
from customize.errors import UserError
from customize.trainers.method import Method
from customize.trainers.references import Positions, References, collate_references
from customize.trainers.selection import Scorer
from customize.trainers.session import Session, begin, not_finite
from customize.trainers.settings import TrainConfig
from customize.trainers.streams import Streamed
from customize.trainers.validation import say, validate


def train(
    method: Method,
    dataset,
    config: TrainConfig,
    accelerator: Accelerator,
    held_out: list[dict] | None = None,
    info: dict | None = None,
    scorer: Scorer | None = None,
) -> int:
    """Minimises the sum of `method(batch)` and writes the run folder; returns the last step.

    `dataset` gives items for the keys of `Batches`; `held_out` are collated batches for the validation loss, `scorer` rates the
    validation pictures if best/ is to go by them. Stops early by `early_stopping_patience`, at Ctrl-C after saving, and with a
    UserError when the loss is no longer finite.
    """
    session = begin(method, config, accelerator, held_out or [], scorer, info or {})
    schedule, ema, best = (session.parts[name] for name in ("schedule", "ema", "best"))
    batches = iter(make_loader(dataset, config, accelerator, session.step))
    progress = {
        "initial": session.step,
        "total": config.max_train_steps,
        "disable": not accelerator.is_main_process,
        "file": Unfailing(sys.stderr),
    }
    done = False
    with interruption() as interrupted, tqdm(**progress) as bar:
        while session.step < config.max_train_steps:
            method.on_step(session.step, config.max_train_steps)
            losses = accumulate_gradients(session, batches)
            schedule.step()
            if ema:
                ema.step(session.trained.values())
            session.step += 1
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
            accelerator.log(losses | {"lr": schedule.get_last_lr()[0]}, session.step)
            if done := session.step == config.max_train_steps:
                session.write(session.output)  # before anything that the last validation may meet
            if session.step % config.validation_steps == 0 or done:
                validate(session, bar)
            stop = stops(accelerator, interrupted()) and not done
            if session.step % config.checkpointing_steps == 0 or stop:
                session.write_checkpoint()
            if stop:
                end(accelerator)
                again = f"--resume_from_checkpoint latest --output_dir {session.output}"
                raise UserError(f"stopped at step {session.step}; go on with {again}.")
            if config.early_stopping_patience and best.since >= config.early_stopping_patience:
                what = f"validation {config.validation_metric}"
                say(bar, f"no better {what} for {best.since} validations: the best is in {session.output / 'best'}")
                break
    if not done:
        session.write(session.output)
    end(accelerator)
    return session.step


def end(accelerator: Accelerator) -> None:
    """Ends the run on every process."""
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        # gloo's threads need the interpreter to let go of the last gathered tensors; the process group's destructor waits for
        # them and does not yield it (a deadlock in about one run of ten): let them go first
        time.sleep(0.5)
    accelerator.end_training()


def accumulate_gradients(session: Session, batches: Iterator[dict]) -> dict[str, float]:
    """One optimizer step over `gradient_accumulation_steps` batches; returns each term's mean."""
    accelerator, optimizer, count = session.accelerator, session.parts["optimizer"], session.config.gradient_accumulation_steps
    sums: dict[str, float] = {}
    for _ in range(count):
        batch = to_device(next(batches), accelerator.device)
        with accelerator.accumulate(session.wrapped):
            losses = session.wrapped(batch)
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


def make_loader(dataset, config: TrainConfig, accelerator: Accelerator, step: int) -> DataLoader:
    """Endless batches, beginning with the one that step `step` would have taken."""
    start, size = step * config.gradient_accumulation_steps, config.train_batch_size
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    # a generator of its own: without one, starting the loader would draw from training's generator
    options: dict = {
        "num_workers": dataset.config.dataloader_num_workers,
        "generator": torch.Generator().manual_seed(config.seed),
    }
    if isinstance(dataset, Streamed):
        options["num_workers"] = min(options["num_workers"], 1)  # several would each read the stream from its beginning
        return DataLoader(dataset.after(start * size), batch_size=size, collate_fn=collate_references, **options)
    if isinstance(dataset, References):
        positions = Positions(size, start, **place)
        return DataLoader(dataset, batch_sampler=positions, collate_fn=collate_references, **options)
    batches = Batches(dataset, size, config.seed, start=start, **place, flip=dataset.config.random_flip)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **options)


STOPPING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
TOGETHER = 2.0  # seconds in which several signals are one: a launcher passes on what the terminal has sent already


@contextmanager
def interruption():
    """Gives a function that says whether the run was asked to stop, by Ctrl-C (SIGINT), a scheduler (SIGTERM) or a closing
    terminal (SIGHUP): the step is finished and saved first; a second signal stops at once."""
    pressed: list[float] = []
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1

    def handle(signum, frame):
        if pressed and (alone or time.time() - pressed[0] > TOGETHER):
            raise KeyboardInterrupt
        pressed.append(time.time())
        with suppress(OSError):  # not print: it may be interrupted itself
            os.write(2, b"\nfinishing this step and saving; press Ctrl-C again to stop at once\n")

    # nohup has SIGHUP ignored, and means it
    wanted = [number for number in STOPPING if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
    try:
        before = {number: signal.signal(number, handle) for number in wanted}
    except ValueError:  # not in the main thread, as under the web page
        yield lambda: False
        return
    try:
        yield lambda: bool(pressed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Unfailing:
    """A stream whose words go nowhere once nobody listens: a closed terminal, or a `tee` that Ctrl-C has ended."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


def stops(accelerator: Accelerator, asked: bool) -> bool:
    """Whether any process was asked to stop: all of them must save the same step."""
    if accelerator.num_processes == 1:
        return asked
    if asked:
        accelerator.set_trigger()
    return accelerator.check_trigger()
