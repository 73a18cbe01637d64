"""Settings: defaults by method and base model, help, names of other tools, methods of one's own, and resuming
with other settings."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

import customize
from customize.app.cli import DemoConfig, PushConfig, main
from customize.app.evaluate import KINDS
from customize.app.generate import GenerateConfig
from customize.backbones.base import Condition
from customize.backbones.families import wrap
from customize.config import flags_of, is_of_type, parse, table
from customize.data.concepts import Concept
from customize.data.crops import fit, sizes_of
from customize.errors import UserError
from customize.other_tools import FLAGS, SENTENCES
from customize.pipelines import load_pipeline
from customize.runs.folder import read_info
from customize.trainers.continuation import COMPARED, MAY_CHANGE
from customize.trainers.launch import complete, configs, run, usage
from customize.trainers.methods.base import Method, MethodConfig
from customize.trainers.methods.dreambooth import DreamBooth
from customize.trainers.methods.textual_inversion import TEMPLATES, TextualInversion
from customize.trainers.prepare import RECIPE
from customize.trainers.registry import METHODS, find_method
from tiny import tiny, vae

LORA = "pytorch_lora_weights.safetensors"
ALL = [
    *dict.fromkeys(kind for name in METHODS for kind in configs(find_method(name))),
    *(GenerateConfig, DemoConfig, PushConfig, *KINDS),
]
EVERY = [pytest.param(cls, flag, id=f"{cls.__name__}-{flag.name}") for cls in ALL for flag in flags_of(cls)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "sd15"
    tiny("sd15").save_pretrained(folder)
    return folder


@pytest.fixture
def train(base, images, tmp_path):
    """Trains from Python in a few steps on the tiny base."""
    given = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "instance_prompt": "a photo of sks dog",
        "output_dir": tmp_path / "run",
        "resolution": 16,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "rank": 2,
    }

    def trained(method: str = "dreambooth", **changes) -> Path:
        values = {name: value for name, value in (given | changes).items() if value is not None}
        return customize.train(method, **values)

    return trained


# every flag


@pytest.mark.parametrize(("cls", "flag"), EVERY)
def test_every_flag_has_a_help_that_stands_alone_and_every_number_its_range(cls, flag):
    assert len(flag.help) > 10
    assert not re.match(r"(its|their|that|those|these|this|the same|it)\b", flag.help)
    assert not re.search(r"\b(pictures?|obedience|likeness|tower)\b", flag.help)
    if {int, float} & {flag.type, *getattr(flag.type, "__args__", ())}:
        assert any(end is not None for end in flag.range)


@pytest.mark.parametrize("name", METHODS)
def test_the_essential_flags_come_first(name):
    groups = usage(name).split("\n\n")
    [first] = [group for group in groups if group.startswith("Essential:")]
    listed = re.findall(r"^  --(\w+)", first, re.M)
    assert {"pretrained_model_name_or_path", "output_dir", "max_train_steps", "learning_rate"} <= set(listed)
    assert len(listed) <= 20
    everything = re.findall(r"^  --(\w+)", usage(name), re.M)
    assert sorted(everything) == sorted(table(configs(find_method(name))))


def test_values_from_python_are_of_the_flags_types(train, tmp_path):
    with pytest.raises(UserError, match=r"^rank must be a whole number, not '4'\."):
        train(rank="4")
    with pytest.raises(UserError, match=r"^validation_prompt must be a list of text"):
        train(validation_prompt="a dog")
    with pytest.raises(UserError, match=r"^mixed_precision must be one of no, fp16, bf16"):
        train(mixed_precision="fp8")
    assert not is_of_type(True, int)
    assert is_of_type(1, float)
    assert train(learning_rate=1, validation_prompt=("a sks dog",), max_train_steps=1).exists()


# defaults by method and base model


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("base_model", ["stickers", "somebody/model"])
def test_defaults_are_settings_of_their_method(name, base_model):
    method = find_method(name)
    known = table(configs(method))
    for setting, value in method.defaults_for(base_model, {}).items():
        assert is_of_type(value, known[setting].type)
        assert not isinstance(value, int | float) or known[setting].range.holds(value)


def test_what_is_given_beats_the_methods_default_and_that_the_configurations():
    (_, _, settings, method), used = complete("dreambooth", {"rank": 3})
    assert (method.rank, method.lora_layers, settings.learning_rate) == (3, "all", 1e-3)
    assert "rank" not in used
    assert used["learning_rate"] == 1e-3
    (_, _, settings, method), _ = complete("dreambooth", {"pretrained_model_name_or_path": "some/model"})
    assert (method.rank, method.lora_layers, settings.learning_rate) == (8, "attention", 1e-4)
    given = {"pretrained_model_name_or_path": "some/model", "full_finetune": True}
    assert complete("dreambooth", given)[0][2].learning_rate == 5e-6
    (_, data, settings, _), _ = complete("textual_inversion", {"placeholder_token": "<toy>"})
    assert (data.instance_prompt, settings.learning_rate) == ("a photo of <toy>", 1e-2)


def test_a_run_says_what_it_will_do_and_which_defaults_it_uses(base, images, tmp_path, capsys):
    words = ["dreambooth", "--pretrained_model_name_or_path", str(base), "--instance_data_dir", str(images)]
    words += ["--instance_prompt", "a sks dog", "--resolution", "16", "--output_dir", str(tmp_path / "run")]
    words += ["--max_train_steps", "3", "--train_batch_size", "2", "--rank", "2"]
    info = read_info(run(words))
    said = capsys.readouterr().out
    assert re.search(r"4 images, 3 steps of 2 images \(1\.5 epochs\), 1,376 trained parameters", said)
    assert "used, as nothing else is set: learning_rate 0.0001\n" in said
    assert info["config"]["learning_rate"] == 1e-4


def test_epochs_instead_of_steps(train, capsys):
    folder = train(
        max_train_steps=None, num_train_epochs=3, train_batch_size=2, gradient_accumulation_steps=2
    )
    assert read_info(folder)["step"] == 3  # two batches an epoch, two of them a step
    assert read_info(folder)["config"]["max_train_steps"] == 3
    with pytest.raises(UserError, match="both say when to stop"):
        train(num_train_epochs=1)
    with pytest.raises(UserError, match="this data has no end"):
        customize.train("ip_adapter", num_train_epochs=1, output_dir=folder.with_name("endless"))


# names of other tools


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "dreambooth", "--lr", "1"], "It is called --learning_rate here."),
        (["train", "dreambooth", "--network_dim", "1"], "It is called --rank here."),
        (["train", "dreambooth", "--weighting_scheme", "none"], "drawn logit-normal"),
        (["train", "custom_contrast", "--image", "a.png"], "It is called --train_data_dir here."),
        (
            ["generate", "stickers", "a fox", "--num_images", "2"],
            "It is called --num_images_per_prompt here.",
        ),
        (["generate", "stickers", "a fox", "--image", "a.png"], "It is called --subject_images here."),
        (["generate", "stickers", "a fox", "--steps", "2"], "It is called --num_inference_steps here."),
        (["train", "lora"], "It is called dreambooth here."),
        (["train", "fox.yaml"], "customize train dreambooth fox.yaml"),
        (["train", "toy.py"], "write it as FILE.py:Class"),
        (["train", "nowhere.py:Toy"], "There is no file 'nowhere.py'"),
    ],
)
def test_names_of_other_tools_are_known(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_every_other_name_is_that_of_a_flag_here():
    known = {flag.name for cls in ALL for flag in flags_of(cls)}
    for ours in FLAGS.values():
        assert set(ours) <= known
    assert all(text.endswith(".") for text in SENTENCES.values())


def test_names_in_a_file_too(tmp_path):
    (tmp_path / "run.yaml").write_text("network_dim: 4\n")
    with pytest.raises(UserError, match="It is called --rank here"):
        parse([DreamBooth.Config], [str(tmp_path / "run.yaml")])


def test_help_of_train_lists_the_methods(capsys):
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said and entry.summary in said for name, entry in METHODS.items())


# methods of one's own

TOY = '''"""Toy: DreamBooth with a penalty on large predictions."""

from dataclasses import dataclass

from customize.config import option
from customize.trainers.methods.dreambooth import DreamBooth, DreamBoothConfig


@dataclass
class ToyConfig(DreamBoothConfig):
    penalty_weight: float = option(0.1, "weight of the penalty on large predictions", least=0)


class Toy(DreamBooth):
    Config = ToyConfig

    def losses(self, step):
        penalty = self.config.penalty_weight * step.prediction.square().mean()
        return super().losses(step) | {"penalty": penalty}


class NoMethod:
    pass
'''


def test_a_method_in_a_file(train, tmp_path, capsys):
    (tmp_path / "toy.py").write_text(TOY)
    folder = train(f"{tmp_path / 'toy.py'}:Toy", penalty_weight=0.5)
    info = read_info(folder)
    assert (info["method"], info["config"]["penalty_weight"]) == ("Toy", 0.5)
    assert "Toy on" in capsys.readouterr().out
    assert load_pipeline(folder)
    assert main(["train", f"{tmp_path / 'toy.py'}:Toy", "--help"]) == 0
    assert "--penalty_weight" in capsys.readouterr().out
    for name, said in {
        "NoMethod": "no class 'NoMethod' derived from Method",
        "Tay": "no class 'Tay'",
    }.items():
        with pytest.raises(UserError, match=said):
            train(f"{tmp_path / 'toy.py'}:{name}")


@pytest.mark.parametrize("text", ["import nothing_of_this_name", "1 +", "raise KeyError('x')"])
def test_a_method_in_a_broken_file(tmp_path, text):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserError, match=r"broken\.py' cannot be imported"):
        find_method(f"{tmp_path / 'broken.py'}:Toy")


def test_a_method_of_another_package(tmp_path, monkeypatch, capsys):
    (tmp_path / "other_package.py").write_text(TOY)
    about = tmp_path / "other_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other_package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[customize.methods]\ntoy = other_package:Toy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_method("toy").__name__ == "Toy"
    assert main(["methods"]) == 0
    assert "toy                from other_package:Toy" in capsys.readouterr().out
    sys.modules.pop("other_package")


# resuming with other settings


def test_a_resumed_run_keeps_what_it_is_not_given(train, base, images):
    folder = train(learning_rate=3e-3, seed=5, num_validation_images=2)
    names = {"pretrained_model_name_or_path", "instance_data_dir", "rank", "checkpointing_steps"}
    left_out = dict.fromkeys([*names, "instance_prompt", "resolution"])
    again = train(**left_out, max_train_steps=4, resume_from_checkpoint="latest")
    config = read_info(again)["config"]
    assert (read_info(again)["step"], config["rank"], config["learning_rate"], config["seed"]) == (
        4,
        2,
        3e-3,
        5,
    )
    assert config["num_validation_images"] == 2
    whole = train(learning_rate=3e-3, seed=5, max_train_steps=4, output_dir=folder.with_name("whole"))
    first, second = load_file(again / LORA), load_file(whole / LORA)
    assert all(value.equal(second[name]) for name, value in first.items())


OTHER = {
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "seed": 1,
    "train_batch_size": 2,
    "rank": 4,
    "snr_gamma": 5.0,
    "instance_prompt": "a photo of sks cat",
    "resolution": 32,
    "random_flip": True,
    "holdout": 1,
    "use_ema": True,
    "adam_beta1": 0.8,
    "validation_metric": "score",
}


@pytest.mark.parametrize("name", OTHER)
def test_what_a_resumed_run_cannot_change_is_refused_by_name(train, name):
    folder = train()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    extra = {"validation_prompt": ["a photo of sks dog"]} if name == "validation_metric" else {}
    with pytest.raises(UserError, match=f"{name} .*a resumed run cannot change|instance_prompt"):
        train(resume_from_checkpoint="latest", max_train_steps=4, **{name: OTHER[name]}, **extra)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_every_setting_that_may_change_exists():
    known = {flag.name for name in METHODS for kind in configs(find_method(name)) for flag in flags_of(kind)}
    assert known >= MAY_CHANGE | COMPARED


def test_a_resumed_run_must_see_the_same_images_and_captions(train, images, tmp_path):
    folder = train()
    moved = shutil.copytree(images, tmp_path / "moved")
    train(resume_from_checkpoint="latest", max_train_steps=3, instance_data_dir=moved)  # the same images
    (moved / "0.txt").write_text("a photo of sks dog on grass")
    with pytest.raises(UserError, match="the captions are not those"):
        train(resume_from_checkpoint="latest", max_train_steps=4, instance_data_dir=moved)
    (moved / "0.txt").unlink()
    Image.new("RGB", (40, 32)).save(moved / "0.png")
    with pytest.raises(UserError, match=r"the images are not those .*\(1 new or changed, 1 missing\)"):
        train(resume_from_checkpoint="latest", max_train_steps=4, instance_data_dir=moved)
    assert read_info(folder)["step"] == 3


def test_a_resumed_run_must_have_the_same_base_model(train, base, tmp_path):
    own = shutil.copytree(base, tmp_path / "base")
    train(pretrained_model_name_or_path=own)
    with pytest.raises(UserError, match=r"pretrained_model_name_or_path .*cannot change"):
        train(resume_from_checkpoint="latest", max_train_steps=3)
    pipe = tiny("sd15")
    with torch.no_grad():
        pipe.unet.conv_in.weight += 1
    pipe.save_pretrained(own)
    with pytest.raises(UserError, match="the base model's weights are not those"):
        train(pretrained_model_name_or_path=own, resume_from_checkpoint="latest", max_train_steps=3)


def test_settings_of_an_earlier_run_that_are_damaged(train):
    folder = train()
    file = folder / "checkpoint-2" / "run.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"config": info["config"] | {"seed": "x"}}))
    with pytest.raises(UserError, match="is damaged \\(its seed is 'x'\\)"):
        train(resume_from_checkpoint="latest", max_train_steps=3)


# class images

PRIOR = {"with_prior_preservation": True, "num_class_images": 2, "overwrite_output_dir": True}


def test_class_images_are_drawn_anew_where_their_recipe_changes(train, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (16, 16), (1, 2, 3)).save(folder / "own.png")

    def drawn(**changes):
        train(**PRIOR | {"class_prompt": "a dog", "class_data_dir": folder} | changes)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first = drawn()
    assert first.keys() == {"own.png", "class-00000.png"}
    assert drawn() == drawn(seed=3) == first  # whatever the seed, they are images of the class
    with pytest.warns(UserWarning, match="1 class images .* are drawn anew from 'a cat'"):
        second = drawn(class_prompt="a cat")
    with pytest.warns(UserWarning, match="another class prompt, resolution or base model"):
        third = drawn(class_prompt="a cat", resolution=32)
    assert len({first["class-00000.png"], second["class-00000.png"], third["class-00000.png"]}) == 3
    assert first["own.png"] == second["own.png"] == third["own.png"]
    with Image.open(folder / "class-00000.png") as image:
        assert image.size == (32, 32)
        assert json.loads(image.info[RECIPE])["class_prompt"] == "a cat"


def test_one_folder_cannot_hold_the_images_of_two_classes(train, images, tmp_path):
    rows = [
        {
            "instance_data_dir": str(images),
            "instance_prompt": "a photo of sks dog",
            "class_prompt": text,
            "class_data_dir": str(tmp_path / "class"),
        }
        for text in ("a dog", "a cat")
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    given = {"instance_data_dir": None, "instance_prompt": None, "concepts_list": tmp_path / "list.json"}
    with pytest.raises(UserError, match="give each class prompt a folder of its own"):
        train(**PRIOR, **given)


# losses


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_the_instance_loss_alone(prediction):
    """As diffusers' script: the prior loss is the plain mean of squares."""
    pipe = tiny("sd15")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)
    backbone = wrap(pipe)
    concept = Concept("", "a sks dog", "a dog")
    method = DreamBooth(backbone, DreamBooth.Config(rank=2, snr_gamma=5.0), [concept])
    batch = {"prompt": ["a sks dog", "a dog"], "pixels": torch.rand(2, 3, 16, 16) * 2 - 1}
    batch |= {"is_prior": torch.tensor([False, True]), "concept": torch.zeros(2, dtype=torch.long)}
    seen = {}
    losses = method.losses
    method.losses = lambda step: seen.update(step=step) or losses(step)
    terms, step = method(batch), seen["step"]
    plain = (step.prediction - step.target).square().mean((1, 2, 3))
    weight = backbone.snr_weights(step.t, 5.0)
    assert terms["prior"].item() == pytest.approx(plain[1].item(), rel=1e-5)
    assert terms["denoise"].item() == pytest.approx((plain * weight)[0].item(), rel=1e-5)


def test_noise_offset_by_hand():
    method = Method(wrap(tiny("sd15")), MethodConfig(noise_offset=0.5), [])
    latents = torch.zeros(2, 4, 8, 8)
    torch.manual_seed(0)
    noise = method.draw_noise(latents)
    torch.manual_seed(0)
    plain, offset = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 1, 1)
    for i in range(2):
        for c in range(4):
            assert torch.allclose(noise[i, c], plain[i, c] + 0.5 * offset[i, c, 0, 0])


# SDXL's sizes


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((400, 300), (64, 64)), ((300, 400), (64, 64)), ((64, 64), (64, 64)), ((33, 70), (40, 64))],
)
def test_sizes_are_those_of_the_crop(size, bucket):
    """Checked by an image whose red is its column and green its row: where does the crop begin?"""
    height, width, top, left = sizes_of(size, *bucket).tolist()
    assert (width, height) == size
    scale = max(bucket[0] / size[1], bucket[1] / size[0])
    rows, columns = np.mgrid[: size[1], : size[0]]
    array = np.stack([columns, rows], -1).astype(np.float32)
    cut = [
        np.asarray(fit(Image.fromarray(array[..., i]), *bucket, resample=Image.Resampling.BILINEAR))
        for i in range(2)
    ]
    assert cut[0][:, 0].mean() * scale == pytest.approx(left, abs=1.01 + scale)
    assert cut[1][0].mean() * scale == pytest.approx(top, abs=1.01 + scale)


def test_the_time_ids_of_sdxl_follow_each_image():
    backbone = wrap(tiny("sdxl"))
    text = backbone.encode_prompt(["a dog", "a cat"])
    noisy = torch.zeros(2, 4, 8, 8)
    side = 8 * backbone.pipe.vae_scale_factor
    seen = []
    backbone.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"].tolist()),
        with_kwargs=True,
    )
    backbone.denoise(noisy, torch.full((2,), 0.5), Condition(text))
    assert seen[-1] == [[side, side, 0, 0, side, side]] * 2
    sizes = torch.tensor([[300, 400, 0, 7], [64, 32, 5, 0]])
    backbone.denoise(noisy, torch.full((2,), 0.5), Condition(text, sizes=sizes))
    assert seen[-1] == [[300, 400, 0, 7, side, side], [64, 32, 5, 0, side, side]]


@pytest.mark.parametrize("cached", [True, False])
def test_a_run_on_sdxl_trains_at_its_images_sizes(train, tmp_path, cached, monkeypatch):
    tiny("sdxl").save_pretrained(tmp_path / "sdxl")
    seen, losses = [], DreamBooth.losses
    monkeypatch.setattr(
        DreamBooth,
        "losses",
        lambda self, step: seen.append(step.condition.sizes.tolist()) or losses(self, step),
    )
    train(pretrained_model_name_or_path=tmp_path / "sdxl", cache_latents=cached, max_train_steps=1)
    assert seen == [[[32, 40, 0, 2]]]  # 40 x 32 pixels at 20 x 16, of which the middle 16 are kept


# options of some base models


def test_guidance_and_length_are_for_models_that_have_them():
    flux = wrap(tiny("flux"))
    assert not flux.takes_guidance
    with pytest.raises(UserError, match="--guidance_scale is for guidance-distilled models"):
        flux.configure(3.5, 0)
    with pytest.raises(UserError, match="--max_sequence_length is for models with T5"):
        wrap(tiny("sd15")).configure(1.0, 77)
    sd3 = wrap(tiny("sd3"))
    sd3.configure(1.0, 8)
    assert sd3.encode_prompt(["a dog"])["encoder_hidden_states"].shape[1] == 16 + 8


def test_the_guidance_reaches_a_distilled_model(monkeypatch):
    pipe = tiny("flux")
    config = dict(pipe.transformer.config) | {"guidance_embeds": True}
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    backbone, seen = wrap(pipe), []
    backbone.configure(3.5, 0)
    backbone.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["guidance"].tolist()), with_kwargs=True
    )
    text = backbone.encode_prompt(["a dog"])
    backbone.denoise(torch.zeros(1, 4, 8, 8), torch.tensor([0.5]), Condition(text))
    assert seen == [[3.5]]


def test_another_autoencoder_is_used_in_training_and_drawing(train, tmp_path):
    torch.manual_seed(5)
    vae().save_pretrained(tmp_path / "vae")
    folder = train(pretrained_vae_model_name_or_path=tmp_path / "vae")
    wanted = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(value.equal(wanted[name]) for name, value in load_pipeline(folder).vae.state_dict().items())
    with pytest.raises(UserError, match="pretrained_vae_model_name_or_path: '/nowhere' could not be loaded"):
        train(pretrained_vae_model_name_or_path="/nowhere", output_dir=tmp_path / "other")


def test_clip_skip_works(base):
    pipe = load_pipeline(base)
    states = {skip: pipe.encode_prompt("a dog", "cpu", 1, False, clip_skip=skip)[0] for skip in (None, 1)}
    ids = pipe.tokenizer("a dog", padding="max_length", max_length=16, return_tensors="pt").input_ids
    encoder = pipe.text_encoder
    hidden = encoder(ids, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(states[1], encoder.final_layer_norm(hidden))
    assert not torch.allclose(states[1], states[None])
    assert not hasattr(encoder, "text_model")


def test_a_base_of_a_relative_path_is_found_from_everywhere(base, images, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    given = {
        "instance_data_dir": images,
        "instance_prompt": "a sks dog",
        "resolution": 16,
        "max_train_steps": 1,
    }
    folder = customize.train(
        "dreambooth", pretrained_model_name_or_path="sd15", output_dir=tmp_path / "r", **given
    )
    monkeypatch.chdir(tmp_path)
    assert load_pipeline(folder).unet
    moved = shutil.copytree(base, tmp_path / "moved")
    info = read_info(folder) | {"base_model": "/gone"}
    (folder / "run.json").write_text(json.dumps(info))
    assert load_pipeline(folder, base_model=str(moved)).unet


# templates


@pytest.mark.parametrize("kind", TEMPLATES)
def test_random_prompts_around_a_word(kind):
    backbone = wrap(tiny("sd15"))
    concept = Concept("", "a photo of <toy>")
    config = TextualInversion.Config(
        placeholder_token="<toy>", initializer_token="dog", learnable_property=kind
    )
    method, seen = TextualInversion(backbone, config, [concept]), []
    backbone._encode_prompt = lambda prompts: seen.extend(prompts) or {}
    batch = {
        "prompt": ["a photo of <toy>", "a red <toy> on grass"],
        "concept": torch.zeros(2, dtype=torch.long),
    }
    for _ in range(60):
        method.condition(batch, torch.zeros(2))
    assert set(seen[1::2]) == {"a red <toy> on grass"}  # a caption of its own
    assert set(seen[::2]) == {template.format("<toy>") for template in TEMPLATES[kind]}


# the documentation says the same


def test_the_table_of_defaults_in_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    for name in METHODS:
        rows = re.findall(rf"^\| `{name}` \| (.*) \| (.*) \|$", text, re.M)
        assert len(rows) == 1, f"docs/training.md: the table of defaults needs one row for {name}"
        [row] = rows
        for listed, base_model in zip(row, ("somebody/model", "stickers"), strict=True):
            pairs = dict(pair.split(" ", 1) for pair in listed.split(", "))
            wanted = {
                key: str(value) for key, value in find_method(name).defaults_for(base_model, {}).items()
            }
            assert pairs == wanted, f"docs/training.md: mend the row of {name} in the table of defaults"


def test_a_method_in_a_file_can_import_its_neighbours(tmp_path):
    (tmp_path / "beside_the_method.py").write_text("WEIGHT = 3")
    lines = [
        "from beside_the_method import WEIGHT",
        "from customize.trainers.methods.dreambooth import DreamBooth",
        "class Own(DreamBooth):",
        "    weight = WEIGHT",
    ]
    (tmp_path / "own.py").write_text("\n".join(lines))
    assert find_method(f"{tmp_path / 'own.py'}:Own").weight == 3


def test_help_shows_the_whole_title_and_no_empty_defaults(capsys):
    assert main(["train", "dreambooth", "--help"]) == 0
    text = capsys.readouterr().out
    assert "(Ruiz et al., 2023, arXiv 2208.12242)." in text
    assert "default ''" not in text
    assert "default []" not in text


def test_the_toy_method_of_the_guide_trains(train, tmp_path):
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "guide.py").write_text(code)
    folder = train(f"{tmp_path / 'guide.py'}:Toy", penalty_weight=0.2)
    assert read_info(folder)["method"] == "Toy"
    assert load_pipeline(folder)
