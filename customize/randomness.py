"""Random generators: their state, and fixed randomness."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """The state of every generator that training uses, on this process."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def fixed_randomness(seed: int) -> Iterator[None]:
    """Context in which random draws are the same every time and training's generators are not affected."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
