"""Files that can be read but are wrong: each ends in one sentence, and none is drawn with or trained
from."""

import json
import math
import os
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_encoders import PLUS, SIZES, eye

from customize.adapters.encoders.multimodal import MultimodalConfig
from customize.adapters.lora import TEXT_ATTENTION, LoraFields, add_lora
from customize.adapters.lora_files import LORA, METADATA, check_lora
from customize.adapters.subject import image_prompt, multimodal
from customize.adapters.subject_files import load_adapter
from customize.adapters.words import LearnedWords, load_words
from customize.backbones.families import wrap
from customize.backbones.load import load_base
from customize.backbones.text import ENCODER_NAMES
from customize.errors import UserError
from customize.files import header
from customize.runs import checkpoint
from customize.runs.folder import RESUME, checkpoint_step, latest_checkpoint
from customize.trainers.resume import good_checkpoint, load_state, save_state
from tiny import BASES, lora_of, save_adapter, tiny

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
    return next(k for k, v in sorted(tensors.items()) if v.ndim in (2, 4) and v.shape[0] != v.shape[1])


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
@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
def test_weight_files_that_are_cut_off(folder, file, content):
    path = folder / file
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    refused(folder, "could not be loaded")


INDEXES = [
    "[]",
    "3",
    "null",
    '"text"',
    DEEP,
    "{",
    "",
    "\ufeff{}",
    "{}",
    '{"_class_name": null}',
    '{"_class_name": ["a", "b"]}',
]


@pytest.mark.parametrize("text", INDEXES, ids=lambda text: text[:12])
def test_an_index_of_another_form(folder, text):
    (folder / "model_index.json").write_text(text, encoding="utf-8")
    refused(folder, "model_index.json|supported are")


def test_an_index_that_is_not_utf8(folder):
    (folder / "model_index.json").write_bytes(b'{"_class_name": "\xff"}')
    refused(folder, "is damaged")


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
)
def test_a_pipe_in_the_place_of_a_file(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, "no ordinary file|could not be loaded")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


COMPONENTS = [
    *(
        ("unet", value)
        for value in ([], ["diffusers"], ["diffusers", None], [None, None], [1, 2], "unet", {}, 5, None)
    ),
    *(
        ("unet", ["diffusers", kind])
        for kind in ("NoSuchModel", "DDIMScheduler", "UNet2DModel", "__doc__", "")
    ),
    *(
        ("unet", [library, "UNet2DConditionModel"])
        for library in ("transformers", "os", "no_such_library", "..", "")
    ),
    *(("vae", value) for value in ([None, None], ["diffusers", "AutoencoderTiny"])),
    *(
        ("text_encoder", value)
        for value in ([None, None], ["transformers", "CLIPVisionModel"], ["transformers", "Trainer"])
    ),
    *(
        ("tokenizer", value)
        for value in ([None, None], ["transformers", "NoSuchTokenizer"], ["transformers", None])
    ),
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


@pytest.mark.parametrize(
    ("file", "key", "value"), [(f, k, v) for f, own in SETTINGS.items() for k, v in own.items()], ids=str
)
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


# LoRA


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """LoRA files of every base model: of attention, and DoRA of all layers and of the CLIP text encoders."""
    root = tmp_path_factory.mktemp("loras")
    for base in BASES:
        for name, options in {"plain": {}, "all": {"use_dora": True, "lora_layers": "all"}}.items():
            backbone = wrap(tiny(base), base)
            add_lora(backbone.denoiser, LoraFields(rank=3, **options))
            for encoder in backbone.text_encoders if options else []:
                if "CLIP" in type(encoder).__name__:
                    add_lora(encoder, LoraFields(rank=2, **options), TEXT_ATTENTION)
            checkpoint.save(
                root / base / name, [lora_of(backbone)], {"base_model": base, "method": "none", "config": {}}
            )
    return root


def lora(loras, base: str, name: str = "all") -> tuple[dict, dict]:
    path = loras / base / name / LORA
    return load_file(path), header(path)


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("base", BASES)
def test_lora_that_fits_is_let_through(loras, base, name):
    state, about = lora(loras, base, name)
    pipe = tiny(base)
    check_lora(pipe, state, "file")
    check_lora(pipe, state, "file", about)
    pipe.load_lora_weights(str(loras / base / name), weight_name=LORA)
    check_lora(pipe, state, "file", about)  # beside one that is loaded already


def matrix(state: dict, ending: str = "") -> str:
    """The key of a matrix that is not square, and whose layer is not square either."""
    return next(k for k, v in sorted(state.items()) if v.ndim == 2 and k.endswith(ending) and "ff" in k)


def unpaired(state):
    del state[matrix(state)]


def another_rank(state):
    key = matrix(
        state,
        "up.weight" if "unet" in next(iter(state)) or "lora.up" in str(state.keys()) else "lora_B.weight",
    )
    state[key] = state[key][:, 1:]


def no_rank(state):
    for key in [
        k
        for k in state
        if k.rpartition(".lora")[0] == matrix(state).rpartition(".lora")[0] and state[k].ndim == 2
    ]:
        state[key] = state[key][:0] if "down" in key or "lora_A" in key else state[key][:, :0]


def another_layer(state):
    key = matrix(state)
    state[key.replace("ff", "gg")] = state.pop(key)


def another_part(state):
    state |= {f"prior.{key}": state.pop(key) for key in list(state)}


def extra(state):
    state["unet.alpha"] = torch.ones(1)


def two_layouts(state):
    peft = "lora_A" in str(state.keys())
    for key in list(state):
        if key.startswith("text_encoder."):
            new = key.replace(".lora_A.", ".lora_linear_layer.down.").replace(
                ".lora_B.", ".lora_linear_layer.up."
            )
            old = key.replace(".lora_linear_layer.down.", ".lora_A.").replace(
                ".lora_linear_layer.up.", ".lora_B."
            )
            state[new if peft else old] = state.pop(key)


def without_magnitudes(state):
    del state[next(key for key in state if "magnitude" in key)]


def flat_magnitudes(state):
    key = next(key for key in state if "magnitude" in key)
    state[key] = state[key].reshape(1, -1, 1)


def integers(state):
    state[matrix(state)] = state[matrix(state)].int()


def all_transposed(state):
    for key in [k for k, v in state.items() if v.ndim > 1]:
        state[key] = state[key].transpose(0, 1)


def narrower(state):
    state[matrix(state)] = state[matrix(state)][:, :-1]


def scalars(state):
    state[matrix(state)] = torch.tensor(1.0)


LORA_DAMAGES = [
    *(
        unpaired,
        another_rank,
        no_rank,
        another_layer,
        another_part,
        extra,
        two_layouts,
        without_magnitudes,
        flat_magnitudes,
    ),
    *(integers, all_transposed, narrower, scalars, empty),
]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("edit", LORA_DAMAGES)
def test_lora_that_does_not_fit(loras, base, edit):
    state, _ = lora(loras, base)
    edit(state)
    with pytest.raises(
        UserError, match=r"'file' does not fit this base model \(.*\); load the base model"
    ) as error:
        check_lora(tiny(base), state, "file")
    sentence(error)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("base", BASES)
def test_lora_that_is_not_finite(loras, base, value):
    state, _ = lora(loras, base)
    state[matrix(state)][0, 0] = value
    with pytest.raises(UserError, match="'file' holds values that are not finite"):
        check_lora(tiny(base), state, "file")


@pytest.mark.parametrize("other", BASES)
@pytest.mark.parametrize("base", BASES)
def test_lora_of_another_base_model(loras, base, other):
    if base != other:
        with pytest.raises(UserError, match="does not fit this base model"):
            check_lora(tiny(other), lora(loras, base)[0], "file")


@pytest.mark.parametrize("base", BASES)
def test_a_layer_that_the_header_lists_must_be_there(loras, base):
    state, about = lora(loras, base)
    layer = matrix(state).rpartition(".lora")[0]
    fewer = {key: value for key, value in state.items() if not key.startswith(f"{layer}.")}
    check_lora(tiny(base), fewer, "file")  # without a header it cannot be known
    with pytest.raises(UserError, match="not those that its header lists"):
        check_lora(tiny(base), fewer, "file", about)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"text"', DEEP, "{}", '{"r": 1}'], ids=lambda text: text[:9]
)
def test_a_lora_header_of_another_form(loras, text):
    state, _ = lora(loras, "sd15")
    with pytest.raises(UserError, match=r"'file' (is damaged|does not fit)") as error:
        check_lora(tiny("sd15"), state, "file", {METADATA: text})
    sentence(error)


HEADERS = [
    ("r", "3"),
    ("r", 4),
    ("r", 0),
    ("r", True),
    ("lora_alpha", "x"),
    ("lora_alpha", math.nan),
    ("lora_alpha", None),
]
HEADERS += [
    ("target_modules", None),
    ("target_modules", 3),
    ("target_modules", ["x"]),
    ("target_modules", [1]),
]
HEADERS += [("use_dora", False), ("use_dora", "yes"), ("no_such_setting", 1)]


@pytest.mark.parametrize(("key", "value"), HEADERS, ids=str)
def test_a_setting_of_another_type_in_a_lora_header(loras, key, value):
    state, about = lora(loras, "sd15")
    settings = json.loads(about[METADATA]) | {f"unet.{key}": value}
    with pytest.raises(UserError, match=r"'file' (is damaged|does not fit)") as error:
        check_lora(tiny("sd15"), state, "file", {METADATA: json.dumps(settings)})
    sentence(error)


# Learned words


def word(base: str) -> dict[str, torch.Tensor]:
    return LearnedWords(wrap(tiny(base), base), {"<dog>": "dog"}, 2).by_word()["<dog>"]


WORD_DAMAGES = {
    "wider": lambda value: torch.cat([value, value], 1),
    "flat": lambda value: value[0],
    "none": lambda value: value[:0],
    "integers": lambda value: value.int(),
    "scalar": lambda value: value[0, 0],
    "stacked": lambda value: value[None],
    "transposed": lambda value: value.T,
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("damage", WORD_DAMAGES)
def test_a_word_that_does_not_fit(base, damage):
    for name, value in word(base).items():
        with pytest.raises(
            UserError, match=r"the learned word '<dog>' does not fit this base model \("
        ) as error:
            load_words(tiny(base), "<dog>", word(base) | {name: WORD_DAMAGES[damage](value)})
        sentence(error)


@pytest.mark.parametrize("base", BASES)
def test_a_word_of_another_number_of_encoders(base):
    vectors = word(base)
    more = vectors | {name: torch.ones(2, 16) for name in (*ENCODER_NAMES, "other")}
    one_vector = {name: value[: 1 + (i == 0)] for i, (name, value) in enumerate(vectors.items())}
    fewer = dict(list(vectors.items())[1:])
    for changed in (more, fewer, {}, *([one_vector] if len(vectors) > 1 else [])):
        with pytest.raises(UserError, match="does not fit this base model"):
            load_words(tiny(base), "<dog>", changed)


@pytest.mark.parametrize("base", BASES)
def test_a_word_that_is_not_finite(base):
    vectors = word(base)
    list(vectors.values())[-1][0, 0] = math.nan
    with pytest.raises(UserError, match="'<dog>' holds values that are not finite"):
        load_words(tiny(base), "<dog>", vectors)


def test_a_word_that_the_pipeline_knows():
    pipe = tiny("sdxl")
    load_words(pipe, "<dog>", word("sdxl"))
    with pytest.raises(UserError, match="knows the word '<dog>' already"):
        load_words(pipe, "<dog>", word("sdxl"))


def test_the_words_of_encoders_of_equal_width_are_told_apart():
    """Flux reads CLIP and T5, SDXL two CLIPs: by their widths alone a word of one could pass for the
    other's."""
    with pytest.raises(UserError, match="does not fit this base model"):
        load_words(tiny("flux"), "<dog>", word("sdxl"))


# Subject encoders


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    root, pipe = tmp_path_factory.mktemp("encoders"), tiny("sd15")
    made = {"ours": multimodal(pipe, eye(), "toy", **SIZES), "plain": image_prompt(pipe, eye(), False)}
    for name, adapter in (made | {"plus": image_prompt(pipe, eye(), **PLUS)}).items():
        (root / name).mkdir()
        save_adapter(adapter, root / name).rename(root / f"{name}.safetensors")
    return root


def encoder_refused(
    path, match: str = "damaged|another (base model|version|image encoder)|subject encoder and no"
) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_adapter(path, tiny("sd15"), eye())
    sentence(error)


def damaged(encoders, tmp_path, name: str, edit=None, about=None):
    path = encoders / f"{name}.safetensors"
    state, own = load_file(path), header(path)
    if edit:
        edit(state)
    save_file(state, tmp_path / path.name, own if about is None else {"format": "pt", "subject": about})
    return tmp_path / path.name


def spare(tensors):
    tensors["encoder.spare"] = torch.ones(2)


def spare_released(tensors):
    tensors["image_proj.spare"] = torch.ones(2)


def whole_numbers(tensors):
    tensors |= {key: value.int() for key, value in tensors.items()}


def every_first(tensors):
    """A scalar in the place of each tensor."""
    tensors |= {key: torch.tensor(1.0) for key in tensors}


@pytest.mark.parametrize("name", ["ours", "plain", "plus"])
@pytest.mark.parametrize(
    "edit", [drop, rename, transpose, narrow, nan, infinite, empty, spare, whole_numbers, every_first]
)
def test_an_encoder_that_does_not_fit(encoders, tmp_path, name, edit):
    path = damaged(encoders, tmp_path, name, edit)
    encoder_refused(
        path, "not finite" if edit in (nan, infinite) else "damaged|another|no IP-Adapter|neither a plain"
    )


@pytest.mark.parametrize(
    "key", ["latents", "proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", "norm_out.weight"]
)
@pytest.mark.parametrize(
    "value",
    [torch.ones(()), torch.ones(3), torch.ones(0, 0), torch.ones(1, 2, 3, 4)],
    ids=["0", "1", "2", "4"],
)
def test_a_resampler_of_other_dimensions(encoders, tmp_path, key, value):
    encoder_refused(
        damaged(encoders, tmp_path, "plus", lambda state: state.update({f"image_proj.{key}": value}))
    )


@pytest.mark.parametrize("key", ["proj.weight", "proj.bias", "norm.weight"])
@pytest.mark.parametrize(
    "value", [torch.ones(()), torch.ones(3), torch.ones(0), torch.ones(0, 0)], ids=["0", "1", "2", "3"]
)
def test_a_projection_of_other_dimensions(encoders, tmp_path, key, value):
    encoder_refused(
        damaged(encoders, tmp_path, "plain", lambda state: state.update({f"image_proj.{key}": value}))
    )


@pytest.mark.parametrize(
    "layer", ["layers.999999999999.0.to_q.weight", "layers.x.0.to_q.weight", "layers.", "layers.-1.a"]
)
def test_a_resampler_of_other_layers(encoders, tmp_path, layer):
    encoder_refused(
        damaged(
            encoders, tmp_path, "plus", lambda state: state.update({f"image_proj.{layer}": torch.ones(2, 2)})
        )
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"text"', DEEP, "{}", '{"config": 3}'], ids=lambda text: text[:9]
)
def test_an_encoders_header_of_another_form(encoders, tmp_path, text):
    encoder_refused(damaged(encoders, tmp_path, "ours", about=text))


WRONG = ["16", None, -1, 0, 2.5, True, [], {}, 10**12]
FIELDS = [
    f for f in MultimodalConfig.__dataclass_fields__ if f not in ("words", "fusion", "location", "text_dims")
]


@pytest.mark.parametrize("field", FIELDS)
def test_an_encoders_sizes_are_numbers(encoders, tmp_path, field):
    about = json.loads(header(encoders / "ours.safetensors")["subject"])
    for value in WRONG:
        text = json.dumps(about | {"config": about["config"] | {field: value}})
        encoder_refused(damaged(encoders, tmp_path, "ours", about=text))


OTHERS = [
    ("words", "yes"),
    ("fusion", 1),
    ("location", None),
    ("text_dims", 16),
    ("text_dims", ["16"]),
    ("text_dims", [8]),
    ("heads", 3),
]


@pytest.mark.parametrize(("field", "value"), OTHERS, ids=str)
def test_an_encoders_other_settings(encoders, tmp_path, field, value):
    about = json.loads(header(encoders / "ours.safetensors")["subject"])
    encoder_refused(
        damaged(
            encoders, tmp_path, "ours", about=json.dumps(about | {"config": about["config"] | {field: value}})
        )
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("text_gate", "open"), ("text_gate", []), ("layers", None), ("layers", []), ("layers", {})],
)
def test_what_an_encoders_header_says_of_its_model(encoders, tmp_path, key, value):
    about = json.loads(header(encoders / "ours.safetensors")["subject"])
    encoder_refused(damaged(encoders, tmp_path, "ours", about=json.dumps(about | {key: value})))


def test_a_pickle_of_more_than_tensors(tmp_path):
    torch.save({"image_proj": {"proj.weight": [1, 2]}, "ip_adapter": {}}, tmp_path / "adapter.bin")
    encoder_refused(tmp_path / "adapter.bin", "holds more than tensors")


# Resume state


class Alone:
    """An accelerator of one process."""

    is_main_process, num_processes, process_index = True, 1, 0


def parts():
    """What a run of two parameters resumes."""
    torch.manual_seed(0)
    trained = {"a": torch.nn.Parameter(torch.randn(3, 2)), "b": torch.nn.Parameter(torch.randn(4))}
    optimizer = torch.optim.AdamW(trained.values())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return trained, {"optimizer": optimizer, "schedule": schedule, "ema": None}


@pytest.fixture
def resumable(tmp_path):
    trained, others = parts()
    sum(value.sum() for value in trained.values()).backward()
    others["optimizer"].step()
    others["schedule"].step()
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    save_state(folder, Alone(), 3, trained, **others)
    return folder


def resume_refused(
    folder, match: str = "is damaged .*use an earlier checkpoint|holds values|other settings|processes"
):
    trained, others = parts()
    with pytest.raises(UserError, match=match) as error:
        load_state(folder, Alone(), trained, **others)
    assert str(folder) in sentence(error)


def rewrite(folder, edit_tree=None, edit=None, about=None):
    path = folder / RESUME
    tensors, own = load_file(path), header(path)
    tree = json.loads(own["tree"])
    if edit_tree:
        edit_tree(tree)
    if edit:
        edit(tensors)
    save_file(tensors, path, {"tree": json.dumps(tree)} if about is None else about)


def test_a_whole_resume_file_is_restored(resumable):
    trained, others = parts()
    assert load_state(resumable, Alone(), trained, **others) == 3
    assert others["schedule"].last_epoch == 1
    assert torch.equal(trained["a"], load_file(resumable / RESUME)["state.trained.a"])


TREES = [
    "",
    "{",
    "[]",
    "3",
    "null",
    '"x"',
    "{}",
    DEEP,
    '{"dict": 3}',
    '{"dict": [[1]]}',
    '{"dict": []}',
    '{"tensor": "no"}',
]
TREES += [
    '{"dict": [["step", {"value": 3}]]}',
    '{"list": [{"value": 1}]}',
    '{"value": {"step": 1}}',
    '{"other": 1}',
]


@pytest.mark.parametrize("tree", TREES, ids=lambda text: text[:20])
def test_a_resume_tree_of_another_form(resumable, tree):
    rewrite(resumable, about={"tree": tree})
    resume_refused(resumable)


def test_a_resume_file_without_a_tree(resumable):
    rewrite(resumable, about={"format": "pt"})
    resume_refused(resumable)


def entry(tree: dict, *path):
    """The node at the end of a path of keys."""
    for key in path:
        tree = dict(tree["dict"])[key] if "dict" in tree else tree["list"][key]
    return tree


@pytest.mark.parametrize("step", [-1, "3", 3.0, None, True, [], {}])
def test_a_step_that_is_none(resumable, step):
    rewrite(resumable, lambda tree: entry(tree, "step").update(value=step))
    resume_refused(resumable, "its step is")


@pytest.mark.parametrize("part", ["trained", "random", "optimizer", "schedule"])
@pytest.mark.parametrize(
    "node",
    [
        {"value": 3},
        {"value": None},
        {"list": []},
        {"dict": []},
        {"tensor": "state.trained.a"},
        {"tensor": "no"},
        {},
        [],
    ],
    ids=str,
)
def test_a_part_of_another_kind(resumable, part, node):
    def replace(tree):
        tree["dict"] = [[key, node if key == part else own] for key, own in tree["dict"]]

    rewrite(resumable, replace)
    resume_refused(resumable)


KEYS = [
    ("optimizer", "param_groups", 0, "lr"),
    ("optimizer", "param_groups", 0, "betas", 0),
    ("schedule", "last_epoch"),
]
KEYS += [("schedule", "base_lrs"), ("schedule", "_last_lr", 0), ("optimizer", "param_groups", 0, "eps")]


@pytest.mark.parametrize("path", KEYS, ids=str)
@pytest.mark.parametrize("value", ["x", None, [], {}, math.nan], ids=str)
def test_a_value_of_another_kind(resumable, path, value):
    def replace(tree):
        node = entry(tree, *path)
        node.clear()
        node["value"] = value

    rewrite(resumable, replace)
    resume_refused(resumable)


NAMES = [
    "state.optimizer.state.0.exp_avg",
    "state.optimizer.state.1.exp_avg_sq",
    "state.random.0.cpu",
    "state.trained.a",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value",
    [torch.ones(5), torch.ones(()), torch.ones(0), torch.ones(3, 2).int()],
    ids=["1", "0", "none", "int"],
)
def test_tensors_of_other_shapes(resumable, name, value):
    rewrite(resumable, edit=lambda tensors: tensors.update({name: value}))
    resume_refused(resumable)


@pytest.mark.parametrize("name", NAMES[:2] + NAMES[3:])
def test_a_resume_file_that_is_not_finite(resumable, name):
    rewrite(resumable, edit=lambda tensors: tensors[name].view(-1)[:1].fill_(math.nan))
    resume_refused(resumable, "holds values that are not finite .*use an earlier checkpoint")


def test_a_refused_resume_file_leaves_what_is_trained_as_it_was(resumable):
    rewrite(resumable, edit=lambda tensors: tensors.update({"state.random.0.cpu": torch.ones(5)}))
    trained, others = parts()
    before = {name: value.detach().clone() for name, value in trained.items()}
    with pytest.raises(UserError):
        load_state(resumable, Alone(), trained, **others)
    assert all(torch.equal(trained[name], value) for name, value in before.items())


def test_a_pipe_in_the_place_of_a_resume_file(resumable):
    (resumable / RESUME).unlink()
    os.mkfifo(resumable / RESUME)
    resume_refused(resumable, "has no resume.safetensors")
    assert latest_checkpoint(resumable.parent) is None


def test_only_checkpoints_of_ours_count(resumable):
    run = resumable.parent
    for name in ("²", "٣", "9x", "-9", "", "0x9", "09", "9 ", "+9", "9.0", "1_0"):
        shutil.copytree(resumable, run / f"checkpoint-{name}")
        assert checkpoint_step(run / f"checkpoint-{name}") is None
    (run / "checkpoint-8").mkdir()
    assert checkpoint_step(run / "checkpoint-8") == 8
    assert latest_checkpoint(run) == resumable


def test_a_checkpoint_that_is_not_finite_is_not_called_good(resumable):
    newer = shutil.copytree(resumable, resumable.with_name("checkpoint-10"))
    shutil.copytree(resumable, resumable.with_name("checkpoint-20"))
    rewrite(newer, edit=lambda tensors: tensors["state.trained.a"].fill_(math.inf))
    (resumable.with_name("checkpoint-20") / RESUME).write_bytes(b"")
    assert good_checkpoint(resumable.parent) == resumable
    assert latest_checkpoint(resumable.parent) == resumable.with_name("checkpoint-20")
    shutil.rmtree(resumable)
    assert good_checkpoint(resumable.parent) is None
