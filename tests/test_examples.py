"""The files of examples/ fit the package: settings are known to their methods, scripts import what there
is."""

import runpy
from pathlib import Path

import pytest

from customize.config import parse
from customize.trainers.launch import configs
from customize.trainers.registry import METHODS, find_method

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.rglob("*.py"))


def method_of(file: Path) -> str:
    return next(name for name in METHODS if file.stem.startswith(name))


def settings(method: str, words: list[str]) -> dict:
    found: dict = {}
    for config in parse(configs(find_method(method)), words):
        found |= vars(config)
    return found


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda file: file.name)
def test_settings_are_known_to_their_method(file):
    assert settings(method_of(file), [str(file)])["pretrained_model_name_or_path"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_import_what_there_is(script, monkeypatch):
    monkeypatch.syspath_prepend(script.parent)
    assert runpy.run_path(str(script))["__doc__"]


def test_variants_of_encoders_differ_in_what_they_name():
    encoders = runpy.run_path(str(EXAMPLES / "benchmarks/encoders.py"))
    found = {
        name: settings(method, flags.format(folder="runs", cscl=0.005, macl=0.004).split())
        for name, (method, flags) in encoders["VARIANTS"].items()
        if method == "custom_contrast" and name not in encoders["STARTS"]
    }
    contrasts = {
        name: (own["cscl_weight"], own["macl_weight"], own["location"]) for name, own in found.items()
    }
    assert contrasts.pop("words") == (0, 0, False)
    assert contrasts.pop("cscl") == (0.005, 0, False)
    assert contrasts.pop("macl") == (0, 0.004, False)
    assert contrasts.pop("no_location") == (0.005, 0.004, False)
    assert set(contrasts.values()) == {(0.005, 0.004, True)}
    assert {found[name]["macl_form"] for name in contrasts} == {"soft", "ratio", "weight", "product", "plain"}
    assert {own["pretrained_adapter"] for own in found.values()} == {"runs/start"}
