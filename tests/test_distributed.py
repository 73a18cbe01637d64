"""The trainer on two processes."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tiny import tiny


def launch(*words, processes: int):
    """As `accelerate launch` starts processes on a machine without a GPU."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--standalone",
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "customize.trainers", *words],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )


def test_two_processes_train_one_adapter_and_resume(tmp_path, images):
    tiny("sd15").save_pretrained(tmp_path / "base")
    words = [
        "dreambooth",
        "--pretrained_model_name_or_path",
        str(tmp_path / "base"),
        "--instance_data_dir",
        str(images),
    ]
    words += [
        "--instance_prompt",
        "a photo of sks dog",
        "--resolution",
        "32",
        "--rank",
        "2",
        "--learning_rate",
        "1e-2",
    ]
    words += ["--train_batch_size", "2", "--checkpointing_steps", "2"]

    whole = launch(*words, "--max_train_steps", "4", "--output_dir", str(tmp_path / "whole"), processes=2)
    assert whole.returncode == 0, whole.stderr[-2000:]
    half = launch(*words, "--max_train_steps", "2", "--output_dir", str(tmp_path / "half"), processes=2)
    assert half.returncode == 0, half.stderr[-2000:]
    resumed = [
        *words,
        "--max_train_steps",
        "4",
        "--output_dir",
        str(tmp_path / "half"),
        "--resume_from_checkpoint",
        "latest",
    ]
    assert launch(*resumed, processes=2).returncode == 0
    first, second = (
        load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("whole", "half")
    )
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["step"] == 4
    assert all(first[name].equal(second[name]) for name in first)

    alone = launch(*resumed, processes=1)
    assert alone.returncode != 0
    assert "2 processes" in alone.stderr


STOP_ONE = """
import os, signal, sys
from customize.app.cli import main
from customize.trainers import loop
original, number = loop.accumulate_gradients, [0]
def counted(*arguments):
    number[0] += 1
    if number[0] == 3 and os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments)
loop.accumulate_gradients = counted
sys.exit(main(["train", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_to_one_process_stops_all_at_one_step(rank, tmp_path, images):
    tiny("sd15").save_pretrained(tmp_path / "base")
    (tmp_path / "stop.py").write_text(STOP_ONE)
    words = [
        "dreambooth",
        "--pretrained_model_name_or_path",
        str(tmp_path / "base"),
        "--instance_data_dir",
        str(images),
    ]
    words += [
        "--instance_prompt",
        "a photo of sks dog",
        "--resolution",
        "32",
        "--rank",
        "2",
        "--max_train_steps",
        "50",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += [str(tmp_path / "stop.py"), rank, *words, "--output_dir", str(tmp_path / "run")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert process.stderr.count("stopped at step 3") >= 1, process.stderr[-2000:]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = [*words, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "latest"]
    resumed[resumed.index("--max_train_steps") + 1] = "4"
    found = launch(*resumed, processes=2)
    assert found.returncode == 0, found.stderr[-2000:]


def test_two_processes_train_beside_quantised_weights(tmp_path, images):
    """Weights of torchao's types cannot be sent between processes."""
    words = ["dreambooth", "--instance_data_dir", str(images), "--instance_prompt", "a red dog"]
    words += ["--rank", "2", "--train_batch_size", "1", "--max_train_steps", "1", "--quantize", "int8"]
    made = launch(*words, "--output_dir", str(tmp_path / "run"), processes=2)
    assert made.returncode == 0, made.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 1
