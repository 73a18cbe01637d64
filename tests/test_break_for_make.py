"""Break-for-Make: the halves by hand, what each stage trains, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import customize
from customize.adapters.lora import LoraFields
from customize.adapters.split_lora import SplitLora
from customize.backbones.base import Condition
from customize.backbones.families import wrap
from customize.errors import UserError
from customize.files import header
from customize.pipelines import load_pipeline
from customize.trainers.methods.break_for_make import BreakForMake
from tiny import BASES, draw, random, tiny

PROMPT = "a photo of sks dog in red style"
FILE = "pytorch_lora_weights.safetensors"


def split_of(base: str = "sd15", seed: int = 0, rank: int = 4, **options) -> SplitLora:
    backbone = wrap(tiny(base), base)
    return SplitLora(backbone, LoraFields(rank=rank, **options), 0.5, seed)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("layers", ["attention", "all"])
def test_untrained_it_is_the_base_model_with_orthonormal_halves(base, layers):
    if base in ("sd3", "flux") and layers == "all":
        layers = "attention+ff"
    lora = split_of(base, lora_layers=layers)
    before = draw(tiny(base), PROMPT)
    assert abs(draw(lora.backbone.pipe, PROMPT) - before).max() < 1e-6
    for update in lora.updates().values():
        assert (update.up @ update.down).abs().max() < 1e-6  # A C = A D = 0
        width = update.down.shape[1] // 2 if len(update.shape) == 2 else None
        parts = [update.up.T, *((update.down[:, :width], update.down[:, width:]) if width else ())]
        for part in parts:  # (rank, features): A, C and the start of D
            used = part[part.norm(dim=1) > 0]
            assert 1 <= len(used) <= 2
            assert torch.allclose(used @ used.T, torch.eye(len(used)), atol=1e-5)
    again, other = split_of(base, lora_layers=layers), split_of(base, 1, lora_layers=layers)
    first, same, new = (next(iter(own.updates().values())) for own in (lora, again, other))
    assert torch.equal(first.down, same.down)
    assert not torch.equal(first.down, new.down)


def test_the_update_is_that_of_the_blocks_by_hand():
    lora = split_of()
    name, layer = next(iter(lora.layers.items()))
    d = layer.lora_A["default"].parametrizations.weight
    b = layer.lora_B["default"].parametrizations.weight
    with torch.no_grad():
        d.original += random(*d.original.shape)
        b.original += random(*b.original.shape, seed=1)
    a, c = b[0].frozen, d[0].frozen
    top = torch.cat([a @ c, a @ d.original], 1)
    bottom = torch.cat([b.original @ c, b.original @ d.original], 1)
    assert torch.allclose(lora.updates()["unet", name].delta, torch.cat([top, bottom]), atol=1e-5)
    x = random(2, 3, layer.in_features)
    expected = layer.base_layer(x) + x @ torch.cat([top, bottom]).T
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.fixture
def flags(images, tmp_path):
    tiny("sd15").save_pretrained(tmp_path / "base")
    (tmp_path / "sets.json").write_text(
        json.dumps(
            [{"instance_data_dir": str(images), "instance_prompt": f"a {c} cat"} for c in ("red", "blue")]
        )
    )
    return {
        "pretrained_model_name_or_path": tmp_path / "base",
        "instance_data_dir": images,
        "instance_prompt": PROMPT,
        "resolution": 16,
        "max_train_steps": 3,
        "learning_rate": 0.02,
        "train_batch_size": 2,
        "rank": 4,
    }


def halves(folder) -> dict[str, torch.Tensor]:
    """The trained halves of a run: of down by inputs, of up by outputs."""
    state = load_file(folder / FILE)
    return {
        key: value[:, value.shape[1] // 2 :] if ".down." in key else value[len(value) // 2 :]
        for key, value in state.items()
    }


def frozen(folder) -> dict[str, torch.Tensor]:
    state = load_file(folder / FILE)
    return {
        key: value[:, : value.shape[1] // 2] if ".down." in key else value[: len(value) // 2]
        for key, value in state.items()
    }


@pytest.mark.parametrize("with_sets", [False, True])
def test_three_stages(with_sets, flags, tmp_path):
    sets = {"auxiliary_list": tmp_path / "sets.json"} if with_sets else {}
    runs = {}
    for stage in ("content", "style"):
        out = {"output_dir": tmp_path / stage}
        still, again = flags | {"learning_rate": 1e-12}, out | {"overwrite_output_dir": True}
        start = halves(customize.train("break_for_make", stage=stage, **still, **out))
        runs[stage] = customize.train("break_for_make", stage=stage, **flags, **sets, **again)
        moved = {
            kind: max(
                float((v - start[k]).abs().max()) for k, v in halves(runs[stage]).items() if f".{kind}." in k
            )
            for kind in ("down", "up")
        }
        own, other = ("down", "up") if stage == "content" else ("up", "down")
        assert moved[own] > 0
        assert (moved[other] > 0) == with_sets
        assert moved[own] > 2 * moved[other]
    options = {"content_run": runs["content"], "style_run": runs["style"], "output_dir": tmp_path / "joint"}
    options["export_kohya"] = True
    joint = customize.train("break_for_make", stage="joint", **(flags | options | {"learning_rate": 1e-12}))
    found = halves(joint)
    for kind, stage in (("down", "content"), ("up", "style")):
        for key, value in halves(runs[stage]).items():
            if f".{kind}." in key:
                assert torch.allclose(found[key], value, atol=1e-6)
    for run in (runs["style"], joint):  # bit for bit, whatever was trained
        for key, value in frozen(runs["content"]).items():
            assert torch.equal(frozen(run)[key], value)
    assert json.loads(header(joint / FILE)["made_from"])["content_run"] == "content"
    for file in (FILE, "lora_kohya.safetensors"):
        stock = tiny("sd15")
        stock.load_lora_weights(str(joint), weight_name=file)
        assert abs(draw(stock, PROMPT) - draw(load_pipeline(joint), PROMPT)).max() < 1e-5


def test_auxiliary_sets_train_the_other_half_alone_with_the_same_noise(flags, tmp_path, images):
    backbone = wrap(tiny("sd15"), "sd15")
    backbone.resolution = 32
    config = BreakForMake.Config(stage="content", rank=4, auxiliary_list=str(tmp_path / "sets.json"))
    method = BreakForMake(backbone, config, [])
    method.use_images([])
    assert [len(some) for some in method.sets] == [4, 4]
    method.train()
    seen, add_noise = [], backbone.add_noise
    backbone.add_noise = lambda latents, noise, t: seen.append((noise, t)) or add_noise(latents, noise, t)
    terms = method({"pixels": random(2, 3, 32, 32).clamp(-1, 1), "prompt": [PROMPT] * 2})
    (noise, t), (noise_of_set, t_of_set) = seen
    assert torch.equal(noise, noise_of_set)
    assert torch.equal(t, t_of_set)
    content, style = (method.lora.parameters_of(own) for own in (True, False))
    own = torch.autograd.grad(terms["denoise"], content + style, retain_graph=True, allow_unused=True)
    other = torch.autograd.grad(terms["auxiliary"], content + style, allow_unused=True)
    count = len(content)
    assert all(g is not None for g in own[:count])
    assert all(g is None for g in own[count:])
    assert all(g is None for g in other[:count])
    assert all(g is not None for g in other[count:])
    rates = [group["lr"] for group in method.parameter_groups(1e-3)]
    assert rates == pytest.approx([1e-3, 1e-4])


@pytest.mark.parametrize("stage", ["content", "style"])
def test_gradient_checkpointing_with_auxiliary_sets_changes_no_gradient(stage, flags, tmp_path):
    """Layers are run again when the halves of the auxiliary sets are the ones that are trained."""
    found = []
    for checkpointing in (False, True):
        backbone = wrap(tiny("sd15"), "sd15")
        backbone.resolution = 32
        config = BreakForMake.Config(stage=stage, rank=4, auxiliary_list=str(tmp_path / "sets.json"))
        method = BreakForMake(backbone, config, [])
        for parameter in method.trainable().values():
            parameter.data += 0.1 * random(*parameter.shape)
        torch.manual_seed(0)
        method.use_images([])
        method.train()
        if checkpointing:
            method.enable_gradient_checkpointing()
        terms = method({"pixels": random(2, 3, 32, 32).clamp(-1, 1), "prompt": [PROMPT] * 2})
        found.append(torch.autograd.grad(sum(terms.values()), list(method.trainable().values())))
    for plain, again in zip(*found, strict=True):
        assert plain.any()
        assert torch.allclose(plain, again, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_preconditioned_gradients_by_hand(layers):
    lora = split_of(lora_layers=layers)
    for content in (True, False):
        for parameter in lora.parameters_of(content):
            parameter.data += 0.1 * random(*parameter.shape)
    trained = [*lora.parameters_of(True), *lora.parameters_of(False)]
    backbone, gradients = lora.backbone, []
    text = Condition(backbone.encode_prompt([PROMPT]))
    for preconditioned in (False, True):
        if preconditioned:
            lora.precondition()
        for parameter in trained:
            parameter.grad = None
        backbone.denoise(random(1, 4, 16, 16), torch.tensor([0.5]), text).square().sum().backward()
        gradients.append([parameter.grad.flatten(1) for parameter in trained])
    count = len(trained) // 2
    for i, layer in enumerate(lora.layers.values()):
        down, up = (getattr(layer, name)["default"].weight.detach() for name in ("lora_A", "lora_B"))
        a, b = down.flatten(1), up.flatten(1)
        eye = 0.01 * torch.eye(4)
        for_d = torch.linalg.inv(b.T @ b + eye) @ gradients[0][i]
        for_b = gradients[0][count + i] @ torch.linalg.inv(a @ a.T + eye)
        assert torch.allclose(gradients[1][i], for_d, rtol=1e-2, atol=1e-3 * for_d.abs().max().item())
        assert torch.allclose(gradients[1][count + i], for_b, rtol=1e-2, atol=1e-3 * for_b.abs().max().item())


MISTAKES = {
    "no runs": ({"stage": "joint"}, "belong together"),
    "runs without a stage": ({"content_run": "RUN", "style_run": "RUN"}, "belong together"),
    "odd rank": ({"rank": 5}, "must be even"),
    "split": ({"split": 1.0}, "split"),
    "of another stage": (
        {"stage": "joint", "content_run": "RUN", "style_run": "RUN"},
        "no run of break_for_make stage style",
    ),
    "another seed": (
        {"stage": "joint", "content_run": "RUN", "style_run": "STYLE", "projection_seed": 3},
        "frozen halves",
    ),
    "another rank": (
        {"stage": "joint", "content_run": "RUN", "style_run": "STYLE", "rank": 6},
        "another rank",
    ),
    "sets": ({"auxiliary_list": "nowhere.json"}, "nowhere.json"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_training(name, flags, tmp_path, monkeypatch):
    changes, said = MISTAKES[name]
    places = {"RUN": tmp_path / "first", "STYLE": tmp_path / "second", "SETS": tmp_path / "sets.json"}
    for place, stage in (("RUN", "content"), ("STYLE", "style")):
        if place in changes.values():
            customize.train("break_for_make", stage=stage, **flags, output_dir=places[place])
    changes = {
        key: places.get(value, value) if isinstance(value, str) else value for key, value in changes.items()
    }
    monkeypatch.setattr(BreakForMake, "forward", lambda *_: pytest.fail("it trained"))
    with pytest.raises(UserError, match=said):
        customize.train("break_for_make", **(flags | {"output_dir": tmp_path / "run"} | changes))
