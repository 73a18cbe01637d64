"""Resume state: one safetensors file with everything a run needs to continue exactly."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor

from customize.errors import UserError, first_line
from customize.files import damaged, header, tensors_of
from customize.randomness import random_state, set_random_state
from customize.runs.folder import RESUME, checkpoints
from customize.tensor_checks import check_finite, is_finite


def _flatten(prefix: str, value, tensors: dict[str, Tensor]):
    """Moves the tensors of a nested state into `tensors`; returns what is left, with their names in their
    places."""
    if isinstance(value, Tensor):
        tensors[prefix] = value.detach().cpu().contiguous().clone()
        return {"tensor": prefix}
    if isinstance(value, dict):
        return {"dict": [[key, _flatten(f"{prefix}.{key}", item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(f"{prefix}.{i}", item, tensors) for i, item in enumerate(value)]}
    return {"value": value}


def _restore(node, tensors: dict[str, Tensor]):
    (kind, content), *_ = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _restore(item, tensors) for key, item in content}
    return [_restore(item, tensors) for item in content] if kind == "list" else content


def save_state(
    folder: Path, accelerator: Accelerator, step: int, trained: dict[str, Tensor], **parts
) -> None:
    """Writes `resume.safetensors`. `parts` have `state_dict()`, or are None. Called on every process: each
    has its own generators, the first one writes."""
    generators = gather_object([{name: value.tolist() for name, value in random_state().items()}])
    if not accelerator.is_main_process:
        return
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    everything = {
        "step": step,
        "trained": trained,
        "random": [
            {name: torch.tensor(value, dtype=torch.uint8) for name, value in state.items()}
            for state in generators
        ],
        **states,
    }
    tensors: dict[str, Tensor] = {}
    tree = _flatten("state", everything, tensors)
    save_file(tensors, folder / RESUME, {"tree": json.dumps(tree)})


def load_state(folder: Path, accelerator: Accelerator, trained: dict[str, Tensor], **parts) -> int:
    """Puts the state back into the tensors and parts given, and into this process's generators; returns the
    step.

    UserError if there is none, if it is damaged or not finite, or if it ran with other settings.
    """
    path = folder / RESUME
    if not path.is_file():
        raise UserError(
            f"--resume_from_checkpoint: '{folder}' has no {RESUME}; give a checkpoint-N folder or 'latest'."
        )
    with _damaged(path):
        state = _read(path)
    same = {name: value.shape for name, value in state["trained"].items()} == {
        name: value.shape for name, value in trained.items()
    }
    present = {name: part for name, part in parts.items() if part is not None}
    if not same or present.keys() != state.keys() & parts.keys():
        raise UserError(
            f"--resume_from_checkpoint: '{folder}' ran with other settings; resume with those it was "
            "started with."
        )
    if len(state["random"]) != accelerator.num_processes:
        raise UserError(
            f"--resume_from_checkpoint: '{folder}' ran on {len(state['random'])} processes; resume on as "
            "many."
        )
    with _damaged(path):
        for name, part in present.items():
            _check_part(name, part, state[name])
            part.load_state_dict(state[name])
        set_random_state(state["random"][accelerator.process_index])
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(state["trained"][name])
    return state["step"]


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Context in which every error means that the file is damaged."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # each part has its own kinds
        reason = first_line(error)
        raise damaged(path, reason) from error


def _read(path: Path) -> dict[str, Any]:
    """The nested state of a file, of the form that `save_state` gives it."""
    tensors = tensors_of(path)
    check_finite(tensors, path)
    state = _restore(json.loads(header(path)["tree"]), tensors)
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError(f"its step is {state['step']!r}")
    if not all(
        isinstance(value, Tensor) and value.is_floating_point() for value in state["trained"].values()
    ):
        raise ValueError("what was trained is not numbers")
    if not isinstance(state["random"], list) or not all("cpu" in own for own in state["random"]):
        raise ValueError("its random state is of another form")
    return state


def _check_part(name: str, part: Any, state: dict) -> None:
    """ValueError unless the stored state of a part has the form of its present one; not every part checks
    this itself."""
    if not hasattr(part, "param_groups"):
        _check_alike(name, part.state_dict(), state)
        return
    groups = part.param_groups
    _check_alike(
        name, [{k: v for k, v in group.items() if k != "params"} for group in groups], state["param_groups"]
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    for index, own in state["state"].items():
        wanted = _state_shapes(parameters[int(index)].shape)
        for key, value in own.items():
            fits = key not in wanted or (value.is_floating_point() and value.shape in wanted[key])
            if not fits:
                raise ValueError(f"{name}.{key} is {tuple(value.shape)} of {value.dtype}")


def _state_shapes(shape: torch.Size) -> dict[str, tuple[torch.Size, ...]]:
    """The shapes that the tensors of the optimizers' states may have, by name, for a parameter of `shape`.
    Those of bitsandbytes are packed, and it checks them itself."""
    flat = torch.Size([shape.numel()])
    return {
        "exp_avg": (shape,),
        "exp_avg_sq": (shape,),
        "exp_avg_sq_row": (shape[:-1],),  # Adafactor's
        "exp_avg_sq_col": (shape[:-2] + shape[-1:],),
        "z": (shape,),  # of schedule-free AdamW
        "s": (flat,),  # Prodigy's
        "p0": (flat, torch.Size()),  # a single 0 for a parameter that started at 0
    }


def _check_alike(name: str, now: Any, then: Any) -> None:
    if isinstance(now, dict):
        for key, value in now.items():
            _check_alike(f"{name}.{key}", value, then[key])
    elif isinstance(now, list | tuple):
        for i, (value, other) in enumerate(zip(now, then, strict=True)):
            _check_alike(f"{name}.{i}", value, other)
    elif isinstance(now, Tensor):
        if now.shape != then.shape:
            raise ValueError(f"{name} is {tuple(then.shape)}")
    elif _kind(now) != _kind(then) or then != then:  # NaN equals nothing
        raise ValueError(f"{name} is {then!r}")


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


def good_checkpoint(run: Path) -> Path | None:
    """The latest checkpoint-N folder that can be read and whose values are finite, or None."""
    return next((folder for folder in reversed(checkpoints(run)) if _is_good(folder)), None)


def _is_good(folder: Path) -> bool:
    try:
        return all(is_finite(value) for value in tensors_of(folder / RESUME).values())
    except UserError:
        return False
