"""Learned words: the vectors by hand, and tables that stay as they were."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import normalizers
from transformers import CLIPTextConfig, CLIPTextModel

from customize.adapters.embedding_hooks import replaced_words
from customize.adapters.subject import add_subject_words
from customize.adapters.words import LearnedWords, add_words, load_words, pieces
from customize.backbones.families import wrap
from customize.backbones.text import embedding_table, expanded
from customize.errors import UserError
from tiny import BASES, tiny, tokenizer

FIRST = len(tokenizer())  # the id of the first new word
ALL = [(base, i) for base in BASES for i in range({"sd15": 1, "sdxl": 2, "sd3": 3, "flux": 2}[base])]


def tight(base: str):
    """A backbone whose encoders know the tokenizer's words and no more, so that new ids lie beyond their
    tables."""
    pipe = tiny(base)
    for suffix in ("", "_2", "_3"):
        if encoder := getattr(pipe, f"text_encoder{suffix}", None):
            encoder.resize_token_embeddings(FIRST)
    return wrap(pipe, base)


def learned(base: str, words: dict[str, str], count: int = 1):
    """A backbone with words whose vectors are random."""
    backbone = tight(base)
    tokens = LearnedWords(backbone, words, count)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in tokens.vectors:
            p.copy_(torch.randn(p.shape, generator=generator))
    return backbone, tokens


def by_hand(base: str, index: int, vectors: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """The output of an encoder whose table was extended by `vectors`, whose ids begin with FIRST."""
    encoder = tight(base).text_encoders[index]
    encoder.resize_token_embeddings(FIRST + len(vectors), mean_resizing=False)
    with torch.no_grad():
        for table in (
            encoder.get_input_embeddings(),
            getattr(getattr(encoder, "encoder", None), "embed_tokens", None),
        ):
            if table is not None:
                table.weight[FIRST:] = vectors
        return encoder(torch.tensor([ids]))[0]


def ids_of(*words: str) -> list[int]:
    return tokenizer().convert_tokens_to_ids(list(words))


@pytest.mark.parametrize(("base", "index"), ALL)
def test_a_word_equals_a_row_of_the_embedding_table(base, index):
    backbone, tokens = learned(base, {"<toy>": "dog"})
    ids = backbone.tokenizers[index]("a red <toy> on grass").input_ids
    found = backbone.text_encoders[index](torch.tensor([ids]))[0]
    same = [*ids_of("<start>", "a", "red"), FIRST, *ids_of("on", "grass", "<end>")]
    expected = by_hand(base, index, tokens.vectors[index].detach(), same)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("base", "index"), ALL)
def test_several_words_of_several_vectors(base, index):
    """The pipeline's own expansion: <toy> stands for <toy> <toy>_1, and each word keeps its own vectors in
    order."""
    backbone, tokens = learned(base, {"<toy>": "dog", "<cat>": "cat"}, 2)
    prompt = expanded("a <cat> in <toy>", backbone.tokenizers[index])
    assert prompt == "a <cat> <cat>_1 in <toy> <toy>_1"
    found = backbone.text_encoders[index](torch.tensor([backbone.tokenizers[index](prompt).input_ids]))[0]
    toy, toy_1, cat, cat_1 = vectors = tokens.vectors[index].detach()
    same = [*ids_of("<start>", "a"), FIRST + 2, FIRST + 3, *ids_of("in"), FIRST, FIRST + 1, *ids_of("<end>")]
    expected = by_hand(base, index, vectors, same)
    assert torch.allclose(found, expected, atol=1e-5)
    named = tokens.by_word()
    name = backbone.embedding_names[index]
    assert torch.equal(named["<toy>"][name], torch.stack([toy, toy_1]))
    assert torch.equal(named["<cat>"][name], torch.stack([cat, cat_1]))


@pytest.mark.parametrize("base", BASES)
def test_the_pipelines_encoding_sees_every_vector(base):
    """Each vector of each encoder that the denoiser's text comes from gets a gradient of its own."""
    backbone, tokens = learned(base, {"<toy>": "dog"}, 3)
    text = backbone.encode_prompt(["a photo of <toy>", "the <toy> on grass"])
    sum(value.square().sum() for value in text.values()).backward()
    for name, p in zip(tokens.names, tokens.vectors, strict=True):
        assert p.grad is not None, name
        assert (p.grad.abs().sum(1) > 0).all(), name


@pytest.mark.parametrize("base", BASES)
def test_words_start_from_the_initializers_row(base):
    backbone = wrap(tiny(base), base)
    tokens = LearnedWords(backbone, {"<toy>": "dog", "<cat>": "red cat"}, 2)
    for p, encoder in zip(tokens.vectors, wrap(tiny(base)).text_encoders, strict=True):
        table = encoder.get_input_embeddings().weight
        dog, cat = (table[i] for i in ids_of("dog", "cat"))
        assert torch.equal(p.detach(), torch.stack([dog, dog, cat, cat]))
        assert p.requires_grad
        assert p.dtype == torch.float32


@pytest.mark.parametrize("base", BASES)
def test_other_prompts_and_all_tables_stay_bit_for_bit(base):
    backbone, tokens = learned(base, {"<toy>": "dog"}, 2)
    optimizer = torch.optim.SGD(tokens.parameters(), 1.0)
    text = backbone.encode_prompt(["a photo of <toy>"])
    sum(value.square().sum() for value in text.values()).backward()
    optimizer.step()
    plain = tight(base)
    for encoder, untouched in zip(backbone.text_encoders, plain.text_encoders, strict=True):
        states = encoder.state_dict(), untouched.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    with torch.no_grad():
        found, expected = (b.encode_prompt(["a photo of the dog"]) for b in (backbone, plain))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("base", BASES)
def test_half_precision_encoders_keep_float32_vectors(base):
    backbone = wrap(tiny(base).to(dtype=torch.bfloat16), base)
    tokens = LearnedWords(backbone, {"<toy>": "dog"})
    text = backbone.encode_prompt(["a photo of <toy>"])
    assert {value.dtype for value in text.values()} == {torch.bfloat16}
    sum(value.float().square().sum() for value in text.values()).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in tokens.vectors)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("base", BASES)
def test_load_words_gives_a_pipeline_the_same_prompt(base, count):
    backbone, tokens = learned(base, {"<toy>": "dog", "<cat>": "cat"}, count)
    other = tight(base)  # for sd3 this is the pipeline that reads words
    for word, vectors in tokens.by_word().items():
        load_words(other.pipe, word, vectors)
    with torch.no_grad():
        found, expected = (b.encode_prompt(["a <cat> in <toy>"]) for b in (other, backbone))
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_negative_prompts_of_sd3_may_hold_words():
    backbone, _ = learned("sd3", {"<toy>": "dog"}, 2)
    options = {"device": "cpu", "max_sequence_length": 16, "do_classifier_free_guidance": True}
    with torch.no_grad():
        _, negative, _, _ = backbone.pipe.encode_prompt(
            "a dog", None, None, negative_prompt="a <toy>", **options
        )
        positive, _, _, _ = backbone.pipe.encode_prompt("a <toy>", None, None, **options)
    assert torch.allclose(negative, positive, atol=1e-6)


@pytest.mark.parametrize("word", ["dog", "cat"])
def test_a_word_of_the_vocabulary_is_refused(word):
    with pytest.raises(UserError, match=f"'{word}' is .*already.*<my-{word}>"):
        LearnedWords(wrap(tiny("sd15")), {word: "dog"})


def test_a_word_cannot_be_added_twice():
    words = tokenizer()
    add_words(words, ["<toy>"])
    with pytest.raises(UserError, match=r"<toy>.*<my-toy>"):
        add_words(words, ["<toy>"])


def test_an_empty_initializer_is_refused():
    with pytest.raises(UserError, match="initializer_token"):
        LearnedWords(wrap(tiny("sd15")), {"<toy>": ""})


def test_pieces():
    assert pieces("<toy>", 1) == ["<toy>"]
    assert pieces("<toy>", 3) == ["<toy>", "<toy>_1", "<toy>_2"]


def test_text_is_pooled_at_its_end_though_a_word_has_a_higher_id():
    """Encoders whose configuration calls the end 2, as XL's second one does, pool at the highest id by
    themselves."""
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=6, eos_token_id=2)).eval()
    tokenizer = SimpleNamespace(eos_token_id=7, convert_tokens_to_ids=lambda words: [9 for _ in words])
    ids = torch.tensor([[1, 3, 9, 4, 7, 7]])  # the word is 9, the end 7 stands at place 4
    with torch.no_grad(), replaced_words([tokenizer], [encoder], ["<s>"], [torch.ones(1, 1, 8)]):
        output = encoder(ids)
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, 4])
    with torch.no_grad():
        assert torch.equal(
            encoder(ids.clamp(max=6)).pooler_output[0], encoder(ids.clamp(max=6)).last_hidden_state[0, 2]
        )


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_a_learned_word_beside_a_subjects_word(base):
    """On tables that hold exactly the tokenizer's words: both kinds of words lie beyond them."""
    backbone, tokens = learned(base, {"<toy>": "dog"})
    add_subject_words(backbone.tokenizers)
    dims = [embedding_table(encoder).embedding_dim for encoder in backbone.text_encoders]
    subject = [torch.randn(1, 1, dim, generator=torch.Generator().manual_seed(3)) for dim in dims]
    for index, (tokenizer_, encoder) in enumerate(
        zip(backbone.tokenizers, backbone.text_encoders, strict=True)
    ):
        ids = tokenizer_("a red <toy> on <s> grass").input_ids
        with replaced_words(backbone.tokenizers, backbone.text_encoders, ["<s>"], subject):
            found = encoder(torch.tensor([ids]))[0]
        vectors = torch.cat([tokens.vectors[index].detach(), subject[index][0]])
        same = [*ids_of("<start>", "a", "red"), FIRST, *ids_of("on"), FIRST + 1, *ids_of("grass", "<end>")]
        expected = by_hand(base, index, vectors, same)
        assert torch.allclose(found, expected, atol=1e-5)
        alone = encoder(torch.tensor([tokenizer_("a red <toy> on grass").input_ids]))[0]
        assert torch.isfinite(alone).all()


def lower_casing(base: str):
    """A backbone whose tokenizers lower-case, as CLIP's does."""
    pipe = tiny(base)
    for suffix in ("", "_2"):
        if hasattr(pipe, f"tokenizer{suffix}"):
            getattr(pipe, f"tokenizer{suffix}").backend_tokenizer.normalizer = normalizers.Lowercase()
    return wrap(pipe, base)


def test_a_word_with_capitals_has_one_vector_or_is_refused():
    """Of several vectors, diffusers would find the first alone in a prompt."""
    LearnedWords(lower_casing("sd15"), {"<MyToy>": "dog"}, 1)
    LearnedWords(lower_casing("sd15"), {"<mytoy>": "dog"}, 3)
    with pytest.raises(UserError, match=r"does not find all 3 vectors of '<MyToy>'.*such as '<mytoy>'"):
        LearnedWords(lower_casing("sd15"), {"<MyToy>": "dog"}, 3)
