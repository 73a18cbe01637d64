"""Files that can be read but are wrong: each ends in one sentence, and none is drawn with or trained from."""

import json
import math
import os
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from customize.errors import UserError
from customize.loading import load_base
from customize.lora import LoraFields, add_lora
from tiny import BASES, tiny

DEEP = "[" * 100_000 + "]" * 100_000


def sentence(error) -> str:
    """The message of a UserError: one line that ends the sentence."""
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 700
    return message


def change(path, edit) -> None:
    """Rewrites a safetensors file after `edit(tensors)`."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def first(tensors: dict) -> str:
    """The first matrix or convolution that is not square."""
    return next(k for k, v in sorted(tensors.items()) if v.ndim > 1 and v.shape[0] != v.shape[1])


# Base models


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny base models, written once."""
    root = tmp_path_factory.mktemp("bases")
    for base in BASES:
        tiny(base).save_pretrained(root / base)
    return root


@pytest.fixture
def folder(bases, tmp_path):
    return shutil.copytree(bases / "sd15", tmp_path / "base")


def refused(folder, match: str, **options) -> str:
    with pytest.raises(UserError, match=match) as error:
        load_base(str(folder), **options)
    return sentence(error)


@pytest.mark.parametrize("base", BASES)
def test_whole_base_models_are_loaded_bit_for_bit(bases, base):
    pipe, want = load_base(bases / base), tiny(base)
    for name, part in want.components.items():
        if isinstance(part, torch.nn.Module):
            own = getattr(pipe, name).state_dict()
            assert own.keys() == part.state_dict().keys()
            assert all(torch.equal(own[key], value) for key, value in part.state_dict().items())


def test_the_embedded_base_is_whole():
    assert load_base("stickers").config._name_or_path == "stickers"


def test_shards_and_variants_are_whole(tmp_path):
    pipe = tiny("sd15")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    want = pipe.unet.state_dict()
    for loaded in (load_base(tmp_path / "shards"), load_base(tmp_path / "half", variant="fp16")):
        assert all(torch.equal(want[key], value) for key, value in loaded.unet.state_dict().items())
    refused(tmp_path / "half", "could not be loaded")
    shard = next((tmp_path / "shards" / "unet").glob("*-00001-of-*.safetensors"))
    shard.unlink()
    refused(tmp_path / "shards", "could not be loaded")


def test_a_folder_saved_with_an_active_lora_is_refused(tmp_path):
    pipe = tiny("sd15")
    add_lora(pipe.unet, LoraFields(rank=2))
    pipe.save_pretrained(tmp_path / "base")
    assert "to_" in refused(tmp_path / "base", "its unet lacks weights")


WEIGHTS = {
    "sd15": ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"],
    "sdxl": ["text_encoder_2/model"],
    "sd3": ["transformer/diffusion_pytorch_model", "text_encoder_3/model"],
    "flux": ["transformer/diffusion_pytorch_model", "text_encoder_2/model"],
}
FILES = [(base, f"{name}.safetensors") for base, names in WEIGHTS.items() for name in names]


def drop(tensors):
    del tensors[first(tensors)]


def rename(tensors):
    key = first(tensors)
    tensors[f"old.{key}"] = tensors.pop(key)


def transpose(tensors):
    key = first(tensors)
    tensors[key] = tensors[key].transpose(0, 1).contiguous()


def narrow(tensors):
    key = first(tensors)
    tensors[key] = tensors[key][:, 1:].contiguous()


def nan(tensors):
    tensors[first(tensors)].flatten()[0] = math.nan


def infinite(tensors):
    tensors[first(tensors)].flatten()[-1] = -math.inf


def empty(tensors):
    tensors.clear()


@pytest.mark.parametrize(("base", "file"), FILES, ids=lambda value: value)
@pytest.mark.parametrize("edit", [drop, rename, transpose, narrow, nan, infinite, empty])
def test_weights_that_do_not_all_load(bases, tmp_path, base, file, edit):
    folder = shutil.copytree(bases / base, tmp_path / "base")
    change(folder / file, edit)
    refused(folder, "not finite" if edit in (nan, infinite) else "could not be loaded")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"x" * 100, None])
@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_weight_files_that_are_cut_off(folder, file, content):
    path = folder / file
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    refused(folder, "could not be loaded")


INDEXES = ["[]", "3", "null", '"text"', DEEP, "{", "", "\ufeff{}", "{}", '{"_class_name": null}', '{"_class_name": ["a", "b"]}']


@pytest.mark.parametrize("text", INDEXES, ids=lambda text: text[:12])
def test_an_index_of_another_form(folder, text):
    (folder / "model_index.json").write_text(text, encoding="utf-8")
    refused(folder, "model_index.json|supported are")


def test_an_index_that_is_not_utf8(folder):
    (folder / "model_index.json").write_bytes(b'{"_class_name": "\xff"}')
    refused(folder, "is damaged")


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_pipe_in_the_place_of_a_file(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, "no ordinary file|could not be loaded")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


COMPONENTS = [
    *(("unet", value) for value in ([], ["diffusers"], ["diffusers", None], [None, None], [1, 2], "unet", {}, 5, None)),
    *(("unet", ["diffusers", kind]) for kind in ("NoSuchModel", "DDIMScheduler", "UNet2DModel", "__doc__", "")),
    *(("unet", [library, "UNet2DConditionModel"]) for library in ("transformers", "os", "no_such_library", "..", "")),
    *(("vae", value) for value in ([None, None], ["diffusers", "AutoencoderTiny"])),
    *(("text_encoder", value) for value in ([None, None], ["transformers", "CLIPVisionModel"], ["transformers", "Trainer"])),
    *(("tokenizer", value) for value in ([None, None], ["transformers", "NoSuchTokenizer"], ["transformers", None])),
    *(
        ("scheduler", value)
        for value in ([None, None], ["diffusers", "NoSuchScheduler"], ["diffusers", "UNet2DConditionModel"])
    ),
]


@pytest.mark.parametrize(("part", "value"), COMPONENTS, ids=str)
def test_a_component_of_another_form(folder, part, value):
    edit_json(folder / "model_index.json", **{part: value})
    refused(folder, "model_index|could not be loaded|lacks|as its|usual kind")


def test_other_lists_of_an_index_are_configuration(folder):
    edit_json(folder / "model_index.json", sizes=[1, 2, 3], names=["a"], nothing=[], pair=[1, 2])
    assert isinstance(load_base(folder).unet, UNet2DConditionModel)


BAD_CONFIGS = ["null", "[]", "3", '"text"', "", "{", DEEP]


@pytest.mark.parametrize("text", BAD_CONFIGS, ids=lambda text: text[:12])
@pytest.mark.parametrize(
    "file",
    [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_configuration_of_another_form(folder, file, text):
    (folder / file).write_text(text)
    refused(folder, "could not be loaded|is damaged")


SETTINGS = {
    "unet/config.json": {
        "block_out_channels": "x",
        "cross_attention_dim": "16",
        "down_block_types": ["Nothing"],
        "in_channels": -1,
    },
    "vae/config.json": {"scaling_factor": "x", "latent_channels": None, "block_out_channels": 3},
    "text_encoder/config.json": {"hidden_size": "16", "num_attention_heads": 0, "num_hidden_layers": 3},
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": "1000",
        "beta_start": "x",
        "beta_end": None,
        "beta_schedule": "nothing",
        "thresholding": "yes",
        "clip_sample": "yes",
        "prediction_type": 5,
        "timestep_spacing": ["leading"],
        "_class_name": "NoSuchScheduler",
    },
    "tokenizer/tokenizer_config.json": {"model_max_length": "x", "pad_token": 5},
}


@pytest.mark.parametrize(("file", "key", "value"), [(f, k, v) for f, own in SETTINGS.items() for k, v in own.items()], ids=str)
def test_a_setting_of_another_type(folder, file, key, value):
    edit_json(folder / file, **{key: value})
    refused(folder, "could not be loaded|has ")


def test_a_model_of_the_hub_is_checked_too(bases, tmp_path):
    snapshot = tmp_path / "models--owner--base" / "snapshots" / ("0" * 40)
    shutil.copytree(bases / "sd15", snapshot)
    refs = tmp_path / "models--owner--base" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert load_base("owner/base", cache_dir=tmp_path).config._name_or_path == "owner/base"
    change(snapshot / "unet" / "diffusion_pytorch_model.safetensors", drop)
    with pytest.raises(UserError, match=r"'owner/base' could not be loaded.*its unet lacks weights") as error:
        load_base("owner/base", cache_dir=tmp_path)
    sentence(error)


@pytest.mark.parametrize("name", [None, 3, b"stickers", ["stickers"], {}, True])
def test_a_base_model_is_named_by_text(name):
    with pytest.raises(UserError, match="named by text") as error:
        load_base(name)
    sentence(error)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "", "not a name", "../nowhere", "a/b/c/d"])
def test_names_that_are_none(name):
    refused(name, "pretrained_model_name_or_path")
