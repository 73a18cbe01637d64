"""Dry runs: a table for every method and base model, refusals as of a real run, and nothing is written."""

import json
import re

import pytest
import torch
from test_family_methods import ENCODERS, METHODS, REFUSED, SKS, WORD, WORKS, places
from torch.profiler import ProfilerActivity, profile

import customize
from conftest import write_noise
from customize.backbones.load import load_base
from customize.errors import UserError
from customize.trainers import launch
from customize.trainers.dry_run import Search, changes, remedies, shown
from customize.trainers.launch import complete, run, train_command
from customize.trainers.memory import CONTEXT, OPTIMIZERS, RunPlan, estimate, priced
from customize.trainers.registry import METHODS as REGISTRY
from customize.trainers.registry import find_method
from customize.trainers.settings import make_accelerator, size_of
from customize.trainers.simulation import simulated
from tiny import BASES, tiny, unet
from tiny_families import EDIT, FAMILIES, tiny_family

assert places  # a fixture

UNETS = {"sd15", "sdxl"}
MAPS = UNETS | {"sd3", "flux", "kontext"}


def listing(folder) -> set:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def without_weights(folder) -> None:
    for path in [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]:
        path.unlink()


@pytest.fixture(scope="module")
def bases(places):
    """Folders of configurations alone, by the names of the tiny models."""

    def folder(name: str):
        if not (places / f"empty-{name}").exists():
            (tiny(name) if name in BASES else tiny_family(name)).save_pretrained(places / f"empty-{name}")
            without_weights(places / f"empty-{name}")
        return places / f"empty-{name}"

    return folder


def settings_of(method: str, places) -> dict:
    name = "train_data_dir" if method in ENCODERS else "instance_data_dir"
    folder = {"single_insert": "cut"} | dict.fromkeys(ENCODERS, "subjects")
    small = {"image_encoder": "stickers", "heads": 3, "dim": 192, "depth": 1} if method in REGISTRY else {}
    own = small if method in ("custom_contrast", "ip_adapter") else {}
    data = {name: places / folder.get(method, "images"), "resolution": 32, "train_batch_size": 2}
    return data | METHODS[method] | own


# every method on a model of each kind, and one of each kind of method on every model
PAIRS = {(base, method) for base in ("sd15", "flux", "klein", "kontext") for method in METHODS}
PAIRS |= {(base, method) for base in (*BASES, *FAMILIES) for method in ("dreambooth", "textual_inversion")}


@pytest.mark.parametrize(("base", "method"), sorted(PAIRS))
def test_a_table_for_every_method_and_base(base, method, places, bases, tmp_path, capsys):
    """From configurations alone; a method that the model cannot be trained with is refused as ever."""
    settings = settings_of(method, places) | {"pretrained_model_name_or_path": bases(base)}
    if method not in ENCODERS:
        settings["validation_prompt"] = [METHODS[method]["instance_prompt"]]
    before = listing(places)
    works = (method, "*") not in REFUSED or (method, base) in WORKS
    works |= (base in MAPS and method in ("mcpl", "core")) or (
        base in UNETS and method not in ("in_context",)
    )
    if not works or (base == EDIT and method != "in_context"):
        with pytest.raises(UserError, match=REFUSED.get(("*", base)) or REFUSED[method, "*"]):
            customize.train(method, output_dir=tmp_path / "run", dry_run=True, **settings)
    else:
        customize.train(method, output_dir=tmp_path / "run", dry_run=True, **settings)
        said = capsys.readouterr().out
        for wanted in ("estimated peak", "memory: training", "  trained", "activations", "<- the peak"):
            assert wanted in said
        assert ("memory: validation images" in said) == (method not in ENCODERS)
    assert not (tmp_path / "run").exists()
    assert listing(places) == before


@pytest.mark.parametrize("method", ["domain_tuning", "ziplora"])
def test_methods_that_go_on_from_runs(method, places, tmp_path, capsys):
    if method == "ziplora":
        dogs = {"instance_data_dir": places / "images", "max_train_steps": 1, "resolution": 32, "rank": 2}
        for name in ("a", "b"):
            customize.train("dreambooth", output_dir=tmp_path / name, **dogs, **SKS)
        concepts = [
            {"instance_data_dir": str(places / "images"), "instance_prompt": "a photo of sks dog"}
        ] * 2
        (tmp_path / "two.json").write_text(json.dumps(concepts))
        settings = {"loras": [tmp_path / "a", tmp_path / "b"], "concepts_list": tmp_path / "two.json"}
        settings["resolution"] = 32
    else:
        data = {"train_data_dir": places / "subjects", "resolution": 32, "max_train_steps": 1}
        options = {"dim": 64, "depth": 1, "heads": 1, "rank": 2, "train_batch_size": 2}
        made = customize.train("domain_encoder", output_dir=tmp_path / "encoder", **data, **options)
        settings = {"domain_encoder": made, "instance_data_dir": places / "images", "resolution": 32}
    capsys.readouterr()
    customize.train(method, output_dir=tmp_path / "run", dry_run=True, **settings)
    assert "estimated peak" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# what is checked


def dreambooth(places, output, **more):
    settings = {"instance_data_dir": places / "images", "resolution": 32, "dry_run": True} | SKS
    return customize.train("dreambooth", output_dir=output, **(settings | more))


@pytest.mark.parametrize("text", ["12", "12 gigabytes", "GB", "-3GB", "0GB", "1e3GB", "twelve"])
def test_a_bad_limit_is_one_sentence(text, places, tmp_path):
    with pytest.raises(UserError, match="is no size; write it as 12GB, 12GiB or 900MB"):
        dreambooth(places, tmp_path / "run", memory_limit=text)


def test_sizes():
    assert size_of("12GB") == 12 * 10**9
    assert size_of(" 12 gib ") == 12 * 2**30
    assert size_of("1.5MB") == 1_500_000


def test_a_limit_is_for_dry_runs(places, tmp_path):
    with pytest.raises(UserError, match="memory_limit is for dry_run"):
        dreambooth(places, tmp_path / "run", memory_limit="12GB", dry_run=False)


def test_refuses_what_the_real_run_refuses(places, tmp_path):
    output = tmp_path / "run"
    (tmp_path / "file").write_text("mine")
    cases = {
        "There is no folder": {"instance_data_dir": tmp_path / "missing"},
        "needs class_prompt": {"with_prior_preservation": True},
        "holdout": {"holdout": 9},
        "multiple|resolution": {"resolution": 33},
        "rank": {"rank": 10_000},
        "Not a directory": {"output_dir": tmp_path / "file" / "run"},
        "cannot write into": {"cache_dir": tmp_path / "file"},
    }
    for message, more in cases.items():
        with pytest.raises(UserError, match=message):
            dreambooth(places, more.pop("output_dir", output), **more)
    assert listing(tmp_path) == {(tmp_path / "file").relative_to(tmp_path)}


def test_an_earlier_run_is_refused_resumed_and_left_alone(places, tmp_path, capsys):
    run_folder = dreambooth(places, tmp_path / "run", dry_run=False, max_train_steps=1, checkpointing_steps=1)
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    with pytest.raises(UserError, match="holds an earlier run"):
        dreambooth(places, run_folder)
    again = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    dreambooth(places, run_folder, memory_limit="8GB", **again)
    assert "it fits" in capsys.readouterr().out
    with pytest.raises(UserError, match="rank"):
        dreambooth(places, run_folder, rank=3, **again)
    dreambooth(places, run_folder, overwrite_output_dir=True)
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before
    kept = json.loads((run_folder / "run.json").read_text())["config"]
    assert kept["dry_run"] is False


def test_a_folder_that_is_being_written_is_refused(places, tmp_path):
    from customize.runs.output import locked, make_folder

    made = make_folder(tmp_path / "run", "--output_dir")
    with locked(made, "--output_dir"), pytest.raises(UserError, match="is being written by"):
        dreambooth(places, made)
    dreambooth(places, tmp_path / "run")
    assert listing(tmp_path / "run") == set()


def test_no_class_images_are_drawn_and_their_drawing_is_counted(places, tmp_path, capsys):
    prior = {"with_prior_preservation": True, "class_prompt": "a photo of dog", "num_class_images": 5}
    dreambooth(places, tmp_path / "run", **prior)
    said = capsys.readouterr().out
    assert "4 images and 5 of the class" in said
    assert "memory: class images" in said
    write_noise(tmp_path / "dogs")
    dreambooth(places, tmp_path / "run", **prior, class_data_dir=tmp_path / "dogs")
    assert len(list((tmp_path / "dogs").iterdir())) == 4
    dreambooth(
        places, tmp_path / "run", **(prior | {"num_class_images": 4}), class_data_dir=tmp_path / "dogs"
    )
    assert "memory: class images" not in capsys.readouterr().out.rpartition("dry run of")[2]


def test_the_command_line_does_not_say_that_a_run_is_there(places, tmp_path, capsys):
    words = ["dreambooth", "--instance_data_dir", str(places / "images"), "--resolution", "32"]
    words += ["--instance_prompt", "a photo of sks fox", "--output_dir", str(tmp_path / "run"), "--dry_run"]
    train_command([*words, "--cache_dir", str(tmp_path / "cache"), "--memory_limit", "8GB"])
    said = capsys.readouterr().out
    assert "the run is in" not in said
    assert "--memory_limit 8GB: it fits." in said
    assert f"of disk, in {tmp_path / 'cache'}" in said
    assert listing(tmp_path) == set()


# what is estimated


def planned(places, method="dreambooth", **more) -> tuple[RunPlan, object]:
    settings = {"instance_data_dir": str(places / "images"), "resolution": 32} | (
        SKS if method == "dreambooth" else WORD
    )
    parts, _ = complete(method, settings | more)
    kind = find_method(method)
    source = kind.Source.read(parts[1], "stickers", 0)
    return RunPlan(kind, *parts, source), make_accelerator(parts[2])


def training_of(plan, accelerator, kind="cpu"):
    found = priced(estimate(plan, accelerator, kind), plan)
    return next(phase for phase in found.phases if phase.name == "training")


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}])
def test_the_estimate_is_what_a_real_run_allocates(more, places, tmp_path, monkeypatch):
    """Against torch's record of its allocations; in the beginning of the run, only weights are there."""
    stock, peak = launch.train, 0

    def train(*args):
        nonlocal peak
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            steps = stock(*args)
        live = 0
        for event in profiler.profiler.kineto_results.events():
            live += event.nbytes() if event.name() == "[memory]" else 0
            peak = max(peak, live)
        return steps

    settings = {"train_batch_size": 4, "resolution": 64, "max_train_steps": 3} | more
    monkeypatch.setattr(launch, "train", train)
    dreambooth(places, tmp_path / "run", dry_run=False, **settings)
    found = training_of(*planned(places, **settings))
    assert sum(found.others.values()) == pytest.approx(peak, rel=0.05)


def test_checkpointing_and_small_batches_take_less(places):
    def activations(**more):
        return training_of(*planned(places, **more), "cuda").others["activations"]

    plain = activations(train_batch_size=4)
    assert activations(train_batch_size=4, gradient_checkpointing=True) < 0.7 * plain
    assert activations(train_batch_size=1) < 0.5 * plain
    assert activations(train_batch_size=4, resolution=64) > 1.5 * plain


def test_the_optimizers_state_and_what_is_trained(places):
    plan, accelerator = planned(places, rank=4)
    found = priced(estimate(plan, accelerator), plan)
    training = next(phase for phase in found.phases if phase.name == "training")
    assert training.others["optimizer"] == 8 * found.trained
    assert training.others["gradients"] == 4 * found.trained
    plan = plan.changed(use_8bit_adam=True)
    [smaller] = [phase for phase in priced(found, plan).phases if phase.name == "training"]
    assert smaller.others["optimizer"] == pytest.approx(OPTIMIZERS["adamw8bit"] * found.trained, rel=1e-3)


def test_quantized_linear_layers_are_counted_in_their_size(places):
    plan, accelerator = planned(places)
    found = estimate(plan, accelerator)
    held, number = found.linear["unet"]
    assert held == 4 * number > 0
    smaller = priced(found, plan.changed(quantize="nf4"))
    for before, after in zip(found.phases, smaller.phases, strict=True):
        if before.name == "encoding":  # before the denoiser comes to the device
            assert "unet" not in before.weights
        else:
            assert before.weights["unet"] - after.weights["unet"] == held - int(0.5625 * number)


def test_remedies_are_few_and_suffice(places):
    plan, accelerator = planned(places, train_batch_size=8, resolution=128)
    first = priced(estimate(plan, accelerator), plan)
    search = Search(plan, accelerator, first)
    checkpointed = search({"gradient_checkpointing": True})
    assert remedies(plan, first.peak, search)[0] == []
    chosen, best = remedies(plan, checkpointed.peak, search)
    assert chosen == [{"gradient_checkpointing": True}]
    assert best.peak == checkpointed.peak
    chosen, best = remedies(plan, CONTEXT + 10**6, search)  # less than the weights take
    assert best.peak > CONTEXT + 10**6
    assert "--resolution" in shown(chosen)
    assert not re.search(r"--resolution \d+ .*--resolution", shown(chosen))
    names = {name for settings in changes(plan) for name in settings}
    assert {"gradient_checkpointing", "mixed_precision", "train_batch_size", "resolution"} <= names


def test_what_cannot_be_had_is_not_proposed(places, tmp_path, capsys):
    """A batch of one leaves the contrasts nothing to compare with."""
    options = {"resolution": 32, "dry_run": True, "memory_limit": "1MB", "train_batch_size": 2}
    options |= {"dim": 64, "depth": 1, "heads": 1}
    customize.train("custom_contrast", output_dir=tmp_path / "run", **options)
    said = capsys.readouterr().out
    assert "it does not fit, and no settings bring it below" in said
    assert "--train_batch_size" not in said


# the simulation


def test_empty_models_are_those_of_the_weights(tmp_path):
    tiny("sdxl").save_pretrained(tmp_path)
    whole = load_base(tmp_path, torch.bfloat16)
    without_weights(tmp_path)
    empty = load_base(tmp_path, torch.bfloat16, empty=True)
    for name, part in empty.components.items():
        if isinstance(part, torch.nn.Module):
            here = {key: (p.shape, p.dtype) for key, p in part.named_parameters()}
            there = {key: (p.shape, p.dtype) for key, p in getattr(whole, name).named_parameters()}
            assert here == there
            assert all(p.device.type == "meta" for p in part.parameters())
    with pytest.raises(UserError):
        load_base(tmp_path)


def test_values_that_steer_are_kept():
    with simulated():
        mask = torch.tensor([True, False, True])
        assert mask.tolist() == [True, False, True]
        assert torch.zeros(3, 2)[mask].shape == (2, 2)
        assert (torch.arange(3) + 1).sum().item() == 6
        assert bool((torch.tensor([3, 4]) > 3).any())
        changed = torch.zeros(2)
        changed += 2
        assert changed.tolist() == [2, 2]
        assert torch.rand(()).item() < 1


def test_views_and_what_was_there_are_not_counted():
    with simulated("cpu") as simulation:
        layer = torch.nn.Linear(64, 64)
        x = torch.zeros(16, 64)
        with simulation.measured() as tally:
            y = layer(x)
            assert tally.live == y.numel() * 4
            z = y.view(-1)[:8]
            assert tally.live == y.numel() * 4
            del y, z
            assert tally.live == 0


def test_attention_keeps_no_pairs_and_half_precision_is_less():
    def peak(precision: bool, kind) -> int:
        with simulated(kind) as simulation:
            with torch.device("meta"):
                model = unet()
            simulation.place(model)
            inputs = torch.zeros(1, 4, 64, 64), torch.tensor([1]), torch.zeros(1, 7, 16)
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision)
            with simulation.measured() as tally, autocast:
                model(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample.float().sum().backward()
            return tally.peak

    pairs = 4 * (64 * 64) ** 2  # bytes of one head's weights
    assert peak(False, "cuda") < pairs
    assert peak(True, "cuda") < peak(False, "cuda")
    assert peak(False, "cpu") < pairs


def test_a_dry_run_returns_no_folder(places, tmp_path):
    words = ["dreambooth", "--instance_data_dir", str(places / "images"), "--resolution", "32", "--dry_run"]
    words += ["--instance_prompt", "a photo of sks fox", "--output_dir", str(tmp_path / "run")]
    assert run(words) is None
    assert not (tmp_path / "run").exists()
