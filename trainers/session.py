"""A run in progress: what it trains, how it starts or resumes, and its files."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from customize.adapters.attention import use_xformers
from customize.adapters.base import Adapter
from customize.adapters.kohya import KohyaLora
from customize.adapters.merging import FoldedLora
from customize.backbones.quantize import quantized_names
from customize.errors import UserError, first_line
from customize.files import atomic_folder
from customize.runs import checkpoint
from customize.runs.folder import LOGS
from customize.runs.privacy import without_places
from customize.trainers.claim import drop_old_checkpoints, forget_later, resumed_folder
from customize.trainers.methods.base import Method
from customize.trainers.optimizers import at_average, make_optimizer
from customize.trainers.resume import good_checkpoint, load_state, save_state
from customize.trainers.scorers import Scorer
from customize.trainers.settings import TrainConfig


class Best:
    """The lowest validation loss (or negative score) so far, and how many validations ago it was."""

    def __init__(self):
        self.loss, self.since = float("inf"), 0

    def add(self, loss: float) -> None:
        self.loss, self.since = (loss, 0) if loss < self.loss else (self.loss, self.since + 1)

    def state_dict(self) -> dict[str, float]:
        return {"loss": self.loss, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.since = state["loss"], state["since"]


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
    # optimizer, schedule, ema, scaler and best: what resuming restores besides `trained`
    train_state: dict
    exports: list[Adapter]  # files for other tools
    step: int = 0

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the trained parameters hold their running average, or that of a schedule-free
        optimizer, if there is one."""
        if (ema := self.train_state["ema"]) is None:
            with at_average(self.train_state["optimizer"]):
                yield
            return
        ema.store(self.trained.values())
        ema.copy_to(self.trained.values())
        try:
            yield
        finally:
            ema.restore(self.trained.values())

    def write(self, folder: Path) -> None:
        """Writes the adapters into `folder`; UserError if the last update made values that are not
        finite."""
        if not all(value.isfinite().all() for value in self.trained.values()):
            raise UserError(not_finite(self.step, self.output))
        if self.accelerator.is_main_process:
            with self.averaged():
                checkpoint.save(
                    folder, [*self.method.adapters, *self.exports], self.info | {"step": self.step}
                )

    def whole(self, name: str) -> AbstractContextManager[Path]:
        """A folder of the output that appears only when it is complete; only the first process writes it."""
        target = self.output / name
        return atomic_folder(target) if self.accelerator.is_main_process else nullcontext(target)

    def write_best(self) -> None:
        with self.whole("best") as folder:
            self.write(folder)

    def write_checkpoint(self) -> None:
        """Writes checkpoint-STEP, from which the run can be resumed."""
        main = self.accelerator.is_main_process
        with self.whole(f"checkpoint-{self.step}") as folder:
            self.write(folder)
            save_state(folder, self.accelerator, self.step, self.trained, **self.train_state)
        if main and self.config.checkpoints_total_limit:
            drop_old_checkpoints(self.output, self.config.checkpoints_total_limit)


def begin(
    method: Method,
    config: TrainConfig,
    accelerator: Accelerator,
    held_out: list[dict],
    scorer: Scorer | None,
    info: dict,
) -> Session:
    """Makes optimizer, schedule and average, and restores them if the run is resumed."""
    method.train()
    if config.gradient_checkpointing:
        method.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        enable_xformers(method)
    optimizer = make_optimizer(method, config, accelerator.num_processes)
    warms_up = config.lr_warmup_steps and config.lr_scheduler == "constant"
    schedule = get_scheduler(
        "constant_with_warmup" if warms_up else config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    trained = method.trainable()
    ema = EMAModel(list(trained.values()), decay=config.ema_decay) if config.use_ema else None
    # frozen weights of these types cannot be sent to other processes, which have read the same ones
    method._ddp_params_and_buffers_to_ignore = quantized_names(method)  # type: ignore[assignment]
    wrapped, optimizer = accelerator.prepare(method, optimizer)
    optimizer.train()  # a schedule-free one; others know no modes
    parts = {
        "optimizer": optimizer,
        "schedule": schedule,
        "ema": ema,
        "scaler": accelerator.scaler,
        "best": Best(),
    }
    folded = [adapter for adapter in method.adapters if isinstance(adapter, FoldedLora)]
    exports: list[Adapter] = [KohyaLora(method.backbone, folded)] if config.export_kohya else []
    session = Session(method, config, accelerator, info, held_out, scorer, trained, wrapped, parts, exports)
    session.step = resume(session)
    if session.step and accelerator.is_main_process:
        for log in LOGS:
            forget_later(session.output / log, session.step)
    if ema:
        ema.to(accelerator.device)
    if config.report_to:
        accelerator.init_trackers(
            "customize", config={k: str(v) for k, v in without_places(asdict(config)).items()}
        )
    return session


def enable_xformers(method: Method) -> None:
    try:
        use_xformers(method.backbone.denoiser)
    except (ImportError, ValueError) as error:
        reason = first_line(error)
        remedy = "pip install 'customize[xformers]' on a machine with a GPU, or leave the flag out"
        raise UserError(f"--enable_xformers_memory_efficient_attention: {reason}: {remedy}.") from error


def resume(session: Session) -> int:
    """Restores the checkpoint that `resume_from_checkpoint` names; returns its step, 0 for a fresh start."""
    config = session.config
    if not (folder := resumed_folder(config)):
        return 0
    step = load_state(folder, session.accelerator, session.trained, **session.train_state)
    if step > config.max_train_steps:
        raise UserError(
            f"--max_train_steps {config.max_train_steps}: '{folder}' has {step} steps already; ask for more."
        )
    return step


def not_finite(step: int, output: Path) -> str:
    kept = good_checkpoint(output)
    good = f"'{kept}' is the last good checkpoint" if kept else "no checkpoint was written yet"
    remedy = "Lower --learning_rate, or use --mixed_precision bf16 instead of fp16."
    return f"the loss is not finite at step {step}; {good}. {remedy}"
