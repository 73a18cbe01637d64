"""CoRe: its losses by loops, what is held and what is refused, and tuning at test time."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import customize
from customize.adapters.words import LearnedWords
from customize.attention_maps import AttentionRecorder, word_positions
from customize.backbones.base import Condition
from customize.backbones.families import wrap
from customize.context import ContextPair
from customize.errors import UserError
from customize.losses.context import with_norms_of
from customize.pipelines import load_pipeline
from customize.pipelines.context_tuning import context_tuned
from customize.trainers.methods.context_prompts import SETS, prompt_set
from customize.trainers.methods.core import CoRe
from tiny import BASES, draw, random, tiny

WORD = {"placeholder_token": "<toy>", "initializer_token": "dog"}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "# two scenes\na photo of a {} on grass\na red {} in the style of a cat\n", encoding="utf-8"
    )
    return str(path)


def method_of(base, prompts, **options) -> CoRe:
    backbone = wrap(tiny(base), base)
    return CoRe(backbone, CoRe.Config(**(WORD | {"context_prompts": prompts} | options)), [])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("vectors", [1, 2])
def test_both_losses_by_loops(base, vectors, prompts):
    method = method_of(base, prompts, num_vectors=vectors)
    backbone = method.backbone
    with torch.no_grad():
        for own in method.tokens.vectors:
            own += random(*own.shape, seed=3)
    noisy, t = random(1, 4, 16, 16), backbone.nearest_times(torch.tensor([0.5]))
    pair = ContextPair("a photo of a {} on grass", "<toy>", "dog")
    embedding, attention = pair.losses(backbone, noisy, t)
    found = []
    for word in ("<toy>", "dog"):
        prompt = pair.template.format(word)
        with torch.no_grad(), AttentionRecorder(backbone.denoiser) as recorder:
            text = backbone.encode_prompt([prompt])
            backbone.denoise(noisy, t, Condition(text))
        own, outputs = word_positions(backbone.pipe, prompt, word), text["encoder_hidden_states"][0]
        ends = [16, len(outputs)] if base == "sd3" else [len(outputs)]
        parts = [
            [i for i in range(start, end) if i not in own]
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        shares = [
            sum(float(maps[0, i].mean()) for maps in recorder.maps.values()) / len(recorder.maps)
            for i in range(len(outputs))
        ]
        found.append((outputs, shares, parts))
    (outputs, shares, parts), (class_outputs, class_shares, class_parts) = found
    pairs = [p for own, other in zip(parts, class_parts, strict=True) for p in zip(own, other, strict=False)]
    cosines = [1 - F.cosine_similarity(outputs[i], class_outputs[j], dim=0).item() for i, j in pairs]
    squares = [(shares[i] - class_shares[j]) ** 2 for i, j in pairs]
    assert embedding.item() == pytest.approx(sum(cosines) / len(cosines), rel=1e-3, abs=1e-6)
    assert attention.item() == pytest.approx(sum(squares) / len(squares), rel=1e-3, abs=1e-12)
    gradients = torch.autograd.grad(
        embedding + 1e3 * attention, list(method.tokens.vectors), allow_unused=True
    )
    assert any(g is not None and g.any() for g in gradients)


def test_a_word_that_is_its_class_costs_nothing(prompts):
    method = method_of("sd15", prompts)  # it starts from the vector of "dog"
    noisy, t = random(1, 4, 16, 16), method.backbone.nearest_times(torch.tensor([0.5]))
    for template in prompt_set(prompts):
        losses = ContextPair(template, "<toy>", "dog").losses(method.backbone, noisy, t)
        assert max(loss.item() for loss in losses) < 1e-6


@pytest.mark.parametrize("template", ["a {} dog on grass", "{} in the style of a dog", "a dog next to a {}"])
def test_a_word_that_is_its_class_costs_nothing_beside_the_class(template, prompts):
    method = method_of("sd15", prompts)
    pair = ContextPair(template, "<toy>", "dog")
    if template.startswith("a {} dog"):
        assert (pair.template, pair.word) == ("a {} on grass", "<toy> dog")
        return  # "<toy> dog" is longer than "dog", so the rest stands elsewhere
    noisy, t = random(1, 4, 16, 16), method.backbone.nearest_times(torch.tensor([0.5]))
    assert max(loss.item() for loss in pair.losses(method.backbone, noisy, t)) < 1e-6


def test_the_norm_is_held_in_the_middle(prompts):
    method = method_of("sd15", prompts, num_vectors=2, norm_hold_start=0.25, norm_hold_end=0.75)
    [vectors] = method.tokens.vectors
    norms = []
    for step in range(8):
        method.on_step(step, 8)
        with torch.no_grad():
            vectors *= 1.5
        method.after_step()
        norms.append(vectors.detach().norm(dim=-1))
    growth = [float((after / before).mean()) for before, after in itertools.pairwise(norms)]
    assert growth == pytest.approx([1.5, 1, 1, 1, 1, 1.5, 1.5])
    scaled = with_norms_of(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[10.0], [1.0]]))
    assert scaled.tolist() == [[6.0, 8.0], [0.0, 1.0]]


def test_the_sets_hold_a_hundred_prompts_each():
    for name in SETS:
        found = prompt_set(name)
        assert len(set(found)) == 100
        assert all(prompt.count("{}") == 1 for prompt in found)
    assert len(set(prompt_set("stickers"))) == len(prompt_set("stickers")) > 80


MISTAKES = {
    "a set that does not exist": ({"context_prompts": "animals"}, "no set or file 'animals'"),
    "outputs": ({"optimize": "output"}, "optimize output learns a word behind it"),
    "held backwards": ({"norm_hold_start": 0.9}, "norm_hold_end must not be less"),
    "number of words": ({"initializer_token": "dog+cat"}, "as many"),
    "another word": (
        {"pretrained_words": "RUN", "placeholder_token": "<pet>"},
        "has learned <toy>, not '<pet>'",
    ),
    "another number of vectors": (
        {"pretrained_words": "RUN", "num_vectors": 2},
        "give the run's num_vectors",
    ),
    "no run": ({"pretrained_words": "nowhere"}, "nowhere"),
}


@pytest.fixture
def flags(images, prompts, tmp_path):
    tiny("sd15").save_pretrained(tmp_path / "base")
    return {
        "pretrained_model_name_or_path": tmp_path / "base",
        "instance_data_dir": images,
        "instance_prompt": "a photo of <toy>",
        "output_dir": tmp_path / "run",
        "resolution": 16,
        "max_train_steps": 2,
        **WORD,
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_training(name, flags, prompts, tmp_path, monkeypatch):
    changes, said = MISTAKES[name]
    if changes.get("pretrained_words") == "RUN":
        run = customize.train("textual_inversion", **(flags | {"output_dir": tmp_path / "first"}))
        changes = changes | {"pretrained_words": run}
    monkeypatch.setattr(CoRe, "forward", lambda *_: pytest.fail("it trained"))
    options = {"context_prompts": prompts, "instance_prompt": "a photo of <toy> on <pet>"} | changes
    with pytest.raises(UserError, match=said):
        customize.train("core", **(flags | options))


@pytest.mark.parametrize("line", ["a photo", "{} on {}", "a {dog} on {}", ""])
def test_a_prompt_without_a_place_for_the_word_is_refused(line, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"must hold \{\} once"):
        prompt_set(str(path))


def test_the_second_stage_goes_on_from_the_words(flags, prompts, tmp_path):
    first = customize.train("core", **flags, context_prompts=prompts, learning_rate=0.1)
    second = customize.train(
        "pivotal_tuning",
        **(flags | {"output_dir": tmp_path / "second"}),
        pretrained_words=first,
        train_text_encoder_ti_frac=0.0,
        full_finetune=True,
    )
    before, after = (load_pipeline(folder) for folder in (first, second))
    table = [pipe.text_encoder.get_input_embeddings().weight[-1] for pipe in (before, after)]
    assert torch.equal(*table)
    weights = [pipe.unet.conv_in.weight for pipe in (before, after)]
    assert not torch.equal(*weights)


def test_tuning_for_a_prompt_lowers_its_losses_and_leaves_the_pipeline_as_it_was():
    far = 3 * random(2, 16, seed=5)
    pipe, prompt = tiny("sd15"), "a photo of <toy> on grass"
    pipe.load_textual_inversion({"<toy>": far}, token="<toy>")
    before = draw(pipe, prompt)
    noisy, t = random(1, 4, 16, 16), wrap(pipe).nearest_times(torch.tensor([0.5]))
    pair = ContextPair("a photo of {} on grass", "<toy>", "dog")

    def loss() -> float:
        own = wrap(pipe)
        with torch.no_grad():
            return pair.losses(own, noisy, t)[0].item()

    worst = loss()
    with context_tuned(pipe, prompt, {"<toy>": "dog"}, steps=20, learning_rate=0.1):
        assert loss() < 0.9 * worst
        assert (draw(pipe, prompt) != before).any()
    assert loss() == worst
    assert (draw(pipe, prompt) == before).all()
    with (
        pytest.raises(UserError, match="says none of the learned words"),
        context_tuned(pipe, "a photo", {"<toy>": "dog"}),
    ):
        pass
    with (
        pytest.raises(UserError, match="'<pet>' is no learned word of this pipeline"),
        context_tuned(pipe, "a photo of <pet>", {"<pet>": "cat"}),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", BASES)
def test_tuning_for_a_prompt_in_half_precision(base, dtype):
    backbone = wrap(tiny(base).to(dtype=dtype), base)
    words = LearnedWords(backbone, {"<toy>": "dog"}, 2)
    with torch.no_grad():
        for own in words.vectors:
            own += random(*own.shape, seed=3)
    pipe, prompt = backbone.pipe, "a photo of <toy> on grass"

    def text():
        with torch.no_grad():
            return backbone.encode_prompt([prompt])["encoder_hidden_states"]

    before = text()
    with context_tuned(pipe, prompt, {"<toy>": "dog"}, steps=3, learning_rate=0.5):
        assert text().isfinite().all()
        assert not torch.equal(text(), before)
    assert torch.equal(text(), before)
