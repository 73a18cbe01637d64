"""The attention processors: without subjects the stock UNet, with them the visual branch, its gates and
the texts by hand."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import is_xformers_available
from peft import LoraConfig
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from customize.adapters import attention
from customize.adapters.attention import (
    CrossAttention,
    Injected,
    Location,
    SubjectTokens,
    at_size,
    gate,
    install,
    make_branches,
    stacks,
    text_layers,
    use_xformers,
)
from customize.adapters.encoders.image_encoder import ImageEncoder
from customize.adapters.subject import image_prompt, multimodal
from tiny import random, tiny, unet, woken

UNETS = ["sd15", "sdxl"]
SIZES = {
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "visual_queries": 3,
    "feature_layers": 2,
    "time_bins": 4,
    "projection": 8,
}
MID = "7"  # the middle layer's number in the tiny UNets
WEIGHT = torch.tensor(
    [[1.0, 0.7], [0.5, 0.0]]
)  # of two subjects in two rows: the last row has no second subject
PADDED = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 0, 1], [1, 1, 1]]]).bool()


def tower() -> ImageEncoder:
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=16, **sizes)
    return ImageEncoder(CLIPVisionModelWithProjection(config), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def text_of(unet, batch: int = 4) -> torch.Tensor:
    return random(batch, 6, unet.config.cross_attention_dim, seed=2)


def step(unet, injected: Injected | None = None, batch: int = 4, **more) -> torch.Tensor:
    """The UNet's output for a batch with a text of its own in every row."""
    if unet.config.addition_embed_type:
        more["added_cond_kwargs"] = {
            "text_embeds": random(batch, 16, seed=3),
            "time_ids": torch.full((batch, 6), 32.0),
        }
    if injected is not None:
        more["cross_attention_kwargs"] = {"ip_hidden_states": injected}
    return unet(random(batch, 4, 16, 16), 500, text_of(unet, batch), **more).sample


def with_branches(unet, location_dim: int = 0, text_gate: str = "none"):
    """The UNet with random branches installed, and these."""
    branches = woken(make_branches(unet, 12, location_dim))
    install(unet, branches, text_gate)
    return unet, branches


def two_subjects(location_dim: int = 0, **more) -> Injected:
    """Two subjects of three tokens in two rows."""
    place = random(2, 2, location_dim, seed=6) if location_dim else None
    regions, mask = more.pop("regions", None), more.pop("mask", PADDED)
    return Injected(SubjectTokens(random(2, 2, 3, 12, seed=4), WEIGHT, mask, place, regions), **more)


def calls_of(branches) -> Counter:
    """How often each layer makes keys, from now on."""
    calls: Counter = Counter()
    for number, branch in branches.items():
        branch.to_k_ip.register_forward_hook(lambda *_, number=number: calls.update([number]))
    return calls


def deep() -> UNet2DConditionModel:
    """A UNet with two transformer layers in every stack."""
    torch.manual_seed(0)
    return unet(depth=2).eval()


# without a subject, or with an untrained adapter


@pytest.mark.parametrize("base", UNETS)
@torch.no_grad()
def test_without_subjects_the_unet_is_the_stock_one_bit_for_bit(base):
    unet = tiny(base).unet
    text_mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2 + [[1] * 6] * 2)
    plain, masked = step(unet), step(unet, encoder_attention_mask=text_mask)
    install(unet, woken(make_branches(unet, 12, 5)), "complement")
    assert all(isinstance(processor, CrossAttention) for processor in unet.attn_processors.values())
    assert torch.equal(step(unet), plain)
    assert torch.equal(step(unet, encoder_attention_mask=text_mask), masked)
    assert not torch.equal(plain, masked)


@pytest.mark.parametrize("base", UNETS)
def test_the_state_dict_of_the_unet_stays_stock(base):
    unet, stock = tiny(base).unet, tiny(base).unet.state_dict()
    with_branches(unet, 5)
    found = unet.state_dict()
    assert list(found) == list(stock)
    assert all(torch.equal(found[name], value) for name, value in stock.items())


ADAPTERS = {
    "words": lambda pipe: multimodal(pipe, tower(), "photo", location=False, **SIZES),
    "location": lambda pipe: multimodal(pipe, tower(), "photo", **SIZES),
    "same": lambda pipe: multimodal(pipe, tower(), "photo", "same", **SIZES),
    "complement": lambda pipe: multimodal(pipe, tower(), "photo", "complement", **SIZES),
    "image_prompt": lambda pipe: image_prompt(pipe, tower(), plus=False),
    "image_prompt_plus": lambda pipe: image_prompt(pipe, tower(), dim=16, depth=1, heads=2, queries=3),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("base", UNETS)
@torch.no_grad()
def test_an_untrained_adapter_changes_nothing_bit_for_bit(base, kind):
    """Two subjects in the conditional half of the batch; the text of each slot may be given, here the
    same again."""
    pipe = tiny(base)
    expected = step(pipe.unet)
    adapter = ADAPTERS[kind](pipe)
    eye = tower()
    features = adapter.encoder.read(eye(random(8, 3, 32, 32))).unflatten(0, (4, 2))
    encoded = adapter.encoder(features, torch.ones(4, 2, dtype=torch.bool), torch.full((4,), 0.3))
    repeated = text_of(pipe.unet)[2:].expand(len(stacks(pipe.unet)), -1, -1, -1)
    calls = calls_of(adapter.branches)
    assert torch.equal(step(pipe.unet, adapter.injected(encoded, WEIGHT)), expected)
    assert torch.equal(step(pipe.unet, adapter.injected(encoded, WEIGHT, repeated)), expected)
    assert calls == dict.fromkeys(["1", "3", "5", "7"], 2)


# the visual branch by hand


def attention_by_hand(query, key, value, heads: int, keep: list[bool]) -> torch.Tensor:
    """One row: softmax(q k / sqrt(d)) v, for every head and pixel on its own, over the tokens that are
    kept."""
    out = torch.zeros(len(query), value.shape[1])
    d = query.shape[1] // heads
    tokens = [j for j in range(len(key)) if keep[j]]
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        for pixel in range(len(query)):
            scores = [torch.exp((query[pixel, own] * key[j, own]).sum() / d**0.5) for j in tokens]
            for j, score in zip(tokens, scores, strict=True):
                out[pixel, own] += score / sum(scores) * value[j, own]
    return out


def opening(logit: torch.Tensor) -> torch.Tensor:
    """sigmoid(2 + x) / sigmoid(2)"""
    return (1 + torch.exp(torch.tensor(-2.0))) / (1 + torch.exp(-2 - logit))


def layer_by_hand(
    attn, branch, hidden, text, injected: Injected, scale: float, text_gate: str
) -> torch.Tensor:
    query, key, value = attn.to_q(hidden), attn.to_k(text), attn.to_v(text)
    rows = []
    for row in range(len(hidden)):
        out = attention_by_hand(query[row], key[row], value[row], attn.heads, [True] * text.shape[1])
        own = row - (len(hidden) - len(injected.tokens.visual))
        openings, added = [], torch.zeros_like(out)
        for subject in range(injected.tokens.visual.shape[1]) if own >= 0 else ():
            weight = injected.tokens.weight[own, subject]
            tokens = injected.tokens.visual[own, subject]
            ip_key, ip_value = tokens @ branch.to_k_ip.weight.T, tokens @ branch.to_v_ip.weight.T
            seen = attention_by_hand(
                query[row], ip_key, ip_value, attn.heads, injected.tokens.mask[own, subject].tolist()
            )
            spread = torch.ones(len(out), 1)
            if branch.location is not None:
                logit = branch.location(
                    hidden[row : row + 1], injected.tokens.location_embedding[own, subject][None]
                )[0]
                spread = opening(logit)
                if weight and text_gate != "none":
                    openings.append(opening(logit if text_gate == "same" else -logit))
            if injected.tokens.regions is not None:
                region = injected.tokens.regions[own, subject]  # 8 x 8, for 4 x 4 pixels
                means = [
                    region[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean() for y in range(4) for x in range(4)
                ]
                spread = spread * torch.stack(means)[:, None]
            added += weight * scale * spread * seen
        if openings:  # text is kept where one of the subjects is, or where none is
            out = out * (
                torch.stack(openings).max(0).values if text_gate == "same" else torch.stack(openings).prod(0)
            )
        rows.append(out + added)
    return attn.to_out[0](torch.stack(rows))


@pytest.mark.parametrize(
    ("text_gate", "located", "lora"),
    [("none", False, False), ("none", True, True), ("same", True, False), ("complement", True, False)],
)
@torch.no_grad()
def test_a_layer_by_loops_over_heads_and_pixels(text_gate, located, lora):
    """Two subjects, padded tokens, regions and a scale, in the last two of four rows."""
    unet, branches = with_branches(tiny("sd15").unet, 5 if located else 0, text_gate)
    if lora:
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        for name, p in unet.named_parameters():
            if "lora_" in name:
                p.copy_(random(*p.shape, seed=8) * 0.3)
    name = text_layers(unet)[MID]
    attn = unet.get_submodule(name)
    hidden, text = random(4, 16, 16, seed=1), text_of(unet)
    regions = random(2, 2, 8, 8, seed=7).sigmoid()
    injected = two_subjects(5 if located else 0, regions=regions, scales={name: 0.6})
    found = attn(hidden, encoder_hidden_states=text, ip_hidden_states=injected)
    expected = layer_by_hand(attn, branches[MID], hidden, text, injected, 0.6, text_gate)
    assert torch.allclose(found, expected, atol=2e-5)
    plain = attn(hidden, encoder_hidden_states=text)
    assert torch.equal(found[:2], plain[:2])
    assert (found[2:] - plain[2:]).abs().amax((1, 2)).min() > 0.1


@pytest.mark.parametrize("base", UNETS)
@torch.no_grad()
def test_the_unconditional_rows_of_a_unet_are_untouched(base):
    unet = tiny(base).unet
    plain = step(unet)
    with_branches(unet, 5, "same")
    found = step(unet, two_subjects(5))
    assert torch.equal(found[:2], plain[:2])
    assert (found[2:] - plain[2:]).abs().amax((1, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_every_layer_counts():
    unet, branches = with_branches(tiny("sd15").unet)
    whole = step(unet, two_subjects())
    for branch in branches.values():
        kept = branch.to_v_ip.weight.clone()
        branch.to_v_ip.weight.zero_()
        assert not torch.allclose(step(unet, two_subjects()), whole, atol=1e-4)
        branch.to_v_ip.weight.copy_(kept)


@torch.no_grad()
def test_a_location_map_by_hand():
    location = woken(Location(4, 3, hidden=5))
    hidden, place = random(2, 6, 4), random(2, 3, seed=1)
    found = location(hidden, place)
    assert found.shape == (2, 6, 1)
    for row in range(2):
        modulation = location.modulate.weight @ place[row] + location.modulate.bias
        for pixel in range(6):
            x = hidden[row, pixel]
            x = (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5).sqrt()
            x = location.inner.weight @ (x * (1 + modulation[:4]) + modulation[4:]) + location.inner.bias
            x = location.outer.weight @ (x / (1 + torch.exp(-x))) + location.outer.bias
            assert torch.allclose(found[row, pixel], x, atol=1e-5)


def test_a_new_location_map_is_open_everywhere():
    assert torch.equal(Location(4, 3)(random(2, 6, 4), random(2, 3)), torch.zeros(2, 6, 1))


def test_the_gate_is_exactly_one_at_zero_and_monotone():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert gate(torch.zeros(3, dtype=dtype)).tolist() == [1.0] * 3
    x = torch.linspace(-8, 8, 101)
    assert (gate(x).diff() > 0).all()
    assert gate(torch.tensor(-30.0)) < 1e-9
    assert gate(torch.tensor(30.0)).item() == pytest.approx(1 + 2.718281828**-2, rel=1e-6)


@pytest.mark.parametrize(
    "sides", [(64, 64), (96, 64), (64, 96), (64, 41), (41, 64), (72, 49), (17, 33), (56, 72), (152, 88)]
)
@torch.no_grad()
def test_regions_fit_every_layer_of_any_shape_of_image(sides):
    """A UNet halves its sides three times, rounding up; a layer's region is the mean over what its pixel
    covers."""
    regions = torch.rand(1, 2, *sides)
    height, width = sides
    for _ in range(4):
        found = at_size(regions, height * width)
        expected = F.interpolate(regions, (height, width), mode="area").flatten(2)[..., None]
        assert found.shape == expected.shape, (height, width)
        assert torch.equal(found, expected), (height, width)
        height, width = (height + 1) // 2, (width + 1) // 2


# scales and the cache


@torch.no_grad()
def test_scale_zero_skips_the_branch():
    unet, branches = with_branches(tiny("sd15").unet)
    plain = step(unet)
    calls = calls_of(branches)
    assert torch.equal(step(unet, two_subjects(scales=dict.fromkeys(text_layers(unet).values(), 0.0))), plain)
    assert not calls


@torch.no_grad()
def test_scales_are_of_the_layer_that_they_name():
    """A doubled scale in one layer is a doubled value matrix in it; zero in the others is as if they had
    none."""
    unet, branches = with_branches(tiny("sd15").unet)
    names = text_layers(unet)
    found = step(
        unet, two_subjects(scales={name: 2.0 if number == MID else 0.0 for number, name in names.items()})
    )
    for number, branch in branches.items():
        branch.to_v_ip.weight.mul_(2.0 if number == MID else 0.0)
    assert torch.allclose(found, step(unet, two_subjects()), atol=1e-5)
    assert not torch.allclose(found, step(unet), atol=1e-3)


@torch.no_grad()
def test_a_layer_without_a_scale_has_scale_one():
    unet, _ = with_branches(tiny("sd15").unet)
    ones = dict.fromkeys(text_layers(unet).values(), 1.0)
    assert torch.equal(step(unet, two_subjects()), step(unet, two_subjects(scales=ones)))


@pytest.mark.parametrize("base", UNETS)
@torch.no_grad()
def test_cached_keys_and_values_are_made_once_and_are_the_same(base):
    unet, branches = with_branches(tiny(base).unet, 5)
    injected = two_subjects(5)
    expected = step(unet, injected)
    calls = calls_of(branches)
    cached = replace(injected, cache={})
    assert torch.equal(step(unet, cached), expected)
    assert torch.equal(step(unet, cached), expected)
    assert calls == dict.fromkeys(branches, 1)
    step(unet, injected)
    step(unet, injected)
    assert calls == dict.fromkeys(branches, 3)


# texts of the slots


@torch.no_grad()
def test_a_slots_text_replaces_that_of_the_conditional_rows_only():
    unet = deep()
    install(unet, woken(make_branches(unet, 12)))
    contexts = random(4, 2, 6, 16, seed=9)
    read: dict[str, list] = {}
    for name in text_layers(unet).values():
        for layer in ("to_k", "to_v"):
            part = unet.get_submodule(f"{name}.{layer}")
            part.register_forward_hook(
                lambda _, inputs, __, name=name: read.setdefault(name, []).append(inputs[0])
            )
    step(unet, two_subjects(block_texts=contexts))
    order = [
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    ]
    assert len(read) == 8
    for name, seen in read.items():
        [slot] = [i for i, stack in enumerate(order) if name.startswith(stack)]
        assert len(seen) == 2  # keys and values
        for states in seen:
            assert torch.equal(states[:2], text_of(unet)[:2])
            assert torch.equal(states[2:], contexts[slot])


@torch.no_grad()
def test_texts_of_slots_leave_the_unconditional_rows_alone():
    unet, _ = with_branches(tiny("sd15").unet)
    plain = step(unet, two_subjects())
    found = step(unet, two_subjects(block_texts=random(4, 2, 6, 16, seed=9)))
    assert torch.equal(found[:2], plain[:2])
    assert not torch.allclose(found[2:], plain[2:], atol=1e-3)


def test_layers_and_stacks_are_in_running_order():
    unet = deep()
    layers = text_layers(unet)
    ran: list[str] = []
    for name in layers.values():
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        step(unet)
    assert list(layers.values()) == ran
    assert list(layers) == ["1", "3", "13", "15", "5", "7", "9", "11"]
    assert stacks(unet) == [
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    ]


@pytest.mark.parametrize("build", [lambda: tiny("sd15").unet, lambda: tiny("sdxl").unet, deep])
def test_released_numbers_count_all_attention_layers(build):
    unet = build()
    layers, everything = text_layers(unet), list(unet.attn_processors)
    assert {everything[int(number)] for number in layers} == {f"{name}.processor" for name in layers.values()}
    assert all(everything[int(number)] == f"{name}.processor" for number, name in layers.items())
    assert sorted(map(int, layers)) == list(range(1, len(everything), 2))
    assert layers[str(len(everything) - 1)].startswith("mid_block")


def test_numbers_and_stacks_of_the_released_models():
    """Stable Diffusion 1.5 has 16 layers, each a stack; XL has 70 in 11 stacks."""
    slim = {"norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 8, "layers_per_block": 2}
    cross = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    with torch.device("meta"):
        blocks = {"down_block_types": (*cross[0], "DownBlock2D"), "up_block_types": ("UpBlock2D", *cross[1])}
        sd15 = UNet2DConditionModel(block_out_channels=(8,) * 4, **blocks, **slim)
        blocks = {
            "down_block_types": ("DownBlock2D", *cross[0][1:]),
            "up_block_types": (*cross[1][1:], "UpBlock2D"),
        }
        sdxl = UNet2DConditionModel(
            block_out_channels=(8,) * 3, transformer_layers_per_block=(1, 2, 10), **blocks, **slim
        )
    assert sorted(map(int, text_layers(sd15))) == list(range(1, 32, 2))
    assert sorted(map(int, text_layers(sdxl))) == list(range(1, 140, 2))
    assert (len(stacks(sd15)), len(stacks(sdxl))) == (16, 11)
    assert stacks(sdxl)[4] == "mid_block.attentions.0"


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_transformers_are_refused(base):
    denoiser = tiny(base).transformer
    for use in (text_layers, stacks, lambda d: make_branches(d, 8)):
        with pytest.raises(TypeError, match="UNet"):
            use(denoiser)


def test_branches_start_from_the_texts_keys_where_these_fit():
    unet = tiny("sd15").unet
    same, other = make_branches(unet, 16), make_branches(unet, 12)
    for number, name in text_layers(unet).items():
        attn = unet.get_submodule(name)
        assert torch.equal(same[number].to_k_ip.weight, attn.to_k.weight)
        assert not same[number].to_v_ip.weight.any()
        assert other[number].to_k_ip.weight.shape == (attn.inner_dim, 12)


# backends


@pytest.fixture
def dispatcher(monkeypatch):
    """The registry of attention backends, as it was once the test is over."""
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    return registry


@torch.no_grad()
def test_the_backend_of_the_unet_reaches_the_dispatcher(dispatcher, monkeypatch):
    unet, _ = with_branches(tiny("sd15").unet)
    backends = []
    dispatch = attention.dispatch_attention_fn

    def spy(*inputs, **named):
        backends.append(named["backend"])
        return dispatch(*inputs, **named)

    monkeypatch.setattr(attention, "dispatch_attention_fn", spy)
    expected = step(unet, two_subjects())
    assert backends == [None] * 12  # 4 self, 4 text, 4 visual
    backends.clear()
    unet.set_attention_backend("native")
    assert {processor._attention_backend for processor in unet.attn_processors.values()} == {
        AttentionBackendName.NATIVE
    }
    assert torch.equal(step(unet, two_subjects()), expected)
    assert backends == [AttentionBackendName.NATIVE] * 12
    unet.reset_attention_backend()
    assert {processor._attention_backend for processor in unet.attn_processors.values()} == {None}


def memory_efficient_attention(query, key, value, bias=None, p=0.0, scale=None):
    """What xformers computes, and its demands: (batch, tokens, heads, dim), and a bias of full shape and
    equal type."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if bias is not None:
        assert bias.shape == scores.shape
        assert bias.dtype == query.dtype
        scores = scores + bias
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@pytest.fixture
def xformers(dispatcher, monkeypatch):
    """A stand-in for xformers that runs anywhere; the calls of it."""
    calls = []

    def called(*inputs, **named):
        calls.append(inputs)
        return memory_efficient_attention(*inputs, **named)

    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda backend: None)
    monkeypatch.setattr(
        attention_dispatch, "xops", SimpleNamespace(memory_efficient_attention=called), raising=False
    )
    return calls


@torch.no_grad()
def test_xformers_becomes_the_backend_of_our_processors(xformers):
    unet, _ = with_branches(tiny("sd15").unet)
    injected = two_subjects(mask=None)
    expected, before = step(unet, injected), unet.attn_processors
    use_xformers(unet)
    assert unet.attn_processors == before
    assert {processor._attention_backend for processor in before.values()} == {AttentionBackendName.XFORMERS}
    assert torch.allclose(step(unet, injected), expected, atol=1e-5)
    assert len(xformers) == 12


@torch.no_grad()
def test_padded_tokens_are_left_out_by_xformers_too(xformers):
    unet, _ = with_branches(tiny("sd15").unet)
    expected = step(unet, two_subjects())
    use_xformers(unet)
    assert torch.allclose(step(unet, two_subjects()), expected, atol=1e-5)


def test_a_stock_unet_is_given_xformers_by_diffusers_own_switch(monkeypatch):
    unet = tiny("sd15").unet
    asked = []
    monkeypatch.setattr(unet, "enable_xformers_memory_efficient_attention", lambda: asked.append("switch"))
    monkeypatch.setattr(unet, "set_attention_backend", asked.append)
    use_xformers(unet)
    assert asked == ["switch"]


@pytest.mark.skipif(is_xformers_available(), reason="xformers is here")
def test_missing_xformers_is_named(dispatcher):
    unet, _ = with_branches(tiny("sd15").unet)
    with pytest.raises(RuntimeError, match="install `xformers"):
        use_xformers(unet)


# beside other features


@pytest.mark.parametrize("base", UNETS)
@torch.no_grad()
def test_lora_composes_with_the_processors(base):
    outputs = []
    for ours in (False, True):
        unet = tiny(base).unet
        if ours:
            with_branches(unet)
        without = step(unet)
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        for name, p in unet.named_parameters():
            if "lora_" in name:
                p.copy_(random(*p.shape, seed=8) * 0.5)
        outputs.append(step(unet))
        assert not torch.allclose(outputs[-1], without, atol=1e-3)
    assert torch.equal(*outputs)


def gradients(kind: str, checkpointing: bool) -> tuple[dict, Counter]:
    """Of a woken adapter's branches and encoder, with S+ in the text of every slot."""
    pipe = tiny("sd15")
    pipe.unet.requires_grad_(False).train()
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    adapter = woken(ADAPTERS[kind](pipe), 0.2)
    calls = calls_of(adapter.branches)
    features = adapter.encoder.read(tower()(random(8, 3, 32, 32))).unflatten(0, (4, 2))
    encoded = adapter.encoder(features, torch.ones(4, 2, dtype=torch.bool), torch.full((4,), 0.3))
    contexts = None
    if adapter.has_words:

        def encode(prompts):
            return {"text": pipe.encode_prompt(prompts, "cpu", 1, False)[0]}

        vectors = adapter.word_vectors(encoded, WEIGHT)
        prompts = ["a <s> dog on <s2> grass"] * 2
        contexts = adapter.texts(encode, [pipe.tokenizer], [pipe.text_encoder], prompts, vectors)["text"]
    hidden = random(2, 4, 16, 16, seed=1)
    text = random(2, 16, 16, seed=2)
    injected = adapter.injected(encoded, WEIGHT, contexts)
    out = pipe.unet(hidden, 500, text, cross_attention_kwargs={"ip_hidden_states": injected}).sample
    out.square().mean().backward()
    named = adapter.named_parameters()
    return {
        name: p.grad for name, p in named if "project_" not in name and not name.startswith("starts")
    }, calls


@pytest.mark.parametrize("kind", ["same", "complement", "image_prompt"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    (plain, calls), (checkpointed, more_calls) = (
        gradients(kind, checkpointing) for checkpointing in (False, True)
    )
    assert set(calls.values()) == {1}
    assert set(more_calls.values()) == {2}  # the layer ran again
    for name, grad in plain.items():
        assert grad is not None, name
        assert grad.any(), name
        assert torch.allclose(checkpointed[name], grad, rtol=1e-4, atol=1e-9), name
