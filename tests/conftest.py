import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # also of programs that tests start: several files are tested at a time

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def write_noise(folder):
    """Four different images of 40 x 32 pixels."""
    folder.mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 255, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def images(tmp_path):
    return write_noise(tmp_path / "images")
