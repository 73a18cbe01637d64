"""The UNet as its own encoder of references: attention that is joined with them by hand, training, files."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_encoder_training import image, subjects, trained
from test_subject_tasks import call, stock_of
from torch import nn

from customize.adapters.encoders.image_encoder import squared
from customize.adapters.joined_attention import Joined, JoinedAttention, JoinedTokens
from customize.adapters.reference_unet import FILE, ReferenceUNet
from customize.app.generate import generate
from customize.backbones.families import wrap
from customize.data.references import View, moved
from customize.errors import UserError
from customize.imaging import flatten
from customize.pipelines.load import load_subject_pipeline, with_subjects
from customize.trainers.launch import run
from customize.trainers.methods.reference_unet import ReferenceUNetMethod
from tiny import BASES, random, tiny, woken

assert subjects  # a fixture
UNETS = ("sd15", "sdxl")
CASES = {
    "self": {},
    "cross": {"join": "cross"},
    "noised": {"reference_noise": "current", "multi_reference_rate": 0.5},
}
PROMPT = "a photo of <s> dog"


def build(base: str, **options) -> ReferenceUNetMethod:
    backbone = wrap(tiny(base), f"tiny-{base}")
    backbone.resolution = 32
    return ReferenceUNetMethod(backbone, ReferenceUNetMethod.Config(**options))


def noise(seed: int, size=(40, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def draw(pipe, prompt: str = PROMPT, **options) -> np.ndarray:
    given = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np"}
    given |= {"generator": torch.Generator().manual_seed(1)}
    return pipe(prompt, **(given | options)).images[0]


def reloaded(base: str, file) -> object:
    pipe = with_subjects(tiny(base))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_subject_adapter(file)
    pipe.vae.requires_grad_(False)  # as in training: torch's convolutions differ by it in their last bit
    return pipe


# the mathematics, by hand


def by_hand(query, own_keys, own_values, keys, values, m, text_mask=None) -> torch.Tensor:
    """One sample's attention by loops: queries (pixels, heads, dim), keys of the references with m (pixels,
    keys)."""
    out = torch.zeros_like(query)
    for p in range(query.shape[0]):
        for h in range(query.shape[1]):
            shares, seen = [], []
            for k in range(len(own_keys)):
                if text_mask is None or text_mask[k]:
                    shares.append(math.exp(float(query[p, h] @ own_keys[k, h]) / query.shape[2] ** 0.5))
                    seen.append(own_values[k, h])
            for k in range(len(keys)):
                score = float(query[p, h] @ keys[k, h]) / query.shape[2] ** 0.5
                shares.append(float(m[p, k]) * math.exp(score))
                seen.append(values[k, h])
            total = sum(shares)
            out[p, h] = sum(share / total * value for share, value in zip(shares, seen, strict=True))
    return out


@pytest.mark.parametrize("join", ["self", "cross"])
@torch.no_grad()
def test_joined_attention_is_the_softmax_over_own_and_reference_keys(join):
    """Two samples under guidance, two subjects with two references each, masks, regions and weights."""
    unet = tiny("sd15").unet
    name = f"mid_block.attentions.0.transformer_blocks.0.attn{1 if join == 'self' else 2}"
    attn = unet.get_submodule(name)
    width, heads = attn.query_dim, attn.heads
    branch = woken(nn.ModuleDict({k: nn.Linear(width, attn.inner_dim, bias=False) for k in ("to_k", "to_v")}))
    hidden = random(4, 4, width, seed=1)
    text = random(4, 5, 16, seed=2) if join == "cross" else None
    text_mask = torch.tensor([[1, 1, 1, 1, 0]] * 4).bool() if join == "cross" else None
    states = random(2, 2, 2, 4, width, seed=3)
    mask = torch.rand(2, 2, 2, 2, 2, generator=torch.Generator().manual_seed(4))
    mask[0, 1, 1] = 0  # a reference that does not exist
    weight = torch.tensor([[1.0, 0.6], [2.0, 0.0]])
    regions = torch.rand(2, 2, 2, 2, generator=torch.Generator().manual_seed(5))
    given = Joined(JoinedTokens({name: states}, mask, weight, regions), {name: 0.8})

    bias = None if text_mask is None else ((~text_mask) * -10000.0).unsqueeze(1)
    found = JoinedAttention(name, branch)(attn, hidden, text, bias, ip_hidden_states=given)
    plain = JoinedAttention()(attn, hidden, text, bias)

    assert torch.equal(found[:2], plain[:2])  # the unconditional half
    context = hidden if text is None else text
    parts = (attn.to_q(hidden), attn.to_k(context), attn.to_v(context))
    query, key, value = (part.unflatten(-1, (heads, -1)) for part in parts)
    for row in range(2):
        keys, values, m = [], [], []
        for subject in range(2):
            for reference in range(2):
                for k in range(4):
                    state = states[row, subject, reference, k]
                    keys.append(branch["to_k"](state).unflatten(-1, (heads, -1)))
                    values.append(branch["to_v"](state).unflatten(-1, (heads, -1)))
                    of_key = 0.8 * weight[row, subject] * mask[row, subject, reference].flatten()[k]
                    m.append(torch.stack([of_key * regions[row, subject].flatten()[p] for p in range(4)]))
        own = (x[2 + row] for x in (query, key, value))
        read = None if text_mask is None else text_mask[2 + row]
        wanted = by_hand(*own, torch.stack(keys), torch.stack(values), torch.stack(m, 1), read).flatten(1)
        assert torch.allclose(found[2 + row], attn.to_out[0](wanted), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", UNETS)
@torch.no_grad()
def test_the_encoder_reads_what_enters_the_stock_layers(base, case):
    method = build(base, **CASES[case]).eval()
    pipe, encoder = method.pipe, method.adapter.encoder
    features = pipe.encode_references([noise(0), noise(1)])
    t = torch.tensor([0.4])
    states = encoder(features[None], torch.tensor([[True, True]]), t).states

    stock = tiny(base)
    pixels = [flatten(noise(i)).resize((32, 32), Image.Resampling.BICUBIC) for i in (0, 1)]
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 127.5 - 1 for p in pixels])
    latents = stock.vae.encode(pixels).latent_dist.mean * stock.vae.config.scaling_factor
    step = torch.zeros(2, dtype=torch.long)
    if case == "noised":
        step += 400
        drawn = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))
        latents = stock.scheduler.add_noise(latents, drawn.expand_as(latents), step)
    text = stock.encode_prompt(
        prompt=["", ""], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = {}
    if base == "sdxl":
        ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(2, -1)
        added = {"added_cond_kwargs": {"text_embeds": text[2], "time_ids": ids}}
    seen = {}
    for name in states:
        assert name.endswith("attn2" if case == "cross" else "attn1")
        layer = stock.unet.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    stock.unet(latents, step, text[0], **added)
    for name, value in states.items():
        assert torch.allclose(value[0], seen[name], atol=1e-4), name


@torch.no_grad()
def test_multiplicity_follows_the_masks_to_every_size():
    mask = torch.zeros(1, 1, 1, 4, 4)
    mask[..., :2, :2] = 1
    tokens = JoinedTokens({}, mask, torch.full((1, 1), 0.5))
    assert tokens.multiplicity(4, 99).tolist() == [[[0.5, 0, 0, 0]]]
    assert tokens.multiplicity(16, 99).sum() == 2.0


# in pipelines


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", UNETS)
def test_a_reference_of_no_weight_leaves_the_base_model(base, case):
    pipe = build(base, **CASES[case]).eval().pipe
    plain = draw(tiny(base), "a photo of dog")
    assert np.array_equal(draw(pipe, "a photo of dog"), plain)
    for options in ({"subject_scale": 0.0}, {"subject_masks": Image.new("L", (32, 32))}):
        assert np.abs(draw(pipe, subject_images=noise(0), **options) - plain).max() < 1e-5
    assert np.abs(draw(pipe, subject_images=noise(0)) - plain).max() > 1e-3


def test_a_transparent_background_does_not_count():
    """Two images that differ behind transparency alone; a subject that is wholly transparent."""
    pipe = build("sd15").eval().pipe
    alpha = Image.new("L", (32, 32))
    alpha.paste(255, (0, 0, 16, 32))
    one = noise(0, (32, 32))
    one.putalpha(alpha)
    assert pipe.encode_references(one)[..., -1].unique().tolist() == [0.0, 1.0]
    one.putalpha(Image.new("L", (32, 32)))
    plain = draw(tiny("sd15"), "a photo of dog")
    assert np.abs(draw(pipe, subject_images=one) - plain).max() < 1e-5


def test_references_and_subjects_each_count_and_their_order_does_not():
    pipe = build("sd15").eval().pipe
    a, b = noise(0), noise(1)
    pair = draw(pipe, subject_images=[a, b])
    assert np.allclose(pair, draw(pipe, subject_images=[b, a]), atol=1e-5)
    assert np.abs(pair - draw(pipe, subject_images=[a])).max() > 1e-4
    two = {"<s>": a, "<s2>": b}
    prompt = "a <s> dog next to a <s2> cat"
    apart, joined = (draw(pipe, prompt, subject_images=two, subject_masks=m) for m in ("side by side", None))
    assert np.abs(apart - joined).max() > 1e-5
    alone = draw(pipe, prompt, subject_images=two, subject_scale={"<s2>": 0.0})
    assert np.allclose(alone, draw(pipe, prompt, subject_images={"<s>": a}), atol=1e-5)


def test_prompts_without_a_subject_and_several_images_of_each():
    pipe = build("sd15").eval().pipe
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    drawn = pipe(
        ["a <s> dog", "a cat"],
        subject_images=[[noise(0)], None],
        generator=seeds,
        num_images_per_prompt=2,
        **options,
    ).images
    seeds = [torch.Generator().manual_seed(i) for i in range(2, 4)]
    alone = tiny("sd15")("a cat", num_images_per_prompt=2, generator=seeds, **options).images
    assert np.abs(drawn[2:] - alone).max() < 1e-5


@pytest.mark.parametrize("task", ["image-to-image", "controlnet"])
def test_it_draws_in_the_pipelines_of_other_tasks(task, tmp_path):
    build("sd15").adapter.save(tmp_path)
    pipe = with_subjects(stock_of(task, "sd15"))
    pipe.load_subject_adapter(tmp_path)
    with_subject = call(pipe, task, PROMPT, subject_images=noise(0))
    assert np.abs(with_subject - call(pipe, task, PROMPT.replace("<s> ", ""))).max() > 1e-4


def test_a_saved_pipeline_keeps_it(tmp_path):
    method = build("sd15").eval()
    method.pipe.save_pretrained(tmp_path)
    pipe = load_subject_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    before, after = (draw(own, subject_images=noise(0)) for own in (method.pipe, pipe))
    assert np.allclose(before, after, atol=1e-5)  # weights in a file's memory add up in another order


# training


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", UNETS)
def test_it_trains_saves_and_reloads(base, case, subjects, tmp_path):
    method = build(base, **CASES[case])
    before = {name: value.detach().clone() for name, value in method.named_parameters()}
    names = set(method.trainable())
    assert names == {name for name in before if name.startswith("adapter.branches.")}
    trained(method, subjects, tmp_path)
    after = dict(method.named_parameters())
    assert all(torch.equal(before[name], after[name]) == (name not in names) for name in after)
    assert np.array_equal(image(method.pipe, subjects), image(reloaded(base, tmp_path), subjects))
    assert load_file(tmp_path / FILE).keys() == {name.removeprefix("adapter.") for name in names}


def test_a_run_is_trained_and_drawn_from_the_command_line(subjects, tmp_path, capsys):
    tiny("sd15").save_pretrained(tmp_path / "base")
    flags = {"pretrained_model_name_or_path": tmp_path / "base", "train_data_dir": subjects, "resolution": 32}
    flags |= {"instance_prompt": "a <s> dog", "holdout": 2, "validation_steps": 2, "train_batch_size": 2}
    flags |= {"validation_prompt": "a <s> dog", "validation_images": subjects / "dog0" / "0.png"}
    flags |= {"max_train_steps": 2, "output_dir": tmp_path / "run", "mixed_precision": "bf16"}
    words = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    run(["reference_unet", *words, "--gradient_checkpointing"])
    [row] = (json.loads(line) for line in (tmp_path / "run/validation.jsonl").read_text().splitlines())
    assert {"validation_loss", "gain"} <= row.keys()
    assert {value.dtype for value in load_file(tmp_path / "run" / FILE).values()} == {torch.float32}
    draw_flags = ["--num_inference_steps", "2", "--device", "cpu"]
    subject = str(subjects / "dog0" / "0.png")
    generate([str(tmp_path / "run"), "a <s> dog", "--subject_images", subject, *draw_flags])
    assert list((tmp_path / "run/generated").glob("*.png"))
    with pytest.raises(UserError, match="is a subject encoder: name images"):
        generate([str(tmp_path / "run"), "a dog"])


def test_an_earlier_run_is_gone_on_from(subjects, tmp_path):
    first = trained(build("sd15"), subjects, tmp_path)
    again = build("sd15", pretrained_adapter=str(tmp_path))
    for name, value in first.trainable().items():
        assert torch.equal(value, again.trainable()[name])
    with pytest.raises(UserError, match="was trained with --join self; give the same"):
        build("sd15", pretrained_adapter=str(tmp_path), join="cross")


def test_cut_out_views_are_transparent_where_nothing_is_of_them():
    """Encoders that flatten them see what they saw before."""
    mask = Image.new("L", (40, 32))
    mask.paste(100, (5, 5, 20, 20))
    mask.paste(255, (10, 10, 20, 20))
    view = View(noise(3, (32, 40)), mask)
    wanted = Image.composite(view.image, Image.new("RGB", (40, 32), "white"), mask)
    assert np.array_equal(np.asarray(flatten(view.cut_out)), np.asarray(wanted))
    assert np.array_equal(np.asarray(view.cut_out.getchannel("A")) > 0, np.asarray(mask) > 0)
    for shown in (squared(view.cut_out, "pad"), moved(view.cut_out, np.random.default_rng(0))):
        assert shown.mode == "RGBA"
        assert shown.getpixel((0, 39))[3] == 0
        assert flatten(shown).getpixel((0, 39)) == (255, 255, 255)


# bad input


@pytest.mark.parametrize("base", [base for base in BASES if base not in UNETS])
def test_transformers_are_refused(base):
    with pytest.raises(UserError, match="needs a UNet"):
        build(base)


def test_another_base_model_and_an_image_encoder_are_refused(tmp_path):
    build("sd15").adapter.save(tmp_path)
    pipe = with_subjects(tiny("sd15"))
    with pytest.raises(UserError, match="reads images without one; leave it out"):
        pipe.load_subject_adapter(tmp_path, "openai/clip")
    about = json.dumps({"resolution": 32, "join": "self", "noise": "none", "layers": [["mid", 8]]})
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, {"reference_unet": about})
    with pytest.raises(UserError, match="was trained for another base model"):
        pipe.load_subject_adapter(tmp_path)


@pytest.mark.parametrize(
    "header",
    ["{", "[]", '{"join": "self"}', '{"join": "x", "noise": "none", "resolution": 32, "layers": []}'],
)
def test_a_damaged_header_is_refused(header, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / FILE, {"reference_unet": header})
    with pytest.raises(UserError, match="is damaged"):
        with_subjects(tiny("sd15")).load_subject_adapter(tmp_path)


def test_a_file_that_lacks_a_tensor_or_is_not_finite_is_refused(tmp_path):
    adapter: ReferenceUNet = build("sd15").adapter
    adapter.save(tmp_path)
    state, path = load_file(tmp_path / FILE), tmp_path / FILE
    about = json.dumps({"resolution": 32, "join": "self", "noise": "none", "layers": adapter.widths})
    name = next(iter(state))
    for changed in ({k: v for k, v in state.items() if k != name}, state | {name: state[name] * torch.nan}):
        save_file(changed, path, {"reference_unet": about})
        with pytest.raises(UserError, match=str(path.name)):
            with_subjects(tiny("sd15")).load_subject_adapter(tmp_path)


# training and drawing agree


def test_training_conditions_as_the_pipeline_draws():
    method = build("sd15").eval()
    views = method.reference_pixels([noise(0), noise(1), noise(2), noise(3)]).view(2, 1, 2, 4, 32, 32)
    batch = {"references": views, "present": torch.tensor([[True], [True]]), "prompt": [PROMPT, "a <s> cat"]}
    batch |= {"shows_target": torch.tensor([False, False])}
    t = torch.tensor([0.2, 0.7])
    given = method.condition(batch, t).injected.tokens
    assert given.weight.tolist() == [[1.0], [1.0]]
    for row, shown in enumerate((noise(0), noise(2))):  # the first view alone, in evaluation mode
        features = method.pipe.encode_references(shown)
        alone = method.adapter.encoder(features[None], torch.ones(1, 1).bool(), t[:1])
        for name, value in alone.states.items():
            assert torch.allclose(given.states[name][row], value[:1], atol=1e-5)
    method.config.dropout_image, method.config.dropout_text, method.config.dropout_both = 1.0, 0.0, 0.0
    assert not method.train().condition(batch, t).injected.tokens.weight.any()


def test_a_reference_that_is_the_target_is_not_shown():
    method = build("sd15", multi_reference_rate=1.0).train()
    views = method.reference_pixels([noise(i) for i in range(4)]).view(2, 1, 2, 4, 32, 32)
    batch = {"references": views, "present": torch.tensor([[True], [True]]), "prompt": [PROMPT] * 2}
    mask = method.condition(batch | {"shows_target": torch.tensor([False, True])}, torch.zeros(2))
    assert mask.injected.tokens.mask.amax((-1, -2)).tolist() == [[[1.0, 1.0]], [[1.0, 0.0]]]
