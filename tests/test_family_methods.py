"""Every method on every family of base models, as a user runs it: it trains, and what it saves draws the same
image again; or it refuses in one sentence."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import customize
from conftest import write_noise
from customize.adapters.lora_files import LORA
from customize.backbones.families import as_called
from customize.errors import UserError
from tiny_families import FAMILIES, tiny_family

WORD = {"placeholder_token": "<toy>", "initializer_token": "dog", "instance_prompt": "a photo of <toy>"}
TWO = {"placeholder_token": "<toy>+<pet>", "initializer_token": "dog+cat"}
TWO |= {"instance_prompt": "a photo of <toy> on <pet>"}
SKS = {"instance_prompt": "a photo of sks dog"}
TEACHER = {"with_prior_preservation": True, "prior_source": "teacher", "class_prompt": "a photo of dog"}
METHODS = {
    "dreambooth": SKS | TEACHER | {"rank": 2, "gradient_checkpointing": True, "lora_layers": "all"},
    "textual_inversion": WORD | {"num_vectors": 2},
    "pivotal_tuning": WORD | {"rank": 2},
    "mcpl": TWO,
    "core": WORD,
    "single_insert": WORD | {"rank": 2, "encoder_dim": 64, "encoder_depth": 1},
    "break_for_make": SKS | {"rank": 2},
    "domain_encoder": {"image_encoder": "stickers", "rank": 2, "hard_path": 0.0, "learning_rate": 1e-3},
    "custom_contrast": {},
    "ip_adapter": {},
    "reference_unet": {},
    "seecoder": {"decoder_layers": 1, "query_layers": 3},
    "in_context": {"reference_resolution": 64, "rank": 2, "instance_prompt": "a photo of a <s> dog"},
}
# what a method needs that only some models have, as its refusal says
MAPS = r"attention maps: a \w+ has no cross-attention that can be read"
UNETS = r"needs a UNet \(Stable Diffusion 1.x, 2.x, XL\)"
REFUSED = {
    ("mcpl", "*"): MAPS,
    ("core", "*"): MAPS,
    ("custom_contrast", "*"): UNETS,
    ("ip_adapter", "*"): UNETS,
    ("reference_unet", "*"): UNETS,
    ("seecoder", "*"): UNETS,
    ("in_context", "*"): r"shown images \(Flux\.2, Flux\.1 Kontext, Qwen-Image-Edit-Plus\)",
    ("*", "qwen_image_edit"): r"edits images .* train it with in_context",
}
WORKS = {("mcpl", "kontext"), ("core", "kontext")}
WORKS |= {("in_context", family) for family in ("klein", "flux2", "kontext", "qwen_image_edit")}


ENCODERS = {"domain_encoder", "custom_contrast", "ip_adapter", "reference_unet", "seecoder", "in_context"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Saved tiny models, images, and images with a mask."""
    place = tmp_path_factory.mktemp("families")
    write_noise(place / "images")
    (place / "subjects").mkdir()
    write_noise(place / "subjects" / "dog")
    (place / "cut").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    pixels[8:24, 8:24, 3] = 255
    Image.fromarray(pixels).save(place / "cut" / "0.png")
    return place


def run(family: str, method: str, places, output, **more):
    if not (places / family).exists():
        tiny_family(family).save_pretrained(places / family)
    name = "train_data_dir" if method in ENCODERS else "instance_data_dir"
    folder = {"single_insert": "cut"} | dict.fromkeys(ENCODERS, "subjects")
    data = {name: places / folder.get(method, "images"), "resolution": 32}
    common = {"max_train_steps": 2, "train_batch_size": 2, "learning_rate": 0.5}
    settings = common | data | METHODS[method] | more
    return customize.train(
        method, pretrained_model_name_or_path=places / family, output_dir=output, **settings
    )


def draw(pipe, prompt: str, **more):
    pipe.set_progress_bar_config(disable=True)
    sides = {"height": 32, "width": 32, "generator": torch.Generator().manual_seed(0)}
    return pipe(**as_called(pipe, {"prompt": prompt, **sides, **more})).images[0]


def levels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_draws_again_or_refuses(family, method, places, tmp_path, late_denoiser):
    refusal = REFUSED.get(("*", family)) or REFUSED.get((method, "*"))
    if refusal and (method, family) not in WORKS:
        with pytest.raises(UserError, match=refusal):
            run(family, method, places, tmp_path / "run")
        assert not (tmp_path / "run" / "run.json").exists()
        return
    if method in ("domain_encoder", "in_context"):  # they draw nothing without images
        made = run(family, method, places, tmp_path / "run")
        assert json.loads((made / "run.json").read_text())["step"] == 2
        if method == "domain_encoder":
            METHODS["domain_tuning"] = SKS | {"domain_encoder": made, "instance_prompt": "a photo of <s>"}
            tuned = run(family, "domain_tuning", places, tmp_path / "tuned")
            assert levels(draw(customize.load_pipeline(tuned), "a photo of <s>")).shape == (32, 32, 3)
        return
    prompt = METHODS[method]["instance_prompt"]
    folder = run(family, method, places, tmp_path / "run", validation_prompt=[prompt], validation_steps=2)
    if method == "dreambooth":
        assert late_denoiser[0] == 0  # no text encoder was left when it came
    assert json.loads((folder / "run.json").read_text())["step"] == 2
    # the image of the training's own validation, which may have drawn from cached prompts
    shown = levels(Image.open(folder / "samples" / "step-000002.png"))
    short = {"max_sequence_length": 16} if family == "kontext" else {}  # as the tiny model's T5 reads
    again = draw(customize.load_pipeline(folder), prompt, num_inference_steps=25, **short)
    if family != "kontext" or "placeholder_token" not in METHODS[method]:
        assert np.abs(shown - levels(again)).max() <= 2
    plain = draw(customize.load_pipeline(places / family), prompt, num_inference_steps=25, **short)
    changed = np.abs(levels(plain) - levels(again)).max()
    assert changed > 0
    if "placeholder_token" not in METHODS[method]:
        assert changed > 2
        stock = tiny_family(family)
        stock.load_lora_weights(str(folder), weight_name=LORA)
        drawn = draw(stock, prompt, num_inference_steps=25, **short)
        assert np.abs(levels(drawn) - levels(again)).max() <= 2
    if method == "dreambooth":
        joins(family, folder, places, tmp_path / "joined")


def joins(family: str, lora, places, output):
    """ZipLoRA of two LoRAs, which are the same here, reads in stock diffusers."""
    concepts = output.with_suffix(".json")
    concepts.write_text(json.dumps([{"instance_data_dir": str(places / "images"), **SKS}] * 2))
    made = customize.train(
        "ziplora",
        loras=[lora, lora],
        concepts_list=concepts,
        pretrained_model_name_or_path=places / family,
        resolution=32,
        max_train_steps=2,
        output_dir=output,
    )
    stock = tiny_family(family)
    stock.load_lora_weights(str(made), weight_name=LORA)
    found = (levels(draw(own, SKS["instance_prompt"])) for own in (stock, customize.load_pipeline(made)))
    assert np.abs(next(found) - next(found)).max() <= 1
