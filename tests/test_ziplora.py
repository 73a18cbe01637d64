"""ZipLoRA: coefficients of columns by hand, each LoRA as it was, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import customize
from customize.adapters.lora_reading import read_lora
from customize.adapters.zipped_lora import ZippedLora
from customize.backbones.base import Condition
from customize.backbones.families import wrap
from customize.errors import UserError
from customize.files import header
from customize.pipelines import load_pipeline
from customize.trainers.methods.ziplora import ZipLoRA
from tiny import draw, random, tiny

FILE = "pytorch_lora_weights.safetensors"
PROMPTS = ("a photo of sks dog", "a cat in red style")


def train(method: str, folder, **options):
    return customize.train(method, output_dir=folder, resolution=16, **options)


@pytest.fixture
def runs(images, tmp_path):
    return two_runs("sd15", "all", images, tmp_path)


def two_runs(base: str, all_layers: str, images, tmp_path):
    """Two runs of other ranks and layers, and flags to zip them with."""
    tiny(base).save_pretrained(tmp_path / "base")
    flags = {"pretrained_model_name_or_path": tmp_path / "base"}
    found = []
    for seed, (rank, layers) in enumerate(((2, "attention"), (3, all_layers))):
        options = {
            "rank": rank,
            "lora_layers": layers,
            "seed": seed,
            "max_train_steps": 2,
            "learning_rate": 0.05,
        }
        data = {"instance_data_dir": images, "instance_prompt": PROMPTS[seed]}
        found.append(train("dreambooth", tmp_path / f"run{seed}", **flags, **data, **options))
    concepts = [{"instance_data_dir": str(images), "instance_prompt": prompt} for prompt in PROMPTS]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    flags |= {"concepts_list": tmp_path / "concepts.json", "loras": [str(run) for run in found]}
    return found, flags


def zipped(runs) -> ZippedLora:
    backbone = wrap(tiny("sd15"), "sd15")
    return ZippedLora(backbone, [read_lora(run, backbone.pipe) for run in runs])


def test_at_the_start_it_is_the_sum_and_alone_each_lora_as_it_was(runs, tmp_path):
    found, _ = runs
    lora = zipped(found)
    both = tiny("sd15")
    for name, run in zip("ab", found, strict=True):
        both.load_lora_weights(str(run), weight_name=FILE, adapter_name=name)
    both.set_adapters(["a", "b"])
    assert abs(draw(lora.backbone.pipe, PROMPTS[0]) - draw(both, PROMPTS[0])).max() < 1e-5
    for index, name in enumerate("ab"):
        both.set_adapters([name])
        with lora.only(index):
            assert abs(draw(lora.backbone.pipe, PROMPTS[0]) - draw(both, PROMPTS[0])).max() < 1e-5


def test_an_update_is_the_sum_of_scaled_columns_by_hand(runs):
    found, _ = runs
    lora = zipped(found)
    pipe = tiny("sd15")
    own = [read_lora(run, pipe) for run in found]
    for i, coefficients in enumerate(lora.coefficients):
        coefficients.data = random(*coefficients.shape, seed=i)
    assert len(lora.updates()) == len(own[1]) > len(own[0])
    for (key, update), coefficients in zip(lora.updates().items(), lora.coefficients, strict=True):
        expected = torch.zeros_like(update.delta)
        sides = update.delta.shape[1] // coefficients.shape[1]  # of a convolution's kernel
        for m, layers in zip(coefficients, own, strict=True):
            for column in range(expected.shape[1] if key in layers else 0):
                expected[:, column] += m[column // sides] * layers[key].delta[:, column]
        assert torch.allclose(update.delta, expected, atol=1e-5)
    by_hand = sum(
        float((m[0] * m[1]).abs().sum()) / m.shape[1] for m in (own.detach() for own in lora.coefficients)
    )
    assert lora.overlap().item() == pytest.approx(by_hand, rel=1e-5)


def test_the_target_is_what_the_lora_of_each_concept_predicts(runs, monkeypatch):
    found, flags = runs
    backbone = wrap(tiny("sd15"), str(flags["pretrained_model_name_or_path"]))
    backbone.resolution = 32
    method = ZipLoRA(backbone, ZipLoRA.Config(loras=flags["loras"], overlap_weight=0.5), [None, None])
    for i, coefficients in enumerate(method.lora.coefficients):
        coefficients.data = random(*coefficients.shape, seed=i)
    steps = []
    monkeypatch.setattr(method, "losses", lambda step: steps.append(step) or ZipLoRA.losses(method, step))
    order = [1, 0, 1]
    batch = {"prompt": [PROMPTS[i] for i in order], "concept": torch.tensor(order)}
    terms = method({"pixels": random(3, 3, 32, 32).clamp(-1, 1), **batch})
    (step,), errors = steps, []
    for i, index in enumerate(order):
        alone = wrap(tiny("sd15"), "sd15")
        alone.pipe.load_lora_weights(str(found[index]), weight_name=FILE)
        text = Condition(alone.encode_prompt([PROMPTS[index]]))
        with torch.no_grad():
            target = alone.denoise(step.noisy[i : i + 1], step.t[i : i + 1], text)
        errors.append(float((step.prediction[i : i + 1] - target).square().mean()))
    assert float(terms["denoise"]) == pytest.approx(sum(errors) / 3, rel=1e-4)
    assert float(terms["overlap"]) == pytest.approx(0.5 * float(method.lora.overlap()), rel=1e-5)
    assert len(method.trainable()) == len(method.lora.layers)
    gradients = torch.autograd.grad(sum(terms.values()), list(method.trainable().values()))
    assert all(g.any() for g in gradients)


def test_a_run_lowers_the_overlap_and_stock_diffusers_reads_it(runs, tmp_path):
    found, flags = runs
    before = [(run / FILE).read_bytes() for run in found]
    run = train(
        "ziplora", tmp_path / "zip", **flags, max_train_steps=20, learning_rate=0.05, export_kohya=True
    )
    assert [(run / FILE).read_bytes() for run in found] == before
    sums, ours = zipped(found).updates(), read_lora(run, tiny("sd15"))
    assert max(float((ours[key].delta - sums[key].delta).abs().max()) for key in sums) > 1e-4
    assert json.loads(header(run / FILE)["made_from"]) == {"how": "ziplora", "merged": ["run0", "run1"]}
    expected = draw(load_pipeline(run), PROMPTS[0])
    for file in (FILE, "lora_kohya.safetensors"):
        stock = tiny("sd15")
        stock.load_lora_weights(str(run), weight_name=file)
        assert abs(draw(stock, PROMPTS[0]) - expected).max() < 1e-5
    assert "lora_unet_down_blocks_0_attentions_0_proj_in.alpha" in load_file(run / "lora_kohya.safetensors")


@pytest.mark.parametrize("base", ["sdxl", "sd3", "flux"])
def test_other_base_models(base, images, tmp_path):
    layers = "all" if base == "sdxl" else "attention+ff"
    _, flags = two_runs(base, layers, images, tmp_path)
    run = train("ziplora", tmp_path / "zip", **flags, max_train_steps=2)
    stock = tiny(base)
    stock.load_lora_weights(str(run), weight_name=FILE)
    assert abs(draw(stock, PROMPTS[0]) - draw(load_pipeline(run), PROMPTS[0])).max() < 1e-5


def test_gradient_checkpointing_changes_no_gradient(runs):
    _, flags = runs
    found = []
    for checkpointing in (False, True):
        backbone = wrap(tiny("sd15"), str(flags["pretrained_model_name_or_path"]))
        backbone.resolution = 32
        method = ZipLoRA(backbone, ZipLoRA.Config(loras=flags["loras"]), [None, None]).train()
        if checkpointing:
            method.enable_gradient_checkpointing()
        for i, coefficients in enumerate(method.lora.coefficients):
            coefficients.data = random(*coefficients.shape, seed=i)
        torch.manual_seed(0)
        batch = {"prompt": list(PROMPTS), "concept": torch.arange(2)}
        terms = method({"pixels": random(2, 3, 32, 32).clamp(-1, 1), **batch})
        found.append(torch.autograd.grad(sum(terms.values()), list(method.trainable().values())))
    for plain, again in zip(*found, strict=True):
        assert torch.allclose(plain, again, rtol=1e-3, atol=1e-6)


MISTAKES = {
    "none": ({"loras": []}, "names 0 LoRAs, and there are 2"),
    "one": ({"loras": ["RUN"]}, "names 1 LoRAs"),
    "three": ({"loras": ["RUN", "RUN", "RUN"]}, "names 3 LoRAs, and there are 2"),
    "missing": ({"loras": ["RUN", "nowhere"]}, "there is no 'nowhere'"),
    "text encoder": ({"loras": ["RUN", "TEXT"]}, "one has LoRA of the text_encoder too"),
    "words": ({"loras": ["RUN", "WORD"]}, "has learned words"),
    "another base": ({"loras": ["RUN", "OTHER"]}, "was trained on"),
    "weight": ({"overlap_weight": -1.0}, "overlap_weight"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_training(name, runs, images, tmp_path, monkeypatch):
    found, flags = runs
    changes, said = MISTAKES[name]
    base = {"pretrained_model_name_or_path": tmp_path / "base", "max_train_steps": 1, "rank": 2}
    data = {"instance_data_dir": images, "instance_prompt": PROMPTS[0]}
    places = {
        "RUN": found[0],
        "TEXT": tmp_path / "text",
        "WORD": tmp_path / "word",
        "OTHER": tmp_path / "other",
    }
    wanted = changes.get("loras", [])
    if "TEXT" in wanted:
        train("dreambooth", places["TEXT"], **base, **data, train_text_encoder=True)
    if "WORD" in wanted:
        word = {"placeholder_token": "<toy>", "initializer_token": "dog", "instance_prompt": "a <toy>"}
        train("pivotal_tuning", places["WORD"], **(base | data | word))
    if "OTHER" in wanted:
        tiny("sdxl").save_pretrained(tmp_path / "xl")
        train(
            "dreambooth",
            places["OTHER"],
            **(base | {"pretrained_model_name_or_path": tmp_path / "xl"}),
            **data,
        )
    if wanted:
        changes = {"loras": [str(places.get(own, own)) for own in wanted]}
    monkeypatch.setattr(ZipLoRA, "forward", lambda *_: pytest.fail("it trained"))
    with pytest.raises(UserError, match=said):
        train("ziplora", tmp_path / "zip", **(flags | {"max_train_steps": 1} | changes))
