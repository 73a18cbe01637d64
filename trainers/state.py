"""Resume state: one safetensors file with all that a run needs to go on as if it had never stopped; and its generators."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor

from customize.errors import UserError
from customize.files import header, tensors_of

FILE = "resume.safetensors"


def _flatten(prefix: str, value, tensors: dict[str, Tensor]):
    """Moves the tensors of a nested state into `tensors`; returns what is left, with their names in their places."""
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


def random_state() -> dict[str, Tensor]:
    """Every generator that training draws from, on this process."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def fixed_randomness(seed: int) -> Iterator[None]:
    """Draws inside are the same every time, and training's generators do not notice them."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def save_state(folder: Path, accelerator, step: int, trained: dict[str, Tensor], **parts) -> None:
    """Writes `resume.safetensors`. `parts` have `state_dict()`, or are None. Called on every process: each has its own
    generators, the first one writes."""
    generators = gather_object([{name: value.tolist() for name, value in random_state().items()}])
    if not accelerator.is_main_process:
        return
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    everything = {
        "step": step,
        "trained": trained,
        "random": [{name: torch.tensor(value, dtype=torch.uint8) for name, value in state.items()} for state in generators],
        **states,
    }
    tensors: dict[str, Tensor] = {}
    tree = _flatten("state", everything, tensors)
    save_file(tensors, folder / FILE, {"tree": json.dumps(tree)})


def load_state(folder: Path, accelerator, trained: dict[str, Tensor], **parts) -> int:
    """Puts the state back into the tensors and parts given, and into this process's generators; returns the step."""
    path = folder / FILE
    if not path.exists():
        raise UserError(f"--resume_from_checkpoint: '{folder}' has no {FILE}; give a checkpoint-N folder or 'latest'.")
    tensors = tensors_of(path)
    state = _restore(json.loads(header(path)["tree"]), tensors)
    same = {name: value.shape for name, value in state["trained"].items()} == {
        name: value.shape for name, value in trained.items()
    }
    if not same or {name for name, part in parts.items() if part is not None} != state.keys() & parts.keys():
        raise UserError(f"--resume_from_checkpoint: '{folder}' ran with other settings; resume with those it was started with.")
    if len(state["random"]) != accelerator.num_processes:
        raise UserError(f"--resume_from_checkpoint: '{folder}' ran on {len(state['random'])} processes; resume on as many.")
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(state["trained"][name])
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(state[name])
    set_random_state(state["random"][accelerator.process_index])
    return state["step"]


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint-N folder with the highest N, or None."""
    found = [p for p in run.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit() and (p / FILE).exists()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
