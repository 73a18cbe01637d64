"""Optimizers by name: what each is given, what each refuses, and that each resumes bit for bit."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_loop import FILES, build, go, settings

from customize.errors import UserError
from customize.trainers import session
from customize.trainers.launch import complete, train_method
from customize.trainers.methods.base import Method
from customize.trainers.methods.core import CoRe
from customize.trainers.optimizers import KINDS, SETTINGS, at_average, check_optimizer, make_optimizer
from customize.trainers.resume import load_state, save_state
from customize.trainers.settings import TrainConfig, make_accelerator

CLASSES = {
    "adamw": "AdamW",
    "adamw8bit": "AdamW8bit",
    "prodigy": "Prodigy",
    "adafactor": "Adafactor",
    "lion": "Lion",
    "schedule_free_adamw": "AdamWScheduleFree",
}
RATES = {"prodigy": 1.0}


class Wide(Method):
    """One matrix that is large enough for a state of 8 bits, and groups of two rates if `rates` has two."""

    def __init__(self, rates=(1.0,)):
        torch.nn.Module.__init__(self)
        torch.manual_seed(3)
        self.parts = torch.nn.ParameterList(torch.randn(64, 128) for _ in rates)
        self.rates = rates

    def parameter_groups(self, lr):
        return [{"params": [p], "lr": r * lr} for p, r in zip(self.parts, self.rates, strict=True)]

    def take_steps(self, optimizer, count, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for p in self.parts:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()


def config_of(name, **changes) -> TrainConfig:
    return TrainConfig(optimizer=name, learning_rate=RATES.get(name, 1e-2), **changes)


@pytest.mark.parametrize("name", CLASSES)
def test_each_name_makes_its_optimizer(name):
    made = make_optimizer(Wide(), config_of(name), 1)
    assert type(made).__name__ == CLASSES[name]
    assert set(CLASSES) == set(KINDS)
    (group,) = made.param_groups
    assert group["lr"] == RATES.get(name, 1e-2)
    assert group["weight_decay"] == 1e-2


def test_values_that_are_set_reach_the_optimizer():
    values = {"adam_beta1": 0.7, "adam_beta2": 0.8, "adam_weight_decay": 0.25, "adam_epsilon": 1e-5}
    for name, kind in KINDS.items():
        taken = {setting: value for setting, value in values.items() if setting in kind.settings}
        (group,) = make_optimizer(Wide(), config_of(name, **taken), 1).param_groups
        assert group["weight_decay"] == 0.25
        assert (group["beta1"] if name == "adafactor" else group["betas"][0]) == 0.7
        if "adam_beta2" in taken:
            assert group["betas"][1] == 0.8
        if "adam_epsilon" in taken:
            assert group["eps"] == 1e-5


@pytest.mark.parametrize(
    ("name", "setting"),
    [("adafactor", "adam_beta2"), ("adafactor", "adam_epsilon"), ("lion", "adam_epsilon")],
)
def test_values_that_an_optimizer_does_not_take_are_refused(name, setting):
    with pytest.raises(UserError, match=f"--{setting}: the optimizer {name} has no such setting"):
        check_optimizer(config_of(name, **{setting: 0.5}))
    assert sum(s not in kind.settings for kind in KINDS.values() for s in SETTINGS) == 3


def test_adamw_by_hand():
    """Two steps of Loshchilov and Hutter's algorithm 2."""
    method = Wide()
    value, gradients = method.parts[0].detach().clone(), [torch.ones(64, 128), torch.full((64, 128), -0.5)]
    optimizer = make_optimizer(method, config_of("adamw"), 1)
    m = v = torch.zeros(64, 128)
    for t, g in enumerate(gradients, 1):
        method.parts[0].grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        value = value - 1e-2 * 1e-2 * value
        value = value - 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert torch.allclose(method.parts[0], value, atol=1e-6)


def test_states_take_the_memory_that_they_are_chosen_for():
    def size(name):
        method = Wide()
        optimizer = make_optimizer(method, config_of(name), 1)
        getattr(optimizer, "train", lambda: None)()
        method.take_steps(optimizer, 1, 0)
        tensors = [v for v in optimizer.state[method.parts[0]].values() if isinstance(v, torch.Tensor)]
        return sum(v.numel() * v.element_size() for v in tensors) / method.parts[0].numel()  # bytes a weight

    assert size("adamw") == pytest.approx(8, abs=0.01)
    assert size("adamw8bit") < 2.5
    assert size("lion") == pytest.approx(4, abs=0.01)
    assert size("adafactor") < 0.2
    assert size("schedule_free_adamw") == pytest.approx(8, abs=0.01)


@pytest.mark.parametrize("name", CLASSES)
def test_each_saves_and_goes_on_bit_for_bit(name, tmp_path):
    """Three steps, a file, and two more steps in another optimizer, against five steps."""
    accelerator = make_accelerator(TrainConfig(output_dir=str(tmp_path)))

    def start():
        method = Wide()
        optimizer = make_optimizer(method, config_of(name), 1)
        getattr(optimizer, "train", lambda: None)()
        return method, optimizer, dict(method.named_parameters())

    whole, optimizer, _ = start()
    whole.take_steps(optimizer, 3, 1)
    whole.take_steps(optimizer, 2, 2)
    first, optimizer, trained = start()
    first.take_steps(optimizer, 3, 1)
    save_state(tmp_path, accelerator, 3, trained, optimizer=optimizer)
    second, optimizer, trained = start()
    assert load_state(tmp_path, accelerator, trained, optimizer=optimizer) == 3
    second.take_steps(optimizer, 2, 2)
    assert torch.equal(whole.parts[0], second.parts[0])
    assert not torch.equal(first.parts[0], second.parts[0])


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "adamw"])
def test_a_run_resumes_bit_for_bit(name, images, tmp_path):
    options = {"optimizer": name, "checkpointing_steps": 2, "learning_rate": RATES.get(name, 1e-2)}
    options |= {"validation_steps": 2, "held_out": True}
    go(images, tmp_path / "whole", **options)
    start = str(tmp_path / "whole" / "checkpoint-2")
    go(images, tmp_path / "again", resume_from_checkpoint=start, **options)
    whole, again = (load_file(tmp_path / run / FILES["dreambooth"]) for run in ("whole", "again"))
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    assert any(value.any() for key, value in whole.items() if ".up." in key)


@pytest.mark.parametrize(
    ("key", "name"), [("exp_avg_sq_row", "adafactor"), ("z", "schedule_free_adamw"), ("s", "prodigy")]
)
def test_a_state_of_another_shape_is_damaged(key, name, tmp_path):
    accelerator = make_accelerator(TrainConfig(output_dir=str(tmp_path)))
    method = Wide()
    optimizer = make_optimizer(method, config_of(name), 1)
    getattr(optimizer, "train", lambda: None)()
    method.take_steps(optimizer, 1, 1)
    optimizer.state[method.parts[0]][key] = torch.zeros(3)
    trained = dict(method.named_parameters())
    save_state(tmp_path, accelerator, 1, trained, optimizer=optimizer)
    with pytest.raises(UserError, match=f"damaged.*{key}"):
        load_state(tmp_path, accelerator, trained, optimizer=optimizer)


# prodigy


def test_prodigy_starts_at_rate_1_unless_the_user_set_one(capsys):
    given = {"optimizer": "prodigy", "instance_prompt": "a dog", "instance_data_dir": "x"}
    words = {"placeholder_token": "<toy>", "initializer_token": "dog"}
    for base in ("stickers", "other"):
        own = given | {"pretrained_model_name_or_path": base}
        (_, _, train, _), used = complete("dreambooth", own)
        assert (train.learning_rate, used["learning_rate"]) == (1.0, 1.0)  # and `used` is printed
        (_, _, train, method), _ = complete("pivotal_tuning", own | words)
        assert (train.learning_rate, method.token_learning_rate) == (1.0, 0.0)
        (_, _, train, _), used = complete("dreambooth", own | {"learning_rate": 0.5})
        assert train.learning_rate == 0.5
        assert "learning_rate" not in used
    assert complete("dreambooth", given | {"optimizer": "adamw"})[0][2].learning_rate == 1e-3


def test_prodigy_raises_its_rate_from_a_small_start():
    method = Wide()
    optimizer = make_optimizer(method, config_of("prodigy"), 1)
    assert optimizer.param_groups[0]["d"] == 1e-6
    for _ in range(200):
        method.parts[0].grad = method.parts[0].detach().clone()
        optimizer.step()
    assert optimizer.param_groups[0]["d"] > 1e-4
    assert method.parts[0].square().mean() < 0.9


def test_prodigy_refuses_several_rates_and_scaling():
    with pytest.raises(UserError, match=r"has 1 and 0\.5; set all learning rates"):
        make_optimizer(Wide((1.0, 0.5)), config_of("prodigy"), 1)
    with pytest.raises(UserError, match="--scale_lr: prodigy finds"):
        check_optimizer(config_of("prodigy", scale_lr=True))


def test_prodigy_prints_nothing(capsys):
    make_optimizer(Wide(), config_of("prodigy"), 1)
    assert capsys.readouterr().out == ""


# schedule-free


def test_schedule_free_takes_a_constant_schedule_alone_and_no_other_average():
    given = {"optimizer": "schedule_free_adamw", "instance_prompt": "a dog", "instance_data_dir": "x"}
    assert complete("dreambooth", given)[0][2].lr_scheduler == "constant"  # stickers' own is cosine
    with pytest.raises(UserError, match=r"--lr_scheduler cosine.*use constant"):
        check_optimizer(config_of("schedule_free_adamw", lr_scheduler="cosine"))
    with pytest.raises(UserError, match="--use_ema"):
        check_optimizer(config_of("schedule_free_adamw", use_ema=True))


def test_schedule_free_refuses_a_method_that_corrects_its_steps():
    held = object.__new__(CoRe)
    torch.nn.Module.__init__(held)
    held.backbone, held.config = None, None
    held.weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match="CoRe corrects what is trained after each step"):
        make_optimizer(held, config_of("schedule_free_adamw"), 1)


def test_at_the_average_by_hand():
    """With gradients of one sign and no warm-up, the average x of the iterates z: y = 0.9 x + 0.1 z."""
    method = Wide()
    start = method.parts[0].detach().clone()
    optimizer = make_optimizer(method, config_of("schedule_free_adamw", adam_weight_decay=0.0), 1)
    optimizer.train()
    z, x = start, start
    for k in range(1, 4):
        method.parts[0].grad = torch.ones(64, 128)
        optimizer.step()
        z = z - 1e-2  # each step is as long as the rate
        x = x + (z - x) / k
    training = method.parts[0].detach().clone()
    assert torch.allclose(training, 0.9 * x + 0.1 * z, atol=1e-6)
    with at_average(optimizer):
        assert torch.allclose(method.parts[0], x, atol=1e-6)
    assert torch.equal(method.parts[0], training)
    assert optimizer.param_groups[0]["train_mode"]


def test_what_is_saved_and_validated_is_the_average(images, tmp_path, monkeypatch):
    method, _ = build(images)
    config = settings(tmp_path, optimizer="schedule_free_adamw")
    run = session.begin(method, config, make_accelerator(config), [], None, {})
    for seed in range(3):
        for i, p in enumerate(run.trained.values()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + seed))
        run.train_state["optimizer"].step()
    training = {name: p.detach().clone() for name, p in run.trained.items()}
    seen = []
    monkeypatch.setattr(
        session.checkpoint,
        "save",
        lambda *_: seen.append({name: p.detach().clone() for name, p in run.trained.items()}),
    )
    run.write(tmp_path)
    moved = [(seen[0][name] - value).abs().max() for name, value in training.items()]
    assert max(moved) > 1e-3
    assert all(torch.equal(value, training[name]) for name, value in run.trained.items())


# names and packages


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("adamw8bit", "bitsandbytes"),
        ("lion", "bitsandbytes"),
        ("prodigy", "prodigyopt"),
        ("schedule_free_adamw", "schedulefree"),
    ],
)
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, KINDS[name].module, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        check_optimizer(config_of(name))


def test_the_older_flag_means_the_8_bit_optimizer(images, tmp_path):
    assert type(make_optimizer(Wide(), TrainConfig(use_8bit_adam=True), 1)).__name__ == "AdamW8bit"
    with pytest.raises(UserError, match="--use_8bit_adam means --optimizer adamw8bit, not lion"):
        check_optimizer(TrainConfig(use_8bit_adam=True, optimizer="lion"))


def test_a_run_of_before_these_names_resumes(images, tmp_path):
    """Its run.json names neither --optimizer nor a --adam_beta1 of none."""
    place = {"instance_data_dir": images, "instance_prompt": "a red dog", "output_dir": tmp_path / "run"}
    short = {"max_train_steps": 2, "checkpointing_steps": 1, "rank": 2, "train_batch_size": 1}
    train_method("dreambooth", use_8bit_adam=True, **place, **short)
    path = tmp_path / "run" / "checkpoint-1" / "run.json"
    info = json.loads(path.read_text())
    del info["config"]["optimizer"]
    older = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8}
    info["config"] |= older
    path.write_text(json.dumps(info))
    again = train_method(
        "dreambooth",
        resume_from_checkpoint=str(path.parent),
        output_dir=tmp_path / "again",
    )
    config = json.loads((again / "run.json").read_text())["config"]
    assert config["use_8bit_adam"] is True
    assert config["adam_beta1"] == 0.9
    whole, resumed = (load_file(tmp_path / run / FILES["dreambooth"]) for run in ("run", "again"))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_a_resumed_run_keeps_its_optimizer(images, tmp_path):
    place = {"instance_data_dir": images, "instance_prompt": "a red dog", "output_dir": tmp_path / "run"}
    train_method("dreambooth", max_train_steps=1, checkpointing_steps=1, rank=2, train_batch_size=1, **place)
    with pytest.raises(UserError, match=r"optimizer lion: .* was written with adamw"):
        train_method(
            "dreambooth",
            resume_from_checkpoint="latest",
            output_dir=tmp_path / "run",
            optimizer="lion",
            max_train_steps=2,
        )


def test_words_keep_their_own_weight_decay():
    """A group's own weight decay comes before that of the run, for every optimizer."""
    words = SimpleNamespace(parts=[torch.nn.Parameter(torch.ones(4, 4))])
    words.parameter_groups = lambda lr: [{"params": words.parts, "lr": lr, "weight_decay": 0.0}]
    words.after_step = Method.after_step
    for name in KINDS:
        method = Wide()
        method.parameter_groups = words.parameter_groups
        assert make_optimizer(method, config_of(name), 1).param_groups[0]["weight_decay"] == 0.0


def test_the_page_says_the_rate_that_the_optimizer_will_have():
    from customize.app.web.teaching import Case, in_one_sentence

    case = Case("", "dreambooth", "")
    assert "learning rate of 0.001" in in_one_sentence(case, "stickers")
    assert "learning rate of 1." in in_one_sentence(case, "stickers", {"optimizer": "prodigy"})
