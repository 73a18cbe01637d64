"""Attention maps: by hand, on every tiny model; the model's output stays as it is."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from customize.adapters.lora import LoraFields, add_lora
from customize.adapters.words import LearnedWords
from customize.attention_maps import AttentionRecorder, context_pairs, recorded_layers, word_positions
from customize.backbones.base import Condition
from customize.backbones.families import wrap
from customize.errors import UserError
from tiny import BASES, random, tiny

PROMPT = "a photo of the red dog on grass"


def backbone_of(base: str):
    return wrap(tiny(base), base)


def call(backbone, latents: torch.Tensor, prompts=(PROMPT,)):
    text = backbone.encode_prompt(list(prompts))
    t = backbone.nearest_times(torch.full((len(latents),), 0.5))
    return backbone.denoise(latents, t, Condition(text))


@pytest.mark.parametrize("base", BASES)
def test_recording_leaves_the_models_output_as_it_is(base):
    backbone, latents = backbone_of(base), random(1, 4, 16, 16)
    with torch.no_grad():
        plain = call(backbone, latents)
        with AttentionRecorder(backbone.denoiser) as recorder:
            found = call(backbone, latents)
        assert torch.equal(found, plain)
        assert torch.equal(call(backbone, latents), plain)
    assert recorder.maps.keys() == recorded_layers(backbone.denoiser).keys()
    tokens = backbone.encode_prompt([PROMPT])["encoder_hidden_states"].shape[1]
    for maps in recorder.maps.values():
        assert maps.shape[:2] == (1, tokens)
        assert (maps >= 0).all()
    unet = base in ("sd15", "sdxl")
    sums = torch.stack([maps.sum(1).mean() for maps in recorder.maps.values()])
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5) if unet else (sums < 1).all()


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_maps_of_a_unet_by_loops(base):
    """softmax over the text of each head, from the inputs that the layer is given, pixel by pixel."""
    backbone, latents, inputs = backbone_of(base), random(2, 4, 16, 16), {}
    for name, layer in recorded_layers(backbone.denoiser).items():
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: inputs.update({name: (args[0], kwargs)}), with_kwargs=True
        )
    with torch.no_grad(), AttentionRecorder(backbone.denoiser) as recorder:
        call(backbone, latents, [PROMPT, "a blue cat in style"])
    for name, layer in recorder.layers.items():
        hidden, context = inputs[name][0], inputs[name][1]["encoder_hidden_states"]
        maps, width = recorder.maps[name], recorder.maps[name].shape[-1]
        dim = layer.to_q(hidden).shape[-1] // layer.heads
        for sample, pixel in ((0, 0), (1, 3), (1, hidden.shape[1] - 1)):
            expected = torch.zeros(context.shape[1])
            for head in range(layer.heads):
                part = slice(head * dim, (head + 1) * dim)
                query = layer.to_q(hidden)[sample, pixel, part]
                scores = torch.stack([query @ key for key in layer.to_k(context)[sample, :, part]])
                expected += (scores / dim**0.5).softmax(0) / layer.heads
            assert torch.allclose(maps[sample, :, pixel // width, pixel % width], expected, atol=1e-5)


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_maps_of_joint_attention_are_those_of_the_attention_itself(base, monkeypatch):
    """With values that are one for a single text token, the attention's output is that token's map."""
    backbone, latents = backbone_of(base), random(1, 4, 16, 16)
    layer = recorded_layers(backbone.denoiser)["transformer_blocks.0"]
    seen = {}

    def identity(*args, **kwargs):
        image, text = layer_forward(*args, **kwargs)
        seen["image"] = image
        return image, text

    token = 3
    with torch.no_grad():
        for projection in (layer.to_v, layer.add_v_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        forward = layer.add_v_proj.forward
        monkeypatch.setattr(
            layer.add_v_proj,
            "forward",
            lambda x: forward(x).index_fill(1, torch.tensor([token]), 1.0),
        )
        layer.to_out[0].weight.copy_(torch.eye(len(layer.to_out[0].weight)))
        layer.to_out[0].bias.zero_()
        layer_forward = layer.forward
        monkeypatch.setattr(layer, "forward", identity)
        with AttentionRecorder(backbone.denoiser, ["transformer_blocks.0"]) as recorder:
            call(backbone, latents)
    heads = seen["image"].unflatten(-1, (layer.heads, -1)).mean((-1, -2))  # (1, pixels)
    [maps] = recorder.maps.values()
    assert torch.allclose(maps[:, token].flatten(1), heads, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_gradients_flow_and_are_those_without_checkpointing(base):
    found = []
    for checkpointing in (False, True):
        backbone = backbone_of(base)
        add_lora(backbone.denoiser, LoraFields(rank=2))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in backbone.denoiser.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=generator)
        backbone.denoiser.train()
        if checkpointing:
            backbone.denoiser.enable_gradient_checkpointing()
        latents = random(2, 4, 16, 16).requires_grad_()
        positions = [word_positions(backbone.pipe, PROMPT, "dog")] * 2
        with AttentionRecorder(backbone.denoiser) as recorder:
            prediction = call(backbone, latents, [PROMPT] * 2)
            loss = recorder.mean(positions).square().sum() + prediction.square().mean()
            loss.backward()
        lora = [
            p.grad for n, p in backbone.denoiser.named_parameters() if "lora_A" in n and p.grad is not None
        ]
        found.append((loss.detach(), latents.grad, *lora))
    assert len(found[0]) == len(found[1]) > 3
    for plain, checkpointed in zip(*found, strict=True):
        assert plain.isfinite().all()
        assert torch.allclose(plain, checkpointed, atol=1e-5)
    assert found[0][1].any()


@pytest.mark.parametrize("base", BASES)
def test_maps_are_computed_in_full_precision_under_autocast(base):
    backbone, latents, maps = backbone_of(base), random(1, 4, 16, 16), []
    name, layer = next(iter(recorded_layers(backbone.denoiser).items()))
    for parameter in (*layer.to_q.parameters(), *layer.to_k.parameters()):
        parameter.data *= 20  # peaked attention, where half precision tells
    if getattr(layer, "add_k_proj", None) is not None:
        layer.add_k_proj.weight.data *= 20
    for enabled in (False, True):
        with (
            torch.no_grad(),
            AttentionRecorder(backbone.denoiser, layers=[name]) as recorder,
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        ):
            call(backbone, latents)
        maps.append(recorder.maps[name])
    assert maps[1].dtype == torch.float32
    if base in ("sd15", "sdxl"):  # rows sum to 1 to float32's precision
        total = maps[1].sum(1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "template", ["a photo of a {} on grass", "{} in the style of a dog", "a dog next to {} and a dog"]
)
def test_the_same_words_of_two_prompts(base, template):
    """With a word of three vectors beside the class's word, wherever that stands besides."""
    backbone = backbone_of(base)
    LearnedWords(backbone, {"<toy>": "dog"}, 3)
    pipe = backbone.pipe
    prompts, words = (template.format("<toy>"), template.format("dog")), ("<toy>", "dog")
    with torch.no_grad():
        length = backbone.encode_prompt([prompts[0]])["encoder_hidden_states"].shape[1]
    places, others = context_pairs(pipe, prompts, words, length)
    taken = word_positions(pipe, prompts[0], "<toy>")
    assert not set(places) & set(taken)
    assert len(places) == len(others) == len(set(places)) == len(set(others))
    rest = [i for i in range(length) if i not in taken]
    lost = len(taken) * 2 // 3  # of the padding's end, for which the other prompt has more
    assert len(places) >= len(rest) - lost
    if base in ("sd15", "sdxl"):
        own, other = (
            pipe.tokenizer(
                pipe.maybe_convert_prompt(prompt, pipe.tokenizer), padding="max_length", max_length=16
            ).input_ids
            for prompt in prompts
        )
        assert [own[i] for i in places] == [other[j] for j in others]


def test_the_mean_by_hand():
    """Of the last samples, which are the conditional half of guidance."""
    backbone = backbone_of("sd15")
    with torch.no_grad(), AttentionRecorder(backbone.denoiser) as recorder:
        call(backbone, random(2, 4, 16, 16), ["a cat", PROMPT])
    found = recorder.mean([[2, 5]], (8, 8))
    assert found.shape == (1, 8, 8)
    layers = []
    for maps in recorder.maps.values():
        both = maps[1, 2] + maps[1, 5]
        layers.append(torch.nn.functional.interpolate(both[None, None], (8, 8), mode="bilinear")[0, 0])
    assert torch.allclose(found[0], sum(layers) / len(layers), atol=1e-6)


def test_layers_by_name_and_by_size():
    backbone = backbone_of("sd15")
    for side, wanted in ((0, {8, 16}), (16, {16}), (9, {8}), (1, {8}), (100, {16})):
        with torch.no_grad(), AttentionRecorder(backbone.denoiser, side=side) as recorder:
            call(backbone, random(1, 4, 16, 16))
        assert {maps.shape[-1] for maps in recorder.chosen()} == wanted
    with torch.no_grad(), AttentionRecorder(backbone.denoiser, ["mid"]) as recorder:
        call(backbone, random(1, 4, 16, 16))
    assert all(name.startswith("mid_block") for name in recorder.maps)
    with pytest.raises(UserError, match="no layer begins with 'left'; the layers are down_blocks"):
        AttentionRecorder(backbone.denoiser, ["left"])


def test_latents_of_odd_sides():
    backbone = backbone_of("sd15")
    with torch.no_grad(), AttentionRecorder(backbone.denoiser) as recorder:
        call(backbone, random(1, 4, 10, 14))
    assert {tuple(maps.shape[-2:]) for maps in recorder.maps.values()} == {(10, 14), (5, 7)}


@pytest.mark.parametrize("base", BASES)
def test_positions_of_words(base):
    pipe = tiny(base)
    found = word_positions(pipe, PROMPT, "dog")
    ids = pipe.tokenizer(PROMPT).input_ids
    place = ids.index(pipe.tokenizer.convert_tokens_to_ids("dog"))
    offset = {"sd3": [0, pipe.tokenizer_max_length] if base == "sd3" else []}.get(base, [0])
    assert found == [start + place for start in offset]
    assert word_positions(pipe, PROMPT, "red dog") == [start + place + i for start in offset for i in (-1, 0)]
    with pytest.raises(UserError, match="does not say 'cat'"):
        word_positions(pipe, PROMPT, "cat")


def test_a_learned_word_of_several_vectors_has_several_positions():
    from customize.adapters.words import LearnedWords

    backbone = backbone_of("sd15")
    LearnedWords(backbone, {"<toy>": "dog"}, 3)
    assert word_positions(backbone.pipe, "a red <toy> on grass", "<toy>") == [3, 4, 5]


def test_a_model_without_cross_attention():
    assert isinstance(tiny("sd15"), StableDiffusionPipeline)
    with pytest.raises(UserError, match="a Linear has no cross-attention"):
        recorded_layers(torch.nn.Linear(2, 2))
