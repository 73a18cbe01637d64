"""SeeCoder: its released layout against a re-computation by loops, and an image in the place of the
prompt."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from seecoder_by_hand import DIM, GLOBALS, LOCALS, PREFIX, ByHand, checkpoint
from test_encoder_training import subjects, trained
from test_reference_unet import noise
from test_subject_tasks import NAMES, call, stock_of
from transformers import SwinBackbone, SwinConfig, SwinForImageClassification

from customize.adapters.encoders.seecoder import SeeCoder
from customize.adapters.seecoder import FILE, SeeCoderAdapter, config_of
from customize.app.generate import generate
from customize.backbones.families import wrap
from customize.errors import UserError
from customize.pipelines.load import load_subject_pipeline, with_subjects
from customize.trainers.launch import run
from customize.trainers.methods.seecoder import SeeCoderMethod
from tiny import BASES, random, tiny

assert subjects  # a fixture
UNETS = ("sd15", "sdxl")
SMALL = {"decoder_layers": 1, "query_layers": 3, "local_queries": 6}
CASES = {"plain": {}, "reference": {"shown": "reference"}, "positions": {"position_aware": True}}
SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}


@pytest.fixture
def released(tmp_path):
    save_file(checkpoint(), tmp_path / "seecoder-v1-0.safetensors")
    return tmp_path / "seecoder-v1-0.safetensors"


def build(base: str, **options) -> SeeCoderMethod:
    backbone = wrap(tiny(base), f"tiny-{base}")
    backbone.resolution = 32
    torch.manual_seed(0)
    return SeeCoderMethod(backbone, SeeCoderMethod.Config(**(SMALL | options)))


def loaded(base: str, file, kind=None):
    pipe = with_subjects(kind or tiny(base))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_subject_adapter(file)
    return pipe


def draw(pipe, **options) -> np.ndarray:
    given = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np"}
    return pipe(**(given | {"generator": torch.Generator().manual_seed(1)} | options)).images


@pytest.mark.parametrize("position_aware", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@torch.no_grad()
def test_a_released_checkpoint_gives_the_context_that_loops_give(position_aware, size, tmp_path):
    """Windows, shifts and padding of Swin, the decoder's scales, global and local queries, positions."""
    state = checkpoint(position_aware)
    save_file(state, tmp_path / "a.safetensors")
    adapter = SeeCoderAdapter.read(tmp_path / "a.safetensors", tiny("sd15"))
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3))
    found = adapter.encoder(images)
    assert found.shape == (2, GLOBALS + LOCALS, DIM)
    for image, own in zip(images, found, strict=True):
        assert torch.allclose(own, ByHand(state).context(image), atol=2e-4)


@torch.no_grad()
def test_the_decoder_of_our_files_attends_over_the_tokens():
    state = {name.removeprefix(PREFIX): value for name, value in checkpoint().items()}
    encoder = SeeCoder(config_of(state, {"decoder_attends": True})).eval()
    features = [random(1, 4 * 2**i, s, s, seed=i) for i, s in ((1, 4), (2, 2), (3, 2))]
    names = [name for name in state if name.startswith("imdecoder.")]
    encoder.load_state_dict({name: state[name] for name in names}, strict=False)
    tags = dict(zip(("res3", "res4", "res5"), features, strict=True))
    by_hand = ByHand(checkpoint(), decoder_attends=True)
    wanted = by_hand.decoder({tag: x[0].permute(1, 2, 0) for tag, x in tags.items()})
    for own, other in zip(encoder.imdecoder(tags), wanted, strict=True):
        assert torch.allclose(own[0].permute(1, 2, 0), other, atol=1e-4)


def test_a_released_file_comes_back_in_its_own_layout(released, tmp_path):
    SeeCoderAdapter.read(released, tiny("sd15")).save(tmp_path)
    before, after = load_file(released), load_file(tmp_path / FILE)
    assert before.keys() == after.keys()
    indices = {name for name in before if name.endswith("relative_position_index")}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - indices)
    [first, *_] = (after[name] for name in sorted(indices))
    assert first.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


# in pipelines


@pytest.mark.parametrize("task", [None, *NAMES])
def test_the_call_is_that_of_the_stock_pipeline_with_the_context(task, released):
    pipe = loaded("sd15", released, stock_of(task, "sd15") if task else None)
    stock = stock_of(task, "sd15") if task else tiny("sd15")
    image = noise(0, (32, 32))
    context = pipe.encode_references(image)
    given = {"prompt_embeds": context, "negative_prompt_embeds": torch.zeros_like(context)}
    if task:
        drawn = call(pipe, task, None, subject_images=image)
        wanted = call(stock, task, None, **given)
    else:
        drawn = draw(pipe, subject_images=image)
        wanted = draw(stock, guidance_scale=2.0, **given)
    assert np.abs(drawn - wanted).max() < 1e-5


def test_several_images_and_several_drawings_of_each(released):
    pipe, a, b = loaded("sd15", released), noise(0), Image.new("RGB", (32, 32), "red")
    seeds, strong = [torch.Generator().manual_seed(i) for i in (1, 2, 1, 2)], {"guidance_scale": 40.0}
    drawn = draw(pipe, subject_images=[[a], [b]], num_images_per_prompt=2, generator=seeds, **strong)
    assert np.abs(drawn[0] - draw(pipe, prompt="", subject_images={"<s>": [a]}, **strong)[0]).max() < 1e-5
    assert np.abs(drawn[2] - draw(pipe, subject_images=b, **strong)[0]).max() < 1e-5
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-4
    plain = draw(tiny("sd15"), prompt="a photo of dog")
    assert np.array_equal(draw(pipe, prompt="a photo of dog"), plain)


# training


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", UNETS)
def test_it_trains_saves_and_reloads(base, case, subjects, tmp_path):
    method = build(base, **CASES[case])
    before = {name: value.detach().clone() for name, value in method.named_parameters()}
    names = set(method.trainable())
    trained(method, subjects, tmp_path)
    after = dict(method.named_parameters())
    assert all(name.startswith("adapter.encoder.") for name in names)
    assert all(torch.equal(before[name], after[name]) for name in after.keys() - names)
    moved = [name for name in names if not torch.equal(before[name], after[name])]
    still = names - set(moved)  # the features at stride 4 are not read
    assert still == {name for name in names if "hidden_states_norms.stage1" in name}
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        again = loaded(base, tmp_path)
        assert torch.allclose(method.adapter.encoder(pixels), again.adapter.encoder(pixels), atol=1e-6)
    assert again.adapter.resolution == 32
    assert again.adapter.encoder.config.decoder_attends
    assert draw(again, subject_images=noise(0)).std() > 0


def test_a_dropped_image_is_a_context_of_zeros():
    method = build("sd15", dropout_image=1.0).train()
    batch = {"pixels": random(2, 3, 32, 32), "references": random(2, 1, 2, 3, 32, 32)}
    assert not method.condition(batch, torch.zeros(2)).text["encoder_hidden_states"].any()
    assert method.eval().condition(batch, torch.zeros(2)).text["encoder_hidden_states"].any()


@pytest.mark.parametrize("kind", [SwinBackbone, SwinForImageClassification])
def test_a_swin_transformer_that_is_named_is_frozen(kind, tmp_path):
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]} if kind is SwinBackbone else {}
    kind(SwinConfig(**SWIN, **stages)).save_pretrained(tmp_path)
    method = build("sd15", swin=str(tmp_path))
    assert not any("imencoder" in name for name in method.trainable())
    assert method.adapter.encoder.imencoder.channels == [12, 24, 48, 96]
    method.adapter.save(tmp_path / "..")
    assert loaded("sd15", tmp_path / ".." / FILE).adapter.encoder.imencoder.channels == [12, 24, 48, 96]


def test_a_released_file_is_gone_on_from_with_its_swin_frozen(released, subjects, tmp_path):
    backbone = wrap(tiny("sd15"), "tiny")
    backbone.resolution = 32
    method = SeeCoderMethod(backbone, SeeCoderMethod.Config(pretrained_adapter=str(released)))
    assert method.adapter.encoder.qtransformer.globals == GLOBALS
    trained(method, subjects, tmp_path / "run")
    before, after = load_file(released), load_file(tmp_path / "run" / FILE)
    for name in before.keys() - {name for name in before if name.endswith("position_index")}:
        assert torch.equal(before[name], after[name]) == ("imencoder" in name), name
    assert not loaded("sd15", tmp_path / "run").adapter.encoder.config.decoder_attends


def test_a_run_is_trained_and_drawn_from_the_command_line(subjects, tmp_path):
    tiny("sd15").save_pretrained(tmp_path / "base")
    flags = {"pretrained_model_name_or_path": tmp_path / "base", "train_data_dir": subjects, "resolution": 32}
    flags |= {"holdout": 2, "validation_steps": 2, "train_batch_size": 2, "max_train_steps": 2}
    flags |= SMALL | {"output_dir": tmp_path / "run", "mixed_precision": "bf16"}
    words = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    run(["seecoder", *words, "--gradient_checkpointing"])
    image = str(subjects / "dog0" / "0.png")
    options = ["--num_inference_steps", "2", "--device", "cpu", "--subject_images", image]
    generate([str(tmp_path / "run"), *options])
    [drawn] = (tmp_path / "run/generated").glob("*.png")
    assert json.loads(Image.open(drawn).text["parameters"])["prompt"] == ""
    with pytest.raises(UserError, match="in the place of the prompt: leave the prompt out"):
        generate([str(tmp_path / "run"), "a dog", *options])
    with pytest.raises(UserError, match="is a subject encoder: name images"):
        generate([str(tmp_path / "run")])
    pipe = load_subject_pipeline(tmp_path / "run")
    assert pipe.adapter.replaces_prompt


# bad input


@pytest.mark.parametrize("base", [base for base in BASES if base not in UNETS])
def test_transformers_are_refused(base):
    with pytest.raises(UserError, match="needs a UNet"):
        build(base)


WRONG = {
    "a prompt": ({"prompt": "a dog"}, "prompt: the image takes the place of the prompt"),
    "a negative prompt": ({"negative_prompt": "a dog"}, "negative_prompt: the image takes"),
    "two images": ({"subject_images": ["a.png", "b.png"]}, "not 2; give one"),
    "two subjects": ({"subject_images": {"<s>": "a.png", "<s2>": "b.png"}}, "give <s> alone"),
    "a scale": ({"subject_scale": 0.5}, "subject_scale: the image takes"),
    "maps": ({"attention_maps": ["dog"]}, "attention_maps: the image takes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_with_an_image_instead_of_a_prompt_is_refused(case, released):
    options, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        draw(loaded("sd15", released), **({"subject_images": noise(0)} | options))


def test_another_width_and_damaged_files_are_refused(released):
    with pytest.raises(UserError, match="contexts of width 16, and this base model reads 32"):
        loaded("sdxl", released)
    state, name = load_file(released), f"{PREFIX}imencoder.norm2.weight"
    for changed in (
        {k: v for k, v in state.items() if k != name},
        state | {name: torch.zeros(3)},
        state | {f"{PREFIX}imencoder.more": torch.zeros(3)},
        state | {f"{PREFIX}imdecoder.more": torch.zeros(3)},
    ):
        save_file(changed, released)
        with pytest.raises(UserError, match="is damaged or no SeeCoder"):
            loaded("sd15", released)
    save_file(state | {name: state[name] * torch.nan}, released)
    with pytest.raises(UserError, match=released.name):
        loaded("sd15", released)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swin": "nowhere"}, "--swin: 'nowhere' could not be loaded"),
        ({"heads": 3}, "--heads 3 does not divide 16"),
        ({"pretrained_adapter": "nowhere"}, "there is no subject encoder at 'nowhere'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build("sd15", **options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--validation_prompt", "a dog"], "draws from images, not from validation prompts"),
        (["--export_kohya"], "--export_kohya is for LoRA"),
        (["--pretrained_adapter", "a", "--heads", "4"], "--heads: --pretrained_adapter has sizes of its own"),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(["seecoder", "--output_dir", str(tmp_path / "run"), *flags])
