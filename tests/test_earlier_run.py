"""A run folder of before the reorganisation of November 2026 is still drawn, resumed and replaced."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import test_methods
from safetensors.torch import load_file

from customize.runs import checkpoint
from customize.runs.folder import foreign
from customize.trainers.loop import train
from customize.trainers.methods.pivotal_tuning import PivotalTuning
from customize.trainers.settings import TrainConfig, make_accelerator
from tiny import draw, tiny

EARLIER = (
    Path(__file__).parent / "earlier_run"
)  # four steps of pivotal tuning on the tiny Stable Diffusion 1.5
OPTIONS = test_methods.WORD | {"rank": 1, "num_vectors": 2}


def test_it_draws_the_image_of_then():
    pipe = tiny("sd15")
    checkpoint.load(EARLIER, pipe)
    pipe.set_progress_bar_config(disable=True)
    assert np.abs(draw(pipe, "a photo of <toy>") - np.load(EARLIER / "image.npy")).max() < 1e-5


def test_its_checkpoint_resumes_to_the_weights_of_then(images, tmp_path, monkeypatch):
    """The fourth step again: the same batch, noise and update as the code of then took."""
    monkeypatch.setitem(test_methods.CASES, "before", (PivotalTuning, OPTIONS))
    method, data = test_methods.build("sd15", "before", images)
    config = TrainConfig(
        output_dir=str(tmp_path),
        train_batch_size=2,
        max_train_steps=4,
        learning_rate=3e-2,
        resume_from_checkpoint=str(EARLIER / "checkpoint-3"),
    )
    info = {"base_model": "tiny-sd15", "method": "before", "config": {}}
    assert train(method, data, config, make_accelerator(config), info) == 4
    for name in ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors"):
        then, now = load_file(EARLIER / name), load_file(tmp_path / name)
        assert then.keys() == now.keys()
        for key, value in then.items():
            assert value.numpy() == pytest.approx(now[key].numpy(), abs=1e-6), key


def test_its_files_are_known_as_a_runs_own(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(EARLIER, folder)
    assert foreign(folder) == []
    assert checkpoint.open_run(folder)["step"] == 4
