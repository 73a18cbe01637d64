"""LoRA: which layers, and what other tools find in its files."""

import json

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

import customize
from customize.adapters.kohya import KOHYA, KohyaLora
from customize.adapters.lora import TEXT_ATTENTION, Lora, LoraFields, add_lora
from customize.adapters.lora_files import LORA, with_text_model
from customize.adapters.lora_reading import load_lora
from customize.backbones.base import Condition
from customize.backbones.families import wrap
from customize.errors import UserError
from customize.files import header
from customize.pipelines import load_pipeline
from customize.runs import checkpoint
from customize.trainers.methods.dreambooth import DreamBooth, DreamBoothConfig
from customize.trainers.optimizers import make_optimizer
from customize.trainers.prepare import add_assistant
from customize.trainers.settings import TrainConfig
from tiny import BASES, draw, lora_of, tiny

RANK, ALPHA = 4, 6.0


def adapted(base: str, text: bool = False, **options):
    """A backbone whose LoRA is random everywhere."""
    backbone = wrap(tiny(base), base)
    fields = LoraFields(**({"rank": RANK, "lora_alpha": ALPHA} | options))
    add_lora(backbone.denoiser, fields)
    for encoder in backbone.text_encoders if text else []:
        if "CLIP" in type(encoder).__name__:
            add_lora(encoder, fields, TEXT_ATTENTION)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return backbone


def saved(backbone, folder, kohya: bool = False):
    adapters = [lora_of(backbone), *([KohyaLora(backbone)] if kohya else [])]
    checkpoint.save(folder, adapters, {"base_model": backbone.name, "method": "none", "config": {}})
    return load_file(folder / "pytorch_lora_weights.safetensors")


def layers(module) -> dict[str, torch.nn.Module]:
    """The adapted layers by the path that they have in the untouched module."""
    return {
        name: m for name, m in module.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")
    }


def up_and_down(state: dict, start: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's matrices under either pair of names that diffusers writes."""
    ends = {name: name.removeprefix(start) for name in state if name.startswith(start + ".lora")}
    [up] = [name for name, end in ends.items() if "lora_B" in end or ".up" in end]
    [down] = [name for name, end in ends.items() if "lora_A" in end or ".down" in end]
    return state[up], state[down]


# which layers


def targets(base: str, layer_names: str) -> set[str]:
    backbone = wrap(tiny(base))
    add_lora(backbone.denoiser, LoraFields(rank=2, lora_layers=layer_names))
    return set(layers(backbone.denoiser))


def linear_with(base: str, *parts: str) -> set[str]:
    found = wrap(tiny(base)).denoiser.named_modules()
    return {
        name for name, m in found if isinstance(m, torch.nn.Linear) and any(part in name for part in parts)
    }


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_presets_of_unets(base):
    assert targets(base, "attention") == linear_with(base, "attn1.", "attn2.")
    blocks = linear_with(base, "attn1.", "attn2.", ".ff.net.")
    assert {name for name in targets(base, "attention+ff") if "proj_out" not in name} == blocks
    assert {name for name in targets(base, "all") if ".conv1" in name} != set()


def test_presets_of_sd3():
    assert targets("sd3", "attention") == linear_with("sd3", ".attn.")
    blocks = linear_with("sd3", ".attn.", ".ff.net.", ".ff_context.net.")
    assert targets("sd3", "attention+ff") >= blocks
    assert targets("sd3", "attention+ff") - blocks <= {"proj_out"}


def test_presets_of_flux():
    assert targets("flux", "attention") == linear_with("flux", ".attn.to_", ".attn.add_")
    blocks = linear_with(
        "flux", ".attn.to_", ".attn.add_", ".ff.net.", ".ff_context.net.", ".proj_mlp", "blocks.0.proj_out"
    )
    assert targets("flux", "attention+ff") >= blocks
    assert targets("flux", "attention+ff") - blocks <= {"proj_out"}


def test_layers_by_name():
    assert targets("sd15", "attn2.to_k, attn2.to_v") == linear_with("sd15", "attn2.to_k", "attn2.to_v")


def test_a_name_matches_whole_parts_of_a_path():
    with pytest.raises(UserError, match="lora_layers"):
        targets("sd15", "o_k")


@pytest.mark.parametrize("name", ["to_nowhere", "atention", ""])
def test_an_unknown_layer_is_refused_and_the_presets_are_named(name):
    with pytest.raises(UserError, match=r"lora_layers.*attention, attention\+ff"):
        targets("sd15", name)


def test_an_unknown_layer_beside_a_known_one_is_refused():
    with pytest.raises(UserError, match=r"lora_layers.*to_nowhere"):
        targets("sd15", "to_k,to_nowhere")


def test_rank_is_positive():
    with pytest.raises(UserError, match="rank"):
        adapted("sd15", rank=0)


@pytest.mark.parametrize("base", BASES)
def test_only_lora_trains_in_float32_and_starts_at_zero(base):
    backbone = wrap(tiny(base).to(dtype=torch.bfloat16))
    add_lora(backbone.denoiser, LoraFields(rank=2))
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert not any(p.any() for name, p in trained.items() if "lora_B" in name)
    assert {p.dtype for name, p in backbone.named_parameters() if name not in trained} == {torch.bfloat16}


def test_alpha_defaults_to_the_rank():
    backbone = adapted("sd15", lora_alpha=0.0)
    assert all(m.scaling["default"] == 1.0 for m in layers(backbone.denoiser).values())


# diffusers' file


@pytest.mark.parametrize("base", BASES)
def test_alpha_is_folded_into_the_up_matrices(base, tmp_path):
    backbone = adapted(base)
    state, found = saved(backbone, tmp_path), layers(backbone.denoiser)
    for path, layer in found.items():
        up, down = up_and_down(state, f"{backbone.denoiser_name}.{path}")
        assert torch.allclose(up, layer.lora_B["default"].weight * ALPHA / RANK, atol=1e-6)
        assert torch.equal(down, layer.lora_A["default"].weight)
    assert len(state) == 2 * len(found)
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("base", BASES)
def test_the_header_says_that_alpha_is_the_rank(base, tmp_path):
    backbone = adapted(base, text=True)
    saved(backbone, tmp_path)
    said = json.loads(header(tmp_path / "pytorch_lora_weights.safetensors")["lora_adapter_metadata"])
    names = [
        backbone.denoiser_name,
        "text_encoder",
        *([] if base in ("sd15", "flux") else ["text_encoder_2"]),
    ]
    for name in names:
        assert said[f"{name}.r"] == RANK
        assert said[f"{name}.lora_alpha"] == RANK


@pytest.mark.parametrize("base", BASES)
def test_keys_of_text_encoders_contain_text_model(base, tmp_path):
    backbone = adapted(base, text=True)
    state = saved(backbone, tmp_path)
    keys = [key for key in state if key.startswith("text_encoder")]
    assert keys
    for key in keys:
        assert key.split(".")[1:4] == ["text_model", "encoder", "layers"]
        assert key.count("text_model.") == 1
    for path, layer in layers(backbone.text_encoders[0]).items():
        up, down = up_and_down(state, f"text_encoder.text_model.{path.removeprefix('text_model.')}")
        assert torch.allclose(up, layer.lora_B["default"].weight * ALPHA / RANK, atol=1e-6)
        assert torch.equal(down, layer.lora_A["default"].weight)


def test_text_model_is_not_doubled():
    assert with_text_model("encoder.x") == "text_model.encoder.x"
    assert with_text_model("text_model.encoder.x") == "text_model.encoder.x"


# kohya's file


def parts_of(base: str, backbone) -> list[tuple[str, torch.nn.Module]]:
    if base == "sd15":
        return [("lora_unet", backbone.denoiser), ("lora_te", backbone.text_encoders[0])]
    return [
        ("lora_unet", backbone.denoiser),
        ("lora_te1", backbone.text_encoders[0]),
        ("lora_te2", backbone.text_encoders[1]),
    ]


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_kohyas_file_holds_true_alphas_and_the_trained_change(base, tmp_path):
    backbone = adapted(base, text=True)
    saved(backbone, tmp_path, kohya=True)
    state, known = load_file(tmp_path / "lora_kohya.safetensors"), set()
    for prefix, module in parts_of(base, backbone):
        for path, layer in layers(module).items():
            inside = path if prefix == "lora_unet" else f"text_model.{path.removeprefix('text_model.')}"
            key = f"{prefix}_{inside.replace('.', '_')}"
            up, down, alpha = (
                state[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha")
            )
            assert alpha.item() == ALPHA
            assert alpha.shape == ()
            assert down.shape[0] == RANK
            delta = alpha.item() / down.shape[0] * up @ down
            assert torch.allclose(delta, layer.get_delta_weight("default"), atol=1e-6)
            assert delta.abs().max() > 1e-3
            known |= {f"{key}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert set(state) == known
    example = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"
    assert (example if base == "sd15" else example.replace("lora_te_", "lora_te2_")) in state


def test_kohyas_file_of_dora_gives_the_trained_weight(tmp_path):
    """W' = dora_scale (W + delta) / |W + delta|, the norm taken over each output's row (Liu et al., 2024, eq.
    5)."""
    backbone = adapted("sd15", use_dora=True)
    saved(backbone, tmp_path, kohya=True)
    state = load_file(tmp_path / "lora_kohya.safetensors")
    for path, layer in layers(backbone.denoiser).items():
        key = f"lora_unet_{path.replace('.', '_')}"
        weight = layer.base_layer.weight.detach()
        scale = state[f"{key}.dora_scale"]
        assert scale.shape == (weight.shape[0], 1)
        up, down = state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"]
        moved = weight + state[f"{key}.alpha"] / RANK * up @ down
        rebuilt = torch.stack([scale[i] * row / row.square().sum().sqrt() for i, row in enumerate(moved)])
        x = torch.randn(3, weight.shape[1])
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias
        assert torch.allclose(layer(x), x @ rebuilt.T + bias, atol=1e-5)
        assert not torch.allclose(rebuilt, weight, atol=1e-3)


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_kohyas_layout_is_refused_for_transformers(base, tmp_path):
    with pytest.raises(UserError, match="export_kohya"):
        saved(adapted(base), tmp_path, kohya=True)


def test_saving_leaves_the_trained_tensors_alone(tmp_path):
    backbone = adapted("sd15", text=True)
    before = {name: value.clone() for name, value in get_peft_model_state_dict(backbone.denoiser).items()}
    saved(backbone, tmp_path, kohya=True)
    saved(backbone, tmp_path, kohya=True)
    after = get_peft_model_state_dict(backbone.denoiser)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("rank", [17, 10**8])
def test_a_rank_above_that_of_the_layers_is_refused(rank):
    """The tiny denoiser's widest attention layer is 16 x 16."""
    with pytest.raises(UserError, match=rf"--rank {rank} .*choose 16 at most"):
        add_lora(tiny("sd15").unet, LoraFields(rank=rank))
    add_lora(tiny("sd15").unet, LoraFields(rank=16))


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_kohyas_magnitudes_have_the_shape_of_the_weights_outputs(base, tmp_path):
    """(out, 1) of linear layers, (out, 1, 1, 1) of convolutions."""
    backbone = wrap(tiny(base), base)
    add_lora(backbone.denoiser, LoraFields(rank=2, use_dora=True, lora_layers="all"))
    KohyaLora(backbone).save(tmp_path)
    state, kinds = load_file(tmp_path / KOHYA), set()
    weights = {
        f"lora_unet_{name.replace('.', '_')}": layer.weight
        for name, layer in tiny(base).unet.named_modules()
        if hasattr(layer, "weight") and layer.weight is not None
    }
    for key, value in state.items():
        if key.endswith(".dora_scale"):
            weight = weights[key.removesuffix(".dora_scale")]
            assert value.shape == (len(weight), *[1] * (weight.ndim - 1))
            norms = weight.flatten(1).norm(dim=1).view(value.shape)  # before training
            assert torch.allclose(value, norms, rtol=1e-5)
            kinds.add(weight.ndim)
    assert kinds == {2, 4}


@pytest.mark.parametrize("base", BASES)
def test_dora_of_text_encoders_comes_back(base, tmp_path):
    """transformers' loader leaves the magnitudes out."""
    backbone = wrap(tiny(base), base)
    encoders = [encoder for encoder in backbone.text_encoders if "CLIP" in type(encoder).__name__]
    adapter = Lora(backbone, LoraFields(rank=2, use_dora=True), encoders)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    adapter.save(tmp_path)
    pipe = tiny(base)
    Lora.load(tmp_path, {}, pipe)
    prompts = ["a photo of sks dog"]
    found, wanted = (b.encode_prompt(prompts) for b in (wrap(pipe, base), backbone))
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-6)
    names = list(pipe.get_list_adapters().values())
    assert names
    assert all(own == [tmp_path.name.replace("-", "_")] for own in names)


@pytest.mark.parametrize("name", ["half", "train", "values", "7", "a.b"])
def test_a_run_of_any_name_loads(name, images, tmp_path):
    """peft keeps adapters by name in a ModuleDict, which has attributes such as half and train."""
    tiny("sd15").save_pretrained(tmp_path / "base")
    run = customize.train(
        "dreambooth",
        pretrained_model_name_or_path=tmp_path / "base",
        instance_data_dir=images,
        instance_prompt="a photo of sks dog",
        resolution=16,
        max_train_steps=1,
        rank=2,
        output_dir=tmp_path / name,
    )
    pipe = load_pipeline(run)
    before = draw(pipe, "a photo of sks dog")
    load_lora(run, pipe)  # once more, beside the first
    assert len(pipe.get_list_adapters()["unet"]) == 2
    assert before.shape == (32, 32, 3)


# layers by pattern, with rates of their own


def test_layers_by_pattern():
    backbone = wrap(tiny("flux"))
    add_lora(backbone.denoiser, LoraFields(rank=2, lora_layers="single_transformer_blocks.*.to_q,ff.net.*"))
    assert set(layers(backbone.denoiser)) == {
        "single_transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.ff.net.2",
    }


@pytest.mark.parametrize("scale_lr", [False, True])
def test_layers_have_rates_of_their_own(scale_lr):
    """to_q is named by both entries: the later one counts."""
    method = DreamBooth(
        wrap(tiny("sd15")), DreamBoothConfig(rank=2, lora_layers="to_q,to_k,attn1.to_q:0.5"), []
    )
    config = TrainConfig(learning_rate=0.2, scale_lr=scale_lr, train_batch_size=3)
    rates = {
        id(p): group["lr"]
        for group in make_optimizer(method, config, 1).param_groups
        for p in group["params"]
    }
    assert len(rates) == len(method.trainable())
    for name, parameter in method.trainable().items():
        factor = 0.5 if "attn1.to_q" in name else 1.0
        assert rates[id(parameter)] == pytest.approx(0.2 * factor * (3 if scale_lr else 1))


@pytest.mark.parametrize("text", ["to_q:0", "to_q:-1", "to_q:fast", "to_q:nan", "to_q:inf"])
def test_a_rate_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=r"lora_layers: 'to_q:.*' has no rate above 0"):
        add_lora(wrap(tiny("sd15")).denoiser, LoraFields(rank=2, lora_layers=text))


# starting from a LoRA


@pytest.mark.parametrize("base", BASES)
def test_training_starts_from_a_lora(base, tmp_path):
    """Also where its alpha differs: the first image is that of the LoRA."""
    backbone = adapted(base, rank=2, lora_alpha=8)
    saved(backbone, tmp_path)
    method = DreamBooth(
        wrap(tiny(base)), DreamBoothConfig(rank=2, lora_alpha=1, pretrained_lora=str(tmp_path / LORA)), []
    )
    drawn, wanted = (
        draw(method.backbone.pipe, "a photo of sks dog"),
        draw(backbone.pipe, "a photo of sks dog"),
    )
    assert np.abs(drawn - wanted).max() < 1e-4
    assert np.abs(wanted - draw(tiny(base), "a photo of sks dog")).max() > 1e-3
    assert all(p.requires_grad for p in method.trainable().values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 4}, "has rank 2; give --rank 2"),
        ({"rank": 2, "lora_layers": "to_q"}, "has the layer .* which is not trained here"),
        ({"full_finetune": True}, "--full_finetune trains no LoRA"),
    ],
)
def test_a_lora_that_cannot_be_started_from(config, message, tmp_path):
    saved(adapted("sd15", rank=2), tmp_path)
    with pytest.raises(UserError, match=message):
        DreamBooth(wrap(tiny("sd15")), DreamBoothConfig(**config, pretrained_lora=str(tmp_path / LORA)), [])


def test_a_file_that_is_no_lora_or_of_another_model_is_refused(tmp_path):
    saved(adapted("sdxl", rank=2), tmp_path)
    for path in (tmp_path / "nothing.safetensors", tmp_path / LORA):
        with pytest.raises(UserError, match=r"holds no LoRA|does not fit this base model"):
            DreamBooth(wrap(tiny("sd15")), DreamBoothConfig(rank=2, pretrained_lora=str(path)), [])


# an assistant, which is active in training alone


def with_assistant(base: str, folder, **config):
    """A DreamBooth method beside an assistant, and the assistant's file."""
    assistant = adapted(base, rank=3)
    saved(assistant, folder)
    backbone = wrap(tiny(base), base)
    add_assistant(backbone, str(folder / LORA))
    return DreamBooth(backbone, DreamBoothConfig(rank=2, **config), []), assistant


def predicted(backbone):
    noisy = torch.randn(backbone.latent_shape(16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = Condition(backbone.encode_prompt(["a photo of sks dog"]))
        return backbone.denoise(noisy, torch.tensor([0.5]), text)


@pytest.mark.parametrize("base", BASES)
def test_an_assistant_is_active_in_training_alone(base, tmp_path):
    method, assistant = with_assistant(base, tmp_path / "assistant")
    backbone = method.backbone
    assert torch.allclose(predicted(backbone), predicted(assistant), atol=1e-5)  # LoRA is zero at the start
    assert not torch.allclose(predicted(backbone), predicted(wrap(tiny(base))), atol=1e-3)
    assert all(".assistant." not in name for name in method.trainable())
    for name, parameter in method.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(5))
    with backbone.without_adapters():  # the teacher has it too
        assert torch.allclose(predicted(backbone), predicted(assistant), atol=1e-5)
    state = saved(backbone, tmp_path / "run")
    stock = wrap(tiny(base), base)
    stock.pipe.load_lora_weights(str(tmp_path / "run"), weight_name=LORA)
    trained = predicted(backbone)
    with backbone.without_assistant():
        assert torch.allclose(predicted(backbone), predicted(stock), atol=1e-5)
    assert torch.equal(predicted(backbone), trained)
    assert not torch.allclose(trained, predicted(stock), atol=1e-3)
    assert all(value.shape[0] == 2 or value.shape[1] == 2 for value in state.values())  # its rank, not 3


def test_an_assistant_goes_with_a_run(images, tmp_path):
    saved(adapted("sd15", rank=3), tmp_path / "assistant")
    tiny("sd15").save_pretrained(tmp_path / "base")
    run = customize.train(
        "dreambooth",
        pretrained_model_name_or_path=tmp_path / "base",
        assistant_lora=tmp_path / "assistant" / LORA,
        instance_data_dir=images,
        instance_prompt="a photo of sks dog",
        resolution=32,
        max_train_steps=2,
        learning_rate=0.1,
        rank=2,
        validation_prompt=["a photo of sks dog"],
        validation_steps=2,
        output_dir=tmp_path / "run",
    )
    pipe = load_pipeline(run)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    found = pipe("a photo of sks dog", height=32, width=32, num_inference_steps=25, generator=generator)
    shown = np.asarray(Image.open(run / "samples" / "step-000002.png")).astype(int)
    assert np.abs(np.asarray(found.images[0]).astype(int) - shown).max() <= 1


def test_an_assistant_that_is_no_lora_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no LoRA"):
        add_assistant(wrap(tiny("sd15")), str(tmp_path))
    saved(adapted("sd15", text=True), tmp_path)
    with pytest.raises(UserError, match=r"--assistant_lora: .* also changes the text encoder"):
        add_assistant(wrap(tiny("sd15")), str(tmp_path / LORA))
