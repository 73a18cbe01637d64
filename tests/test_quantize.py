"""Frozen weights in 8 or 4 bits: which layers, how exact, how small, and that LoRA beside them trains and
works with the base model as it is."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_family_methods import WORD, draw, levels
from torch import nn

import customize
from customize.adapters.components import Components
from customize.adapters.lora_files import LORA
from customize.backbones import quantize as quantizing
from customize.backbones.base import Condition
from customize.backbones.families import BACKBONES, wrap
from customize.backbones.load import load_base
from customize.backbones.quantize import QuantizedLinear, check_quantization, quantize, restored
from customize.data.concepts import Concept
from customize.errors import UserError
from customize.trainers.methods.dreambooth import DreamBooth
from tiny import BASES, tiny
from tiny_families import FAMILIES, OF_TEXT, tiny_family

KINDS = ("int8", "fp8", "nf4")
CPU = torch.device("cpu")
# relative error of a Gaussian weight matrix, and bytes a weight with its scales
EXPECTED = {"int8": (0.0075, 1.02), "fp8": (0.026, 1.02), "nf4": (0.092, 0.6)}
SIZES = {"int8": 1, "fp8": 1, "nf4": 0.5}


def layer(kind: str, dtype=torch.float32, sizes=(128, 96), bias=True) -> nn.Module:
    """The layer `blocks.0.to_q` of a module, of Gaussian weights."""
    torch.manual_seed(5)
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(*sizes, bias=bias)})])})
    own = module["blocks"][0]
    nn.init.normal_(own["to_q"].weight)
    module.to(dtype).requires_grad_(False)
    if kind != "none":
        assert quantize(module, kind, CPU) == 1
    return own["to_q"]


def stored_bytes(weight) -> int:
    """What a weight takes in memory, with its scales."""
    if hasattr(weight, "quant_state"):
        parts = [weight.data, weight.quant_state.absmax, weight.quant_state.code]
    elif hasattr(weight, "qdata"):
        parts = [weight.qdata, weight.scale]
    else:
        parts = [weight]
    return sum(part.numel() * part.element_size() for part in parts)


# one layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_keeps_its_values_in_fewer_bytes(kind, dtype):
    error, size = EXPECTED[kind]
    plain, made = layer("none", dtype, (512, 512)), layer(kind, dtype, (512, 512))
    wanted, found = plain.weight.float(), restored(made.weight).float()
    assert 0.5 * error < (found - wanted).norm() / wanted.norm() < 1.2 * error
    assert stored_bytes(made.weight) / wanted.numel() < size
    assert stored_bytes(made.weight) / wanted.numel() >= SIZES[kind]
    assert restored(plain.weight) is plain.weight


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient_are_those_of_the_restored_weights(kind):
    made = layer(kind)
    weight, x = restored(made.weight), torch.randn(3, 5, 128, requires_grad=True)
    y = made(x)
    assert torch.allclose(y, F.linear(x, weight, made.bias), atol=1e-5)
    gradient = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, gradient)
    assert torch.allclose(found, torch.einsum("abo,oi->abi", gradient, weight), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_restored_weights_are_not_kept_for_the_backward_pass(kind):
    """Else all of them would be in memory at once, and nothing were saved."""
    made, kept = layer(kind), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(torch.randn(2, 128, requires_grad=True)).sum()
    assert all(value.numel() < made.in_features * made.out_features for value in kept)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_acts_on_quantised_layers_too(kind):
    made = layer(kind, torch.bfloat16)
    x = torch.randn(2, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert torch.allclose(x.grad, restored(made.weight).float().sum(0).expand(2, -1), rtol=0.02, atol=0.1)


def test_trained_bias_and_weights_do_not_exist():
    for kind in KINDS:
        assert not any(p.requires_grad for p in layer(kind).parameters())


# which layers

# of each base, layers of blocks, and layers around them
NAMES = {
    "sd15": (["attn1.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"], ["conv_in", "time_embedding"]),
    "flux": (["attn.add_k_proj", "ff_context.net.2", "norm1.linear"], ["x_embedder", "norm_out", "time_"]),
    "qwen_image": (["attn.to_q", "img_mlp.net.2", "img_mod.1"], ["img_in", "txt_in", "time_text_embed"]),
    "z_image": (["attention.to_q", "feed_forward.w1"], ["cap_embedder", "t_embedder", "final_layer"]),
}


def pipe_of(base: str):
    return tiny(base) if base in BASES else tiny_family(base)


@pytest.mark.parametrize("base", [*BASES, *FAMILIES])
def test_the_layers_of_blocks_are_quantised_and_those_around_them_are_not(base):
    backbone = wrap(pipe_of(base), base)
    backbone.quantize("int8", "none", CPU)
    found = {name for name, own in backbone.denoiser.named_modules() if isinstance(own, QuantizedLinear)}
    blocks = {name for name, own in backbone.denoiser.named_modules() if isinstance(own, nn.ModuleList)}
    assert found
    assert all(any(name.startswith(f"{block}.") for block in blocks) for name in found)
    within, around = NAMES.get(base, ([], []))
    assert all(any(name.endswith(end) for name in found) for end in within)
    assert not any(name.startswith(part) for name in found for part in around)
    assert not found & {"proj_out", "proj_in", "norm_out.linear"}
    assert not any(isinstance(own, QuantizedLinear) for own in backbone.text_encoders.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["flux", "klein", "qwen_image", "sana"])
def test_text_encoders_encode_nearly_as_before(kind, base):
    plain, made = (wrap(pipe_of(base), base) for _ in range(2))
    made.quantize("none", kind, CPU)
    for encoder in made.text_encoders:
        assert any(isinstance(own, QuantizedLinear) for own in encoder.modules())
        assert not isinstance(encoder.get_input_embeddings(), QuantizedLinear)
    with torch.no_grad():
        before, after = (own.encode_prompt(["a photo of a dog"]) for own in (plain, made))
    for name, value in before.items():
        if value.is_floating_point() and "mask" not in name:
            error = (after[name].float() - value.float()).norm() / value.float().norm()
            assert 0 <= error < 5 * EXPECTED[kind][0], name


def test_a_layer_whose_model_casts_to_its_type_is_not_packed():
    """T5's last feed-forward layer: its input would be cast to bytes."""
    for kind, quantised in (("nf4", False), ("int8", True)):
        backbone = wrap(tiny("flux"), "flux")
        backbone.quantize("none", kind, CPU)
        t5 = backbone.text_encoders[1]
        layers = {n: own for n, own in t5.named_modules() if n.endswith("DenseReluDense.wo")}
        assert layers
        assert all(isinstance(own, QuantizedLinear) == quantised for own in layers.values())


# whole models


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedded_model_predicts_nearly_as_before(kind):
    """docs/memory.md has the measured errors."""
    predictions, sizes = [], []
    for own in ("none", kind):
        backbone = wrap(load_base("stickers"), "stickers")
        backbone.quantize(own, "none", CPU)
        generator = torch.Generator().manual_seed(0)
        noisy = torch.randn(8, *backbone.latent_shape(128)[1:], generator=generator)
        with torch.no_grad():
            text = {k: v.repeat_interleave(8, 0) for k, v in backbone.encode_prompt(["a red dog"]).items()}
            t = torch.linspace(0.1, 0.9, 8)
            condition = Condition(text)
            predictions.append(backbone.denoise(noisy, backbone.nearest_times(t), condition))
        blocks = [
            layer.weight
            for name, layer in backbone.denoiser.named_modules()
            if isinstance(layer, nn.Linear) and "transformer_blocks" in name
        ]
        sizes.append(sum(map(stored_bytes, blocks)))
    error = (predictions[1] - predictions[0]).norm() / predictions[0].norm()
    assert 0 < error < 2 * EXPECTED[kind][0]
    assert sizes[1] / sizes[0] < EXPECTED[kind][1] / 4 * 1.1  # of float32's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [*BASES, *OF_TEXT])
def test_lora_trains_beside_quantised_weights_and_loads_without_them(kind, base, tmp_path):
    backbone = wrap(pipe_of(base), base)
    backbone.resolution = 32
    backbone.quantize(kind, "none", CPU)
    layers = {n: own for n, own in backbone.denoiser.named_modules() if isinstance(own, QuantizedLinear)}
    before = {n: restored(own.weight).clone() for n, own in layers.items()}
    config = DreamBooth.Config(rank=2)
    method = DreamBooth(backbone, config, [Concept("x", "a photo of sks dog", "a dog")]).train()
    trained = method.trainable()
    assert {value.dtype for value in trained.values()} == {torch.float32}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):  # B starts at zero, so that A has no gradient in the first step
        optimizer.zero_grad()
        batch = {"pixels": torch.rand(1, 3, 32, 32) * 2 - 1, "prompt": ["a photo of sks dog"]}
        batch |= {"is_prior": torch.tensor([False]), "concept": torch.tensor([0])}
        batch |= {"sizes": torch.tensor([[32, 32, 0, 0]])}
        method(batch)["denoise"].backward()
        gradients = [value.grad for value in trained.values()]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        optimizer.step()
    assert any(g.abs().max() > 0 for name, g in zip(trained, gradients, strict=True) if "lora_A" in name)
    for name, own in layers.items():
        assert torch.equal(restored(own.weight), before[name])
        assert own.weight.grad is None
    for adapter in method.adapters:
        adapter.save(tmp_path)
    stock = pipe_of(base)
    plain = levels(draw(stock, "a photo of sks dog", num_inference_steps=2, **short(base)))
    stock.load_lora_weights(str(tmp_path), weight_name=LORA)
    loaded = [
        p for part in ("unet", "transformer") if part in stock.components
        for n, p in getattr(stock, part).named_parameters() if "lora_" in n
    ]  # fmt: skip
    assert len(loaded) == len(trained)
    saved = load_file(tmp_path / LORA)
    sums = sorted(float(value.abs().sum()) for value in saved.values())
    assert sums == pytest.approx(sorted(float(p.detach().abs().sum()) for p in loaded), rel=1e-5)
    assert (
        plain.shape == levels(draw(stock, "a photo of sks dog", num_inference_steps=2, **short(base))).shape
    )


def short(base: str) -> dict:
    """As the tiny models' T5 reads."""
    return {"max_sequence_length": 16} if base in ("kontext", "flux", "sd3") else {}


# runs


def train(folder, images, method="dreambooth", **settings):
    own = {"instance_data_dir": images, "instance_prompt": "a red dog", "rank": 2, "max_train_steps": 3}
    return customize.train(method, output_dir=folder, **(own | {"train_batch_size": 2} | settings))


def validation_losses(folder) -> list[float]:
    lines = (folder / "validation.jsonl").read_text().splitlines()
    return [json.loads(line)["validation_loss"] for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_says_so_and_draws_with_the_base_model_as_it_is(kind, images, tmp_path):
    made = train(tmp_path / "run", images, quantize=kind, quantize_text_encoder=kind, mixed_precision="bf16")
    plain = train(tmp_path / "plain", images, mixed_precision="bf16")
    infos = [json.loads((folder / "run.json").read_text()) for folder in (made, plain)]
    assert infos[0]["config"]["quantize"] == infos[0]["config"]["quantize_text_encoder"] == kind
    assert infos[0]["base_fingerprint"] == infos[1]["base_fingerprint"]
    card = (made / "README.md").read_text()
    assert f"the denoiser's frozen weights were held in {kind}" in card
    assert f"the text encoder's frozen weights were held in {kind}" in card
    assert "held in" not in (plain / "README.md").read_text()
    pipe = customize.load_pipeline(made)
    assert not any(isinstance(own, QuantizedLinear) for own in pipe.unet.modules())
    assert levels(draw(pipe, "a red dog", num_inference_steps=2)).shape == (32, 32, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit_with_the_same_weights(kind, images, tmp_path):
    options = {"quantize": kind, "checkpointing_steps": 2, "gradient_checkpointing": True}
    whole = train(tmp_path / "whole", images, **options)
    again = train(tmp_path / "again", images, resume_from_checkpoint=whole / "checkpoint-2", **options)
    found = [load_file(folder / LORA) for folder in (whole, again)]
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    with pytest.raises(UserError, match=r"quantize none: .* was written with"):
        train(tmp_path / "other", images, resume_from_checkpoint=whole / "checkpoint-2", quantize="none")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_run_is_near_that_without(kind, images, tmp_path):
    train(tmp_path / "first", images, max_train_steps=1)  # the first run of a process draws other numbers
    options = {"max_train_steps": 20, "learning_rate": 1e-3, "lr_scheduler": "constant"}
    options |= {"holdout": 1, "validation_steps": 5}
    plain, found = (
        validation_losses(train(tmp_path / own, images, quantize=own, **options)) for own in ("none", kind)
    )
    assert plain[-1] < 0.95 * plain[0]
    assert found == pytest.approx(plain, rel={"int8": 0.01, "fp8": 0.02, "nf4": 0.05}[kind])
    assert found != plain


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_equal_plain_ones(kind):
    found = []
    for checkpointing in (False, True):
        backbone = wrap(tiny("flux"), "flux")
        backbone.quantize(kind, "none", CPU)
        torch.manual_seed(0)
        method = DreamBooth(backbone, DreamBooth.Config(rank=2), [Concept("x", "a dog", "a dog")]).train()
        for value in method.trainable().values():
            nn.init.normal_(value, std=0.1)
        if checkpointing:
            method.enable_gradient_checkpointing()
        torch.manual_seed(1)
        batch = {"pixels": torch.rand(1, 3, 32, 32), "prompt": ["a dog"], "is_prior": torch.tensor([False])}
        method(batch)["denoise"].backward()
        found.append([value.grad for value in method.trainable().values()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    assert max(float(value.abs().max()) for value in found[0]) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case", ["use_dora", "pretrained_lora", "text", "words", "custom_contrast", "ip_adapter", "single_insert"]
)
def test_methods_with_a_frozen_denoiser_train(kind, case, images, tmp_path):
    options = {"quantize": kind, "quantize_text_encoder": kind, "max_train_steps": 1}
    if case == "pretrained_lora":
        first = train(tmp_path / "first", images)
        train(tmp_path / "run", images, pretrained_lora=first, **options)
    elif case in ("custom_contrast", "ip_adapter"):
        (tmp_path / "subjects").mkdir()
        images.rename(tmp_path / "subjects" / "dog")
        settings = {"train_data_dir": tmp_path / "subjects", "train_batch_size": 2, "resolution": 32}
        customize.train(case, output_dir=tmp_path / "run", **settings, **options)
    elif case == "words":
        train(tmp_path / "run", images, "pivotal_tuning", **(options | WORD))
    elif case == "single_insert":
        (tmp_path / "cut").mkdir()
        masked(tmp_path / "cut" / "0.png")
        more = {"encoder_dim": 64, "encoder_depth": 1} | WORD
        train(tmp_path / "run", tmp_path / "cut", "single_insert", **(options | more))
    else:
        train(tmp_path / "run", images, **options, **{{"text": "train_text_encoder"}.get(case, case): True})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 1


def masked(path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    pixels[8:24, 8:24, 3] = 255
    Image.fromarray(pixels).save(path)


def test_cached_prompts_are_told_apart(tmp_path):
    """A later run without quantised encoders must not read prompts of one with them."""
    from customize.cache import TensorCache

    found = []
    for kind in ("none", "int8", "nf4"):
        backbone = wrap(tiny("flux"), "flux")
        backbone.quantize("none", kind, CPU)
        backbone.cache_prompts(["a dog"], TensorCache(tmp_path))
        found.append(backbone.prompts["a dog"]["encoder_hidden_states"])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_the_fingerprint_is_that_of_the_weights_as_loaded():
    prints = []
    for kind in ("none", *KINDS):
        backbone = wrap(tiny("sd15"), "sd15")
        backbone.quantize(kind, "none", CPU)
        prints.append(backbone.fingerprint())
    assert len(set(prints)) == 1


# refusals


@pytest.mark.parametrize("options", [{"quantize": "int8"}, {"quantize_text_encoder": "nf4"}])
def test_what_is_trained_as_a_whole_is_not_quantised(options, images, tmp_path):
    with pytest.raises(UserError, match="cannot be trained as a whole"):
        train(tmp_path / "run", images, full_finetune=True, train_text_encoder=True, **options)
    assert not (tmp_path / "run").exists()
    backbone = wrap(tiny("sd15"), "sd15")
    backbone.quantize(options.get("quantize", "none"), options.get("quantize_text_encoder", "none"), CPU)
    with pytest.raises(UserError, match="cannot be trained as a whole"):
        Components(backbone, list(backbone.text_encoders))


def test_a_whole_denoiser_trains_beside_quantised_text_encoders(images, tmp_path):
    made = train(
        tmp_path / "run", images, full_finetune=True, quantize_text_encoder="int8", max_train_steps=1
    )
    assert (made / "unet" / "config.json").exists()


@pytest.mark.parametrize(("kind", "package"), quantizing.PACKAGES.items())
def test_a_missing_package_is_named(kind, package, monkeypatch):
    module = {"torchao": "torchao.quantization"}.get(package, package)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"--quantize {kind} needs {package}: pip install {package}"):
        check_quantization("--quantize", kind, CPU, torch.float32)


def test_a_machine_without_the_kernel_is_refused_before_the_model_is_loaded(images, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(quantizing._Product, "apply", fails)
    with pytest.raises(
        UserError, match=r"quantize nf4 does not run on this machine's cpu \(no kernel .*use int8 or none"
    ):
        train(tmp_path / "run", images, quantize="nf4", pretrained_model_name_or_path="/nowhere")


def test_a_kernel_that_computes_wrong_values_is_refused(monkeypatch):
    product = quantizing._Product.apply
    monkeypatch.setattr(quantizing._Product, "apply", lambda *args: 2 * product(*args))
    with pytest.raises(UserError, match="computes wrong values"):
        check_quantization("--quantize", "int8", CPU, torch.float32)


def test_the_check_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    for kind in KINDS:
        check_quantization("--quantize", kind, CPU, torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_family_has_layers_to_quantise():
    assert all("attention+ff" in family.lora_presets for family in BACKBONES.values())
