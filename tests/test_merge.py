"""LoRAs joined without training: the sums by hand, what stock diffusers draws, and what is refused."""

import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import customize
from customize.adapters.lora import LoraFields, add_lora
from customize.adapters.lora_reading import Update, load_lora, read_lora
from customize.adapters.merging import HOW, lora_state, merged, orthogonal, strongest, svd
from customize.app.cli import main
from customize.errors import UserError
from customize.files import header
from customize.pipelines import load_pipeline
from customize.runs.folder import read_info
from tiny import draw, random, tiny

PROMPT = "a photo of sks dog"
FILE = "pytorch_lora_weights.safetensors"


def update(rank: int = 2, seed: int = 0, out: int = 6, width: int = 5) -> Update:
    return Update(random(rank, width, seed=seed), random(out, rank, seed=seed + 50), (rank, width))


def train(base: str, folder, images, seed: int, **options):
    if not (folder.parent / f"base-{base}").is_dir():
        tiny(base).save_pretrained(folder.parent / f"base-{base}")
    return customize.train(
        "dreambooth",
        pretrained_model_name_or_path=folder.parent / f"base-{base}",
        instance_data_dir=images,
        instance_prompt=PROMPT,
        output_dir=folder,
        resolution=16,
        max_train_steps=2,
        learning_rate=0.05,
        seed=seed,
        **options,
    )


@pytest.fixture
def two(images, tmp_path):
    options = {"lora_layers": "all", "train_text_encoder": True, "export_kohya": True}
    return [
        train("sd15", tmp_path / name, images, seed, rank=rank, lora_alpha=alpha, **options)
        for name, seed, rank, alpha in (("a", 0, 2, 4.0), ("b", 1, 3, 3.0))
    ]


def weights_with(base: str, runs, weights) -> dict[str, torch.Tensor]:
    """The weights of a base model with w up down of each run added by hand."""
    pipe, found = tiny(base), {}
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    for run, weight in zip(runs, weights, strict=True):
        state = load_file(run / FILE)
        for key, down in state.items():
            if ".down." not in key:
                continue
            up = state[key.replace(".down.", ".up.")]
            part, _, rest = key.partition(".")
            layer = rest.partition(".lora")[0].removeprefix("text_model.")
            module = dict(parts[part].named_modules()).get(layer) or parts[part].get_submodule(
                f"text_model.{layer}"
            )
            delta = up.flatten(1) @ down.flatten(1)
            name = f"{part}.{layer}"
            found[name] = found.get(name, module.weight.detach().clone()) + weight * delta.view(
                module.weight.shape
            )
            module.weight.data = found[name]
    return {"image": draw(pipe, PROMPT)}


@pytest.mark.parametrize("layout", [FILE, "lora_kohya.safetensors"])
def test_the_exact_sum_draws_as_the_weights_summed_by_hand(layout, two, tmp_path, capsys):
    sources = [str(run / layout) if layout != FILE else str(run) for run in two]
    base = ["--base_model", str(tmp_path / "base-sd15")]
    words = ["merge", *sources, "--weights", "0.7", "-0.5", *base, "--output_dir", str(tmp_path / "sum")]
    words.append("--export_kohya")
    before = [(run / layout).read_bytes() for run in two]
    assert main(words) == 0
    assert [(run / layout).read_bytes() for run in two] == before
    expected = weights_with("sd15", two, (0.7, -0.5))["image"]
    for file in (FILE, "lora_kohya.safetensors"):
        stock = tiny("sd15")
        stock.load_lora_weights(str(tmp_path / "sum"), weight_name=file)
        assert np.abs(draw(stock, PROMPT) - expected).max() < 1e-5
    assert np.abs(draw(load_pipeline(tmp_path / "sum"), PROMPT) - expected).max() < 1e-5
    about = header(tmp_path / "sum" / FILE)["made_from"]
    assert '"how": "cat"' in about
    assert str(tmp_path) not in about
    assert read_info(tmp_path / "sum")["method"] == "merge"


@pytest.mark.parametrize("base", ["sdxl", "sd3", "flux"])
def test_other_base_models(base, images, tmp_path):
    runs = [train(base, tmp_path / name, images, seed, rank=2) for name, seed in (("a", 0), ("b", 1))]
    assert main(["merge", *map(str, runs), "--output_dir", str(tmp_path / "sum")]) == 0
    both = load_pipeline(runs[0])
    load_lora(runs[1], both, "second")
    both.set_adapters(["a", "second"])
    assert np.abs(draw(load_pipeline(tmp_path / "sum"), PROMPT) - draw(both, PROMPT)).max() < 1e-5


@pytest.mark.parametrize("how", HOW)
def test_every_way_gives_one_lora_of_the_rank_that_is_asked_for(how):
    name = "up_blocks.0.attentions.{}.transformer_blocks.0.attn1.to_q"
    keys = [("unet", name.format(i)) for i in range(2)]
    loras = [{key: update(2, seed + 7 * i) for i, key in enumerate(keys)} for seed in (0, 1)]
    found = merged(loras, lambda layer: [1.0, 1.0], how, rank=2)
    assert found.keys() == set(keys)
    assert all(len(own.down) <= 2 for own in found.values())
    again = merged(loras, lambda layer: [1.0, 1.0], how, rank=2)
    assert all(torch.equal(found[key].up, again[key].up) for key in keys)
    if how == "b_lora":
        for i, key in enumerate(keys):
            assert torch.allclose(found[key].delta, loras[i][key].delta, atol=1e-5)


def test_the_singular_values_give_the_best_of_a_rank():
    delta = random(6, 5)
    down, up = svd(delta, 2)
    values = torch.linalg.svdvals(delta)
    assert (delta - up @ down).norm().item() == pytest.approx(values[2:].norm().item(), rel=1e-4)


def test_the_orthogonal_way_leaves_rows_and_columns_of_the_first_free():
    first, second = update(2, 0), update(2, 1)
    total = orthogonal([first, second], [1.0, 2.0])
    rest = total - first.delta
    assert (first.down @ rest.T).abs().max() < 1e-4
    assert (first.up.T @ rest).abs().max() < 1e-4
    assert rest.norm() > 0.1


def test_each_layer_takes_the_one_with_the_larger_largest_values():
    small, large = update(2, 0), update(2, 1)
    large = Update(large.down, 10 * large.up, large.shape)
    assert torch.equal(strongest([small, large], [1.0, 1.0]), large.delta)
    assert torch.equal(strongest([small, large], [1.0, 0.001]), small.delta)


def test_ties_and_dare_by_hand():
    a, b = update(2, 0), update(2, 1)
    key = ("unet", "x")
    whole = merged([{key: a}, {key: b}], lambda layer: [1.0, 1.0], "dare", density=1.0)[key].delta
    assert torch.allclose(whole, a.delta + b.delta, atol=1e-4)
    kept = []
    for own in (a.delta, b.delta):
        cut = own.abs().flatten().sort(descending=True).values[own.numel() // 2 - 1]
        kept.append(torch.where(own.abs() >= cut, own, 0.0))
    sign = (kept[0] + kept[1]).sign()
    agreeing = [torch.where(own.sign() == sign, own, 0.0) for own in kept]
    count = sum((own != 0).float() for own in agreeing).clamp(min=1)
    found = merged([{key: a}, {key: b}], lambda layer: [1.0, 1.0], "ties", 5, 0.5)[key].delta
    assert torch.allclose(found, sum(agreeing) / count, atol=1e-4)


def test_layers_of_one_rank_in_the_file():
    layers = {("unet", "a"): update(2, 0), ("unet", "b"): update(3, 1)}
    state = lora_state(layers, True)
    assert {tuple(v.shape) for k, v in state.items() if "down" in k} == {(3, 5)}
    assert torch.allclose(
        state["unet.a.lora.up.weight"] @ state["unet.a.lora.down.weight"], layers["unet", "a"].delta
    )


def test_weights_of_blocks(two, tmp_path):
    words = [
        "merge",
        *map(str, two),
        "--weights",
        "2",
        "1",
        "--block_weights",
        "up_blocks=0,1",
        "up_blocks.1=0.5,0",
    ]
    assert main([*words, "--output_dir", str(tmp_path / "sum")]) == 0
    pipe = load_pipeline(tmp_path / "base-sd15")
    found, (first, second) = read_lora(tmp_path / "sum", pipe), (read_lora(run, pipe) for run in two)
    for key, own in found.items():
        weights = (2, 1)
        if key[1].startswith("up_blocks.1"):
            weights = (1, 0)
        elif key[1].startswith("up_blocks"):
            weights = (0, 1)
        expected = weights[0] * first[key].delta + weights[1] * second[key].delta
        assert torch.allclose(own.delta, expected, atol=1e-5)
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())


MISTAKES = {
    "no folder": (["A", "B"], "name the folder"),
    "one": (["A", "--output_dir", "OUT"], "Write A B before the flags"),
    "missing": (["A", "nowhere", "--output_dir", "OUT"], "there is no 'nowhere'"),
    "no LoRA": (["A", "base-sd15", "--output_dir", "OUT"], "holds no LoRA"),
    "weights": (["A", "B", "--weights", "1", "--output_dir", "OUT"], "must give 2 numbers"),
    "not a number": (["A", "B", "--weights", "1", "nan", "--output_dir", "OUT"], "weights"),
    "blocks": (["A", "B", "--block_weights", "up=1,x", "--output_dir", "OUT"], "is not NAME=NUMBER"),
    "itself": (["A", "B", "--output_dir", "A"], "is one of the runs"),
    "not SDXL": (["A", "B", "--how", "b_lora", "--output_dir", "OUT"], "is for LoRAs of SDXL"),
    "ranks": (["A", "B", "--how", "linear", "--output_dir", "OUT"], "needs LoRAs of one rank"),
    "another model": (["A", "other/FILE", "--output_dir", "OUT"], "does not fit this base model"),
    "another model, kohya": (
        ["A", "kohya", "--output_dir", "OUT"],
        "is no LoRA of this base model|no layer of",
    ),
    "a way": (["A", "B", "--how", "average", "--output_dir", "OUT"], "how"),
    "no base": (["A/FILE", "B/FILE", "--output_dir", "OUT"], "--base_model: name the base model"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_and_nothing_is_written(name, two, images, tmp_path, capsys, monkeypatch):
    words, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(two[0], "A")
    shutil.copytree(two[1], "B")
    if "other/FILE" in words or "kohya" in words:
        train("sdxl", tmp_path / "other", images, 0, rank=2, export_kohya=True)
        shutil.copyfile("other/lora_kohya.safetensors", "kohya")
    words = [word.replace("FILE", FILE) for word in words]
    code = main(["merge", *words])
    error = capsys.readouterr().err
    assert code == 2
    assert re.search(said, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "OUT").exists()


def test_words_of_both_runs_go_with_the_merged_one(images, tmp_path):
    tiny("sd15").save_pretrained(tmp_path / "base")
    runs = []
    for word in ("<one>", "<two>"):
        runs.append(
            customize.train(
                "pivotal_tuning",
                pretrained_model_name_or_path=tmp_path / "base",
                instance_data_dir=images,
                placeholder_token=word,
                initializer_token="dog",
                output_dir=tmp_path / word.strip("<>"),
                resolution=16,
                max_train_steps=2,
                rank=2,
            )
        )
    assert main(["merge", *map(str, runs), "--output_dir", str(tmp_path / "sum")]) == 0
    pipe = load_pipeline(tmp_path / "sum")
    assert {"<one>", "<two>"} <= pipe.tokenizer.get_vocab().keys()
    words = ["merge", str(runs[0]), str(runs[0]), "--output_dir", str(tmp_path / "twice")]
    assert main(words) == 2


def test_a_dora_is_refused(images, tmp_path):
    run = train("sd15", tmp_path / "dora", images, 0, rank=2, use_dora=True)
    with pytest.raises(UserError, match="is a DoRA"):
        read_lora(run, tiny("sd15"))


def test_drawing_with_several_loras_at_their_weights(two, tmp_path, capsys):
    options = [
        "--height",
        "32",
        "--width",
        "32",
        "--num_inference_steps",
        "2",
        "--output",
        str(tmp_path / "out"),
    ]
    words = ["generate", str(two[0]), PROMPT, "--lora", f"{two[1]}:0.5", *options]
    assert main(words) == 0
    sources = ["merge", *map(str, two), "--weights", "1", "0.5", "--output_dir", str(tmp_path / "sum")]
    assert main(sources) == 0
    assert main(["generate", str(tmp_path / "sum"), PROMPT, *options]) == 0
    from PIL import Image

    first, second = (np.asarray(Image.open(path), int) for path in sorted((tmp_path / "out").glob("*.png")))
    assert abs(first - second).max() <= 1
    for text, said in (
        (f"{two[1]}:x", "no number"),
        ("nowhere:1", "there is no 'nowhere'"),
        (f"{two[1]}:1e9", "between"),
    ):
        assert main(["generate", str(two[0]), PROMPT, "--lora", text, *options]) == 2
        assert said in capsys.readouterr().err


def test_a_lora_file_beside_the_base_model(two, tmp_path):
    pipe, base = tiny("sd15"), tiny("sd15")
    add_lora(base.unet, LoraFields(rank=2))
    name = load_lora(two[0] / "lora_kohya.safetensors", pipe)
    run = load_pipeline(two[0])
    assert name == "lora_kohya"
    assert np.abs(draw(pipe, PROMPT) - draw(run, PROMPT)).max() < 1e-5
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"no LoRA of this base model|no layer of"):
        load_lora(tmp_path / "x.safetensors", pipe)
