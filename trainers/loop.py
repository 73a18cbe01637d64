"""The one training loop."""

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from customize import checkpoint
from customize.attention import use_xformers
from customize.batches import Batches
from customize.data import collate, to_device
from customize.errors import UserError
from customize.trainers.method import Method
from customize.trainers.references import Positions, References, collate_references
from customize.trainers.selection import Scorer
from customize.trainers.settings import TrainConfig, make_optimizer
from customize.trainers.sources import Streamed
from customize.trainers.state import latest_checkpoint, load_state, save_state
from customize.trainers.validation import fixed_randomness, sample, sheet, validation_loss


@dataclass
class Session:
    """A run in progress."""

    method: Method
    config: TrainConfig
    accelerator: Accelerator
    info: dict
    held_out: list[dict]
    scorer: Scorer | None
    trained: dict[str, torch.nn.Parameter]
    wrapped: torch.nn.Module  # the method as accelerate calls it
    parts: dict  # optimizer, schedule, ema, scaler and best: what resuming restores besides `trained`
    step: int = 0

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, what is trained holds its running average, if there is one."""
        if (ema := self.parts["ema"]) is None:
            yield
            return
        ema.store(self.trained.values())
        ema.copy_to(self.trained.values())
        try:
            yield
        finally:
            ema.restore(self.trained.values())

    def write(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            with self.averaged():
                info = self.info | {"step": self.step}
                method = self.method
                checkpoint.save(folder, method.backbone, method.tokens, info, self.config.export_kohya, method.adapter)

    def write_checkpoint(self) -> None:
        """Writes checkpoint-STEP, from which the run can be resumed, unless the last update spoilt the weights."""
        if not all(value.isfinite().all() for value in self.trained.values()):
            raise UserError(not_finite(self.step, self.output))
        target, main = self.output / f"checkpoint-{self.step}", self.accelerator.is_main_process
        with checkpoint.atomic_folder(target) if main else nullcontext(target) as folder:
            self.write(folder)
            save_state(folder, self.accelerator, self.step, self.trained, **self.parts)
        if main and self.config.checkpoints_total_limit:
            drop_old_checkpoints(self.output, self.config.checkpoints_total_limit)


def begin(
    method: Method, config: TrainConfig, accelerator: Accelerator, held_out: list[dict], scorer: Scorer | None, info: dict
) -> Session:
    """Makes optimizer, schedule and average, and restores them if the run is resumed."""
    method.train()
    if config.gradient_checkpointing:
        method.backbone.denoiser.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        enable_xformers(method)
    optimizer = make_optimizer(method, config, accelerator.num_processes)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    trained = method.trainable()
    ema = EMAModel(list(trained.values()), decay=config.ema_decay) if config.use_ema else None
    wrapped, optimizer = accelerator.prepare(method, optimizer)
    parts = {"optimizer": optimizer, "schedule": schedule, "ema": ema, "scaler": accelerator.scaler, "best": Best()}
    session = Session(method, config, accelerator, info, held_out, scorer, trained, wrapped, parts)
    session.step = resume(session)
    if ema:
        ema.to(accelerator.device)
    if config.report_to:
        accelerator.init_trackers("customize", config={k: str(v) for k, v in asdict(config).items()})
    return session


def enable_xformers(method: Method) -> None:
    try:
        use_xformers(method.backbone.denoiser)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        remedy = "pip install 'customize[xformers]' on a machine with a GPU, or leave the flag out"
        raise UserError(f"--enable_xformers_memory_efficient_attention: {reason}: {remedy}.") from error


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
    progress = {"initial": session.step, "total": config.max_train_steps, "disable": not accelerator.is_main_process}
    with interruption() as interrupted, tqdm(**progress, file=sys.stderr) as bar:
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
            if session.step % config.validation_steps == 0 or session.step == config.max_train_steps:
                validate(session, bar)
            stop = interrupted()
            if session.step % config.checkpointing_steps == 0 or stop:
                session.write_checkpoint()
            if stop:
                again = f"--resume_from_checkpoint latest --output_dir {session.output}"
                raise UserError(f"stopped at step {session.step}; go on with {again}.")
            if config.early_stopping_patience and best.since >= config.early_stopping_patience:
                what = f"validation {config.validation_metric}"
                bar.write(f"no better {what} for {best.since} validations: the best is in {session.output / 'best'}")
                break
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


def not_finite(step: int, output: Path) -> str:
    kept = latest_checkpoint(output)
    good = f"'{kept}' is the last good checkpoint" if kept else "no checkpoint was written yet"
    return (
        f"the loss is not finite at step {step}; {good}. Lower --learning_rate, or use --mixed_precision bf16 instead of fp16."
    )


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


class Best:
    """The lowest validation loss (or negative score) so far, and how many validations ago it was."""

    def __init__(self):
        self.loss, self.since = float("inf"), 0

    def add(self, loss: float) -> None:
        self.loss, self.since = (loss, 0) if loss < self.loss else (self.loss, self.since + 1)

    def state_dict(self):
        return {"loss": self.loss, "since": self.since}

    def load_state_dict(self, state):
        self.loss, self.since = state["loss"], state["since"]


def validate(session: Session, bar: tqdm) -> None:
    """Logs the validation loss, draws and rates the validation prompts, and writes best/ if it is the best step so far."""
    config, accelerator, best, step = session.config, session.accelerator, session.parts["best"], session.step
    with session.averaged(), accelerator.autocast():
        found = {}
        if session.held_out:
            found["validation_loss"] = validation_loss(session.method, session.held_out, config.seed)
            found |= diagnosis(session)
        if config.validation_prompt:
            found |= draw_validation(session)
    if not found:
        return
    accelerator.log(found, step)
    if accelerator.is_main_process:
        session.output.mkdir(parents=True, exist_ok=True)
        with open(session.output / "validation.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **found}) + "\n")
    decisive = -found["score"] if "score" in found else found["validation_loss"]
    best.add(decisive)
    values = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items() if "slot" not in name)
    bar.write(f"step {step}: {values}{' (best)' if best.since == 0 else ''}")
    if best.since == 0:
        session.write(session.output / "best")


def diagnosis(session: Session) -> dict[str, float]:
    """What the method says of itself, in evaluation mode and without touching training's generators."""
    method = session.method
    method.eval()
    with fixed_randomness(session.config.seed):
        found = method.diagnose(session.held_out, session.output / "samples", session.step)
    method.train()
    return found


def draw_validation(session: Session) -> dict[str, float]:
    """Draws the validation prompts on the first process, writes their sheet, and gives every process their score, if any."""
    config = session.config
    found: list[dict[str, float]] = [{}]
    if session.accelerator.is_main_process:
        resolution = session.method.backbone.resolution
        drawn = sample(session.method, config.validation_prompt, config.num_validation_images, resolution, config.seed)
        folder = session.output / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        sheet(drawn).save(folder / f"step-{session.step:06d}.png")
        if session.scorer:
            with torch.autocast(session.accelerator.device.type, enabled=False):  # scores do not depend on training's precision
                rated = session.scorer(drawn)
            found = [rated | {"score": rated["identity"] * rated["control"]}]
    return broadcast_object_list(found)[0]


def resume(session: Session) -> int:
    """Restores the checkpoint that `resume_from_checkpoint` names; returns its step, 0 for a fresh start."""
    config = session.config
    if not config.resume_from_checkpoint:
        return 0
    folder: Path | None = Path(config.resume_from_checkpoint)
    if config.resume_from_checkpoint == "latest":
        folder = latest_checkpoint(session.output)
    if folder is None:
        raise UserError(
            f"--resume_from_checkpoint latest: '{session.output}' holds no checkpoint; leave the flag out to start anew."
        )
    return load_state(folder, session.accelerator, session.trained, **session.parts)


def drop_old_checkpoints(output: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints."""
    found = [p for p in output.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    found.sort(key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)
    for folder in found[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


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
