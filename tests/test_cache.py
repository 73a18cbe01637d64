import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from customize.cache import TensorCache, fingerprint, key_of
from customize.errors import UserError

torch.set_num_threads(1)


class Compute:
    def __init__(self, value=1.0):
        self.calls, self.value = 0, value

    def __call__(self):
        self.calls += 1
        return {"mean": torch.full((2, 3), self.value), "std": torch.arange(6).reshape(2, 3).T}


@pytest.fixture
def compute():
    return Compute()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_memory_hit(compute):
    cache = TensorCache()
    first = cache.get("a", compute)
    assert same(cache.get("a", compute), first)
    assert same(first, compute())
    assert compute.calls == 2
    cache.get("b", compute)
    assert compute.calls == 3


def test_disk_hit_after_a_fresh_object(tmp_path, compute):
    first = TensorCache(tmp_path / "deep" / "cache").get("a/../b", compute)
    again = TensorCache(tmp_path / "deep" / "cache").get("a/../b", compute)
    assert compute.calls == 1
    assert same(first, again)
    assert [path.suffix for path in (tmp_path / "deep" / "cache").iterdir()] == [".safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_what_is_kept_is_detached_from_what_was_computed():
    source = torch.zeros(2, requires_grad=True)
    cache = TensorCache()
    cache.get("a", lambda: {"x": source})
    with torch.no_grad():
        source += 1
    kept = cache.get("a", dict)["x"]
    assert torch.equal(kept, torch.zeros(2))
    assert not kept.requires_grad


def test_views_of_one_storage_can_be_kept(tmp_path):
    base = torch.arange(4.0)
    kept = TensorCache(tmp_path).get("a", lambda: {"x": base, "y": base[1:3]})
    assert same(kept, {"x": base, "y": base[1:3]})


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_value(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def without_checksum(path):
    save_file(load_file(path), path)


def emptied(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [half, flip_a_value, without_checksum, emptied])
def test_a_corrupt_file_is_computed_again(tmp_path, compute, spoil):
    TensorCache(tmp_path).get("a", compute)
    [path] = tmp_path.iterdir()
    spoil(path)
    with pytest.warns(UserWarning, match=path.name):
        mended = TensorCache(tmp_path).get("a", compute)
    assert same(mended, Compute()())
    assert same(TensorCache(tmp_path).get("a", compute), mended)
    assert compute.calls == 2


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_nothing(tmp_path, compute, monkeypatch, step):
    def interrupt(*_):
        assert not list(tmp_path.glob("*.safetensors"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            TensorCache(tmp_path).get("a", compute)
    assert list(tmp_path.iterdir()) == []
    TensorCache(tmp_path).get("a", compute)
    assert compute.calls == 2


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        TensorCache(tmp_path / "file")


def test_key_of_is_unambiguous():
    keys = [
        key_of("a", "b"),
        key_of("ab"),
        key_of("a,b"),
        key_of('a", "b'),
        key_of(["a", "b"]),
        key_of("1"),
        key_of(1),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50), nn.Linear(50, 3)).to(dtype)


def test_fingerprint_is_of_the_contents():
    assert fingerprint(network()) == fingerprint(network())
    half_precision = network(torch.bfloat16)
    assert len({fingerprint(network()), fingerprint(half_precision), fingerprint(network()[0])}) == 3


@pytest.mark.parametrize("index", [0, 777])
def test_fingerprint_sees_one_changed_weight(index):
    module = network()
    before = fingerprint(module)
    with torch.no_grad():
        module[0].weight.view(-1)[index] += 1e-6
    assert fingerprint(module) != before


def test_fingerprint_sees_names_and_config():
    one, other = nn.Module(), nn.Module()
    one.a, other.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert fingerprint(one) != fingerprint(other)
    before = fingerprint(one)
    one.config = {"scaling_factor": 0.13}
    scaled = fingerprint(one)
    assert scaled != before
    one.config = {"scaling_factor": 0.13, "_name_or_path": "elsewhere"}
    assert fingerprint(one) == scaled


def test_fingerprint_of_diffusers_and_transformers_models():
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    def vae(factor):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, scaling_factor=factor
        )

    assert fingerprint(vae(0.5)) == fingerprint(vae(0.5)) != fingerprint(vae(0.6))
    config = CLIPTextConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=8,
    )
    assert len(fingerprint(CLIPTextModel(config))) == 64
