"""Base models in one file: loaded to the bit as from their folder, trained, drawn; and what is refused."""

import json
import shutil
from pathlib import Path

import original_layouts as layouts
import pytest
import torch
from safetensors.torch import save_file

import tiny_families
from customize.app.cli import main
from customize.backbones import single_file
from customize.backbones.load import load_base
from customize.errors import UserError
from customize.pipelines import load_pipeline
from tiny import woken_at_zero

# How a model is made, its file, and whether the file holds all of it.
CASES = {
    "sd15": (layouts.sd15, layouts.original_sd15, True),
    "sdxl": (layouts.sdxl, layouts.original_sdxl, True),
    "z_image": (tiny_families.z_image, layouts.original_z_image, False),
    "klein": (tiny_families.klein, layouts.prefixed, False),
    "qwen_image": (tiny_families.qwen_image, layouts.prefixed, False),
}
MODELS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")


def made(name: str, place: Path) -> tuple[Path, Path]:
    """A tiny model as a diffusers folder and as the file that a model site would offer."""
    make, original, is_whole = CASES[name]
    torch.manual_seed(0)
    pipe = woken_at_zero(make())
    folder, file = place / f"{name}-folder", place / f"{name}.safetensors"
    pipe.save_pretrained(folder)
    save_file({key: value.clone().contiguous() for key, value in original(pipe).items()}, file)
    if is_whole:
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
    return folder, file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    return {name: made(name, place) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_that_of_the_model(name, files):
    """The file against the very model that it was written from: all tensors are bit-equal."""
    folder, file = files[name]
    make, _, _ = CASES[name]
    torch.manual_seed(0)
    wanted, found = woken_at_zero(make()), load_base(file, single_file_config=str(folder))
    assert type(found) is type(wanted)
    for part in MODELS:
        if getattr(wanted, part, None) is not None:
            own, theirs = getattr(wanted, part).state_dict(), getattr(found, part).state_dict()
            assert own.keys() == theirs.keys()
            assert all(torch.equal(own[key], theirs[key]) for key in own), part
            assert not getattr(found, part).training


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (100 * i, 50, 200)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def test_trained_drawn_and_merged_from_everywhere(files, images, tmp_path, monkeypatch):
    """A run on a file is drawn and merged from another folder than it was trained in, though the paths were
    given relative to that one."""
    folder, file = files["sd15"]
    monkeypatch.chdir(file.parent)
    words = ["train", "dreambooth", "--pretrained_model_name_or_path", file.name]
    words += [
        "--single_file_config",
        folder.name,
        "--instance_data_dir",
        str(images),
        "--max_train_steps",
        "2",
    ]
    words += ["--instance_prompt", "a sks dog", "--resolution", "16", "--learning_rate", ".01"]
    words += ["--checkpointing_steps", "2"]
    assert main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    monkeypatch.chdir(tmp_path)
    options = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "pt"}

    def drawn(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe("a sks dog", generator=torch.manual_seed(0), **options).images

    learned = drawn(load_pipeline("run"))
    assert not torch.equal(learned, drawn(load_base(file, single_file_config=str(folder))))
    shutil.copytree(folder, "moved")
    shutil.copy(file, "moved.safetensors")
    found = load_pipeline("run", base_model="moved.safetensors", single_file_config="moved")
    assert torch.equal(drawn(found), learned)
    assert main(["merge", "run", "run", "--weights", ".5", ".5", "--output_dir", "merged"]) == 0
    assert torch.allclose(drawn(load_pipeline("merged")), learned, atol=1e-5)
    assert (
        main(
            ["generate", "run", "a sks dog", "--num_inference_steps", "1", "--height", "16", "--width", "16"]
        )
        == 0
    )
    assert (
        main(
            [
                "generate",
                str(file),
                "a dog",
                "--single_file_config",
                str(folder),
                "--num_inference_steps",
                "1",
            ]
        )
        == 0
    )
    again = [*words, "--output_dir", "run", "--resume_from_checkpoint", "latest"]
    monkeypatch.chdir(file.parent)
    assert (
        main([*again[:-4], "--output_dir", str(tmp_path / "run"), "--max_train_steps", "3", *again[-2:]]) == 0
    )
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 3


def test_a_file_says_that_it_predicts_v(files, tmp_path):
    """As SDXL files do, by two empty tensors."""
    from safetensors.torch import load_file

    folder, file = files["sdxl"]
    marked = tmp_path / "v.safetensors"
    save_file(load_file(file) | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, marked)
    config = load_base(marked, single_file_config=str(folder)).scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert load_base(file, single_file_config=str(folder)).scheduler.config.prediction_type == "epsilon"


def test_the_rest_is_downloaded_as_the_file_needs_it(files, monkeypatch):
    """Without a folder, the one that diffusers names: its settings, then the weights that the file lacks."""
    folder, file = files["z_image"]
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, allow_patterns))
        return folder

    monkeypatch.setattr(single_file, "snapshot_download", snapshot)
    assert type(load_base(file)).__name__ == "ZImagePipeline"
    (name, settings), (again, both) = asked
    assert name == again == "Tongyi-MAI/Z-Image-Turbo"
    assert not [pattern for pattern in settings if "safetensors" in pattern]
    assert {*both} - {*settings} == {"vae/*.safetensors", "text_encoder/*.safetensors"}


def refused(capsys, file, *flags):
    assert main(["generate", str(file), "a dog", *map(str, flags)]) == 2
    return capsys.readouterr().err


def test_refused(files, tmp_path, capsys, monkeypatch):
    folder, file = files["sd15"]
    other, z_image = files["z_image"]
    config = "--single_file_config"

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(single_file, "snapshot_download", offline)
    assert "for a StableDiffusionPipeline, and" in refused(capsys, file, config, other)
    assert f"configuration of a StableDiffusionPipeline; name one of the same kind with {config}" in refused(
        capsys, z_image, config, folder
    )
    hub = refused(capsys, file)
    assert "is built as 'stable-diffusion-v1-5/stable-diffusion-v1-5' says" in hub
    assert f"give a diffusers folder of the same kind with {config}" in hub
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.down.lora_A.weight": torch.zeros(1)}, lora)
    assert "unless it is a LoRA or a part of a model" in refused(capsys, lora)
    for suffix, why in {".ckpt": "is a pickle", ".gguf": "quantised weights"}.items():
        (tmp_path / f"m{suffix}").write_bytes(b"x")
        assert why in refused(capsys, tmp_path / f"m{suffix}")
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:5000])
    assert "is damaged" in refused(capsys, tmp_path / "half.safetensors", config, folder)
    assert "give a folder" in refused(capsys, tmp_path / "none.safetensors")
    assert "is for a base model in one file" in refused(capsys, "stickers", config, folder)
    for weights in (bare := shutil.copytree(other, tmp_path / "bare")).glob("vae/*.safetensors"):
        weights.unlink()
    assert "lacks its vae, and" in refused(capsys, z_image, config, bare)


def test_refused_for_its_weights(files, tmp_path):
    from safetensors.torch import load_file

    folder, file = files["sd15"]
    tensors = load_file(file)
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    cases = {
        "lacks weights of its unet": {k: v for k, v in tensors.items() if k != key},
        "not finite": tensors | {key: torch.full_like(tensors[key], float("nan"))},
        "shape": tensors | {key: torch.zeros(3, 3)},
        "scaled fp8": tensors | {"model.diffusion_model.scaled_fp8": torch.zeros(1)},
        "is a inpainting": tensors
        | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
    }
    for said, changed in cases.items():
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(UserError, match=said):
            load_base(tmp_path / "changed.safetensors", single_file_config=str(folder))
