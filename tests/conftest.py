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


@pytest.fixture
def late_denoiser(monkeypatch):
    """As on a card, where the denoiser comes when the text encoders have gone: until then it cannot run.
    Lists how many text encoders there were whenever it was moved."""
    from customize.trainers import launch

    load, came = launch.load_backbone, []

    def loaded(*arguments, **options):
        backbone = load(*arguments, **options)
        denoiser = backbone.denoiser
        move, away = denoiser._apply, denoiser.register_forward_pre_hook(_is_not_there)

        def moved(*given, **more):
            away.remove()
            came.append(len(backbone.text_encoders))
            return move(*given, **more)

        denoiser._apply = moved
        return backbone

    monkeypatch.setattr(launch, "load_backbone", loaded)
    return came


def _is_not_there(*_):
    raise AssertionError("the denoiser ran before it was moved to the device")
