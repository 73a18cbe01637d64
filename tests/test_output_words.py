"""Words as outputs of the text encoders (ConES): what is replaced, by loops, and what other pipelines
draw."""

import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

import customize
from customize.adapters.output_words import OutputWords, encoders_read
from customize.adapters.words import OUTPUTS, LearnedWords
from customize.backbones.families import wrap
from customize.errors import UserError
from customize.pipelines import load_pipeline
from tiny import BASES, draw, random, tiny

WORD = {"<toy>": "dog"}
PROMPTS = ["a photo of <toy> on grass", "a red cat", "<toy> in style of <toy>"]


def words_of(base: str, count: int = 2) -> tuple:
    backbone = wrap(tiny(base), base)
    return backbone, OutputWords(backbone, WORD, count)


@pytest.mark.parametrize("base", BASES)
def test_only_the_words_outputs_are_replaced(base):
    backbone, words = words_of(base)
    with torch.no_grad():
        before = backbone.encode_prompt(PROMPTS)
        for outputs in words.outputs.values():
            outputs += random(*outputs.shape, seed=4)
    after = backbone.encode_prompt(PROMPTS)
    assert torch.equal(before.get("text_embeds", torch.zeros(1)), after.get("text_embeds", torch.zeros(1)))
    hidden, changed = "encoder_hidden_states", []
    for i in range(len(PROMPTS)):
        for position in range(after[hidden].shape[1]):
            moved = not torch.equal(before[hidden][i, position], after[hidden][i, position])
            changed.append((i, position, moved))
    parts = {"sd15": [0], "sdxl": [0], "sd3": [0, 16], "flux": [0]}[base]
    expected = set()
    for i, prompt in enumerate(PROMPTS):
        position = 1  # behind the start of the text
        for word in prompt.split():
            length = 2 if word == "<toy>" else 1
            if word == "<toy>":
                expected |= {(i, part + position + k) for part in parts for k in range(length)}
            position += length
    assert {(i, position) for i, position, moved in changed if moved} == expected
    if base == "sdxl":  # both encoders side by side
        rows = [words.outputs[name] for name in ("clip_l", "clip_g")]
        assert torch.allclose(after[hidden][0, 4:6], torch.cat(rows, 1), atol=1e-6)
    gradients = torch.autograd.grad(after[hidden].square().sum(), list(words.outputs.values()))
    assert all(g.abs().sum() > 0 for g in gradients)
    assert not any(v.requires_grad for v in words.vectors)


@pytest.mark.parametrize("base", BASES)
def test_they_start_as_what_the_encoder_makes_of_the_starting_word(base):
    backbone, words = words_of(base)
    with torch.no_grad():
        found = backbone.encode_prompt(["a photo of a <toy>"])["encoder_hidden_states"]
        before = found.clone()
        for name, (_, encoder, _) in encoders_read(backbone.pipe).items():
            encoder._forward_hooks.clear()
            assert words.outputs[name].shape == (2, encoder.config.hidden_size)
        plain = backbone.encode_prompt(["a photo of a <toy>"])["encoder_hidden_states"]
    assert torch.allclose(before, plain, atol=1e-6)


@pytest.fixture
def run(images, tmp_path):
    tiny("sd15").save_pretrained(tmp_path / "base")
    return customize.train(
        "textual_inversion",
        pretrained_model_name_or_path=tmp_path / "base",
        instance_data_dir=images,
        placeholder_token="<toy>",
        initializer_token="dog",
        optimize="output",
        num_vectors=2,
        learning_rate=0.3,
        resolution=16,
        max_train_steps=3,
        output_dir=tmp_path / "run",
    )


def test_a_stock_pipeline_draws_the_word_from_its_text(run):
    ours, prompt = load_pipeline(run), "a photo of <toy> on grass"
    embeds, _ = ours.encode_prompt(prompt, "cpu", 1, False)
    stock = tiny("sd15")
    options = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "np"}
    negative, _ = stock.encode_prompt("", "cpu", 1, False)
    drawn = stock(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        generator=torch.Generator().manual_seed(1),
        **options,
    ).images[0]
    assert abs(drawn - draw(ours, prompt)).max() < 1e-6
    (run / OUTPUTS).rename(run / "elsewhere")
    with pytest.raises(UserError, match="output_embeds"):
        load_pipeline(run)


def test_other_pipelines_of_the_same_encoder_draw_the_word_too(run):
    pipe = load_pipeline(run)
    image = Image.new("RGB", (32, 32), "gray")
    options = {"image": image, "strength": 0.5, "num_inference_steps": 4, "output_type": "np"}
    drawn = []
    for own in (pipe, tiny("sd15")):
        other = AutoPipelineForImage2Image.from_pipe(own)
        embeds = other.encode_prompt("a photo of dog dog on grass", "cpu", 1, False)[0]
        word = "<toy>" if own is pipe else "dog dog"
        drawn.append(
            other(f"a photo of {word} on grass", generator=torch.Generator().manual_seed(0), **options)
        )
        assert embeds.shape[-1] == 16
    assert abs(drawn[0].images - drawn[1].images).max() > 1e-3


def test_a_run_goes_on_from_outputs_or_from_vectors(run, tmp_path):
    from customize.runs.checkpoint import open_run

    backbone = wrap(tiny("sd15"), "sd15")
    words = OutputWords(backbone, WORD, 2)
    start = words.outputs["clip_l"].detach().clone()
    words.start_from(run, open_run(run))
    with torch.no_grad():
        found = load_pipeline(run).encode_prompt("a photo of a <toy>", "cpu", 1, False)[0]
    assert not torch.equal(words.outputs["clip_l"], start)
    assert torch.allclose(found[0, 5:7], words.outputs["clip_l"], atol=1e-6)
    with pytest.raises(UserError, match="trained with --optimize output"):
        LearnedWords(wrap(tiny("sd15")), WORD, 2).start_from(run, open_run(run))


def test_outputs_of_another_base_model_are_refused(run):
    from safetensors.torch import load_file, save_file

    from customize.runs.checkpoint import open_run

    info = open_run(run)
    state = {name: value[:, :8].contiguous() for name, value in load_file(run / OUTPUTS).items()}
    save_file(state, run / OUTPUTS)
    with pytest.raises(UserError, match="does not fit this base model"):
        OutputWords.load(run, info, load_pipeline(run.parent / "base"))
