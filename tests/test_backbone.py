"""The six verbs on every tiny base model, against the pipelines and by hand."""

import json
import math
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from customize.adapters.lora import TEXT_ATTENTION, LoraFields, add_lora
from customize.backbones.base import Condition
from customize.backbones.families import wrap
from customize.backbones.load import load_base
from customize.cache import TensorCache
from customize.errors import UserError
from customize.trainers.methods.base import Method, MethodConfig
from customize.trainers.prepare import decode_whole
from customize.trainers.validation import sample
from tiny import BASES, tiny

PROMPTS = ["a photo of sks dog", "the cat on grass"]
FLOW = {"sd3", "flux"}


def backbone_of(base: str):
    return wrap(tiny(base), base)


def noise(*shape: int, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def times_of(base: str):
    return torch.tensor([0.05, 0.5, 0.95]) if base in FLOW else torch.tensor([0.003, 0.5, 0.999])


def short(base: str) -> dict:
    """The tiny tokenizers read 16 tokens; the flow pipelines would pad to their own lengths."""
    return {"max_sequence_length": 16} if base in FLOW else {}


# noising


@pytest.mark.parametrize("base", BASES)
def test_add_noise_by_hand(base):
    backbone, t = backbone_of(base), times_of(base)
    latents, epsilon = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1)
    noisy, target = backbone.add_noise(latents, epsilon, t)
    for i in range(3):
        if base in FLOW:
            a, b, wanted = 1 - t[i], t[i], epsilon[i] - latents[i]
        else:
            alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[
                round(float(t[i]) * 1000)
            ]
            a, b, wanted = alpha.sqrt(), (1 - alpha).sqrt(), epsilon[i]
        assert torch.allclose(noisy[i], a * latents[i] + b * epsilon[i], atol=1e-5)
        assert torch.allclose(target[i], wanted, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_clean_inverts_add_noise(base):
    backbone, t, latents = backbone_of(base), times_of(base), noise(3, 4, 8, 8)
    noisy, target = backbone.add_noise(latents, noise(3, 4, 8, 8, seed=1), t)
    assert torch.allclose(backbone.clean(noisy, t, target), latents, atol=1e-4)


def test_images_drawn_under_autocast_are_decoded_in_full():
    vae, latents = tiny("sdxl").vae, noise(1, 4, 8, 8)
    with torch.no_grad():
        whole = vae.decode(latents).sample
        decode_whole(vae)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(vae.decode(latents).sample, whole)
            assert vae.decode(latents.bfloat16(), return_dict=False)[0].dtype == torch.float32


def velocity_backbone():
    pipe = tiny("sd15")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return wrap(pipe)


def test_velocity_by_hand_and_back():
    """v = sqrt(alpha) noise - sqrt(1 - alpha) latents (Salimans and Ho, 2022)."""
    backbone, t = velocity_backbone(), torch.tensor([0.003, 0.5, 0.999])
    latents, epsilon = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1)
    noisy, target = backbone.add_noise(latents, epsilon, t)
    for i in range(3):
        alpha = backbone.noise.alphas_cumprod[round(float(t[i]) * 1000)]
        assert torch.allclose(
            target[i], alpha.sqrt() * epsilon[i] - (1 - alpha).sqrt() * latents[i], atol=1e-5
        )
    assert torch.allclose(backbone.clean(noisy, t, target), latents, atol=1e-4)


def test_noise_does_not_follow_the_pipelines_sampler():
    """Euler's own `add_noise` does not keep the variance."""
    pipe = tiny("sd15")
    expected = wrap(pipe).add_noise(noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1), torch.tensor([0.7]))
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    found = wrap(pipe).add_noise(noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1), torch.tensor([0.7]))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_ddpm_times_are_uniform(base):
    torch.manual_seed(0)
    t = backbone_of(base).draw_times(20000)
    index = backbone_of(base).index_of(t)
    assert torch.equal(t, index / 1000)
    assert set(index.tolist()) == set(range(1000))
    assert torch.allclose(torch.histc(t, 10, 0, 1) / 20000, torch.full((10,), 0.1), atol=0.01)


def drawn_times(base: str, settings: dict, **scheduler):
    pipe = tiny(base)
    pipe.scheduler.register_to_config(**scheduler)
    backbone = wrap(pipe)
    backbone.resolution = 64
    backbone.configure(**settings)
    torch.manual_seed(0)
    return backbone.draw_times(20000).double()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("base", "sampling"), [("sd3", "auto"), ("sd3", "logit_normal"), ("flux", "logit_normal")]
)
def test_flow_times_are_logit_normal_and_shifted(base, sampling, shift):
    t = drawn_times(base, {"timestep_sampling": sampling}, shift=shift)
    logits = torch.logit(t / (shift - (shift - 1) * t))  # of s t / (1 + (s - 1) t)
    assert abs(logits.mean()) < 0.03
    assert abs(logits.std() - 1) < 0.03


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.0, "base_image_seq_len": 64}
DYNAMIC |= {"max_image_seq_len": 1024}


@pytest.mark.parametrize(
    ("base", "settings", "scheduler", "shift"),
    [
        ("flux", {}, {"shift": 3.0}, 3.0),  # as the official script, which reads the scheduler's times
        ("flux", {}, DYNAMIC, 1.0),  # which know no dynamic shift
        ("sd3", {"timestep_sampling": "uniform"}, {"shift": 2.0}, 2.0),
        ("flux", {"timestep_sampling": "shifted"}, {"shift": 3.0}, 3.0),
        # 64 pixels are 16 x 16 tokens
        ("flux", {"timestep_sampling": "shifted"}, DYNAMIC, math.exp(0.4 + 0.6 * (256 - 64) / 960)),
        ("flux", {"timestep_sampling": "shifted", "timestep_shift": 2.5}, DYNAMIC, 2.5),
        ("sd3", {"timestep_sampling": "uniform", "timestep_shift": 1.5}, {"shift": 2.0}, 1.5),
    ],
)
def test_uniform_flow_times_under_each_shift(base, settings, scheduler, shift):
    t = drawn_times(base, settings, **scheduler)
    unshifted = t / (shift - (shift - 1) * t)
    assert torch.allclose(
        torch.histc(unshifted, 10, 0, 1) / 20000, torch.full((10,), 0.1).double(), atol=0.01
    )


@pytest.mark.parametrize("base", ["sd15", "sd3"])
def test_cubic_times_are_mostly_noisy(base):
    """t = 1 - u^3: three quarters lie above 1 - (3/4)^3."""
    t = drawn_times(base, {"timestep_sampling": "cubic"})
    assert (t > 1 - 0.75**3).double().mean() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("settings", [{"timestep_sampling": "shifted"}, {"timestep_shift": 3.0}])
def test_times_of_ddpm_models_are_not_chosen(settings):
    with pytest.raises(UserError, match="for flow models"):
        wrap(tiny("sd15")).configure(**settings)


@pytest.mark.parametrize("base", BASES)
def test_methods_see_times_from_0_to_1(base):
    backbone, seen = backbone_of(base), []

    class Spy(Method):
        def condition(self, batch, t):
            seen.append(t)
            return super().condition(batch, t)

    method = Spy(backbone, MethodConfig(), [])
    for _ in range(5):
        with torch.no_grad():
            method({"pixels": torch.zeros(2, 3, 16, 16), "prompt": PROMPTS})
    t = torch.cat(seen)
    assert ((t >= 0) & (t <= 1)).all()
    assert t.max() > 0.5  # not thousandths


# images


@pytest.mark.parametrize(("base", "shift"), [("sd15", None), ("sdxl", None), ("sd3", 0.3), ("flux", 0.3)])
def test_encode_image_by_hand(base, shift):
    pipe = tiny(base)
    pipe.vae.register_to_config(shift_factor=shift, scaling_factor=0.7)
    pixels = noise(2, 3, 16, 16).clamp(-1, 1)
    torch.manual_seed(5)
    found = wrap(pipe).encode_image(pixels)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    torch.manual_seed(5)
    drawn = posterior.mean + torch.exp(0.5 * posterior.logvar) * torch.randn_like(posterior.mean)
    assert torch.allclose(found, (drawn - (shift or 0)) * 0.7, atol=1e-6)
    assert not torch.equal(found, (posterior.mean - (shift or 0)) * 0.7)


# prediction


@pytest.mark.parametrize("base", BASES)
def test_denoise_equals_the_pipelines_first_step(base):
    """The pipeline's own forward pass, recorded, and ours, for the same latents and prompt; guidance off."""
    backbone = backbone_of(base)
    pipe = backbone.pipe
    pipe.set_progress_bar_config(disable=True)
    calls, latents = [], noise(1, 4, 16, 12)
    handle = backbone.denoiser.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(out[0]), with_kwargs=True
    )
    given = pipe._pack_latents(latents, 1, 4, 16, 12) if base == "flux" else latents
    # Flux takes its guidance as an input, the others switch theirs off at 1
    pipe(
        PROMPTS[0],
        latents=given,
        height=32,
        width=24,
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="latent",
        **short(base),
    )
    handle.remove()
    recorded = pipe._unpack_latents(calls[0], 32, 24, pipe.vae_scale_factor) if base == "flux" else calls[0]
    t = pipe.scheduler.sigmas[:1] if base in FLOW else pipe.scheduler.timesteps[:1] / 1000
    with torch.no_grad():
        ours = backbone.denoise(latents, t, Condition(backbone.encode_prompt(PROMPTS[:1])))
    assert len(calls) == 4
    assert ours.shape == latents.shape
    assert torch.allclose(ours, recorded, atol=1e-5)
    assert recorded.std() > 1e-3


@pytest.mark.parametrize("base", BASES)
def test_each_sample_of_a_batch_has_its_own_time_and_prompt(base):
    backbone, t, noisy = backbone_of(base), times_of(base)[:2], noise(2, 4, 8, 8)
    with torch.no_grad():
        both = backbone.denoise(noisy, t, Condition(backbone.encode_prompt(PROMPTS)))
        for i in range(2):
            alone = backbone.denoise(
                noisy[i : i + 1], t[i : i + 1], Condition(backbone.encode_prompt(PROMPTS[i : i + 1]))
            )
            assert torch.allclose(both[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_the_denoiser_is_asked_for_the_given_sides(base):
    backbone = backbone_of(base)
    noisy = noise(1, 4, 8, 12)
    with torch.no_grad():
        assert (
            backbone.denoise(noisy, times_of(base)[:1], Condition(backbone.encode_prompt(PROMPTS[:1]))).shape
            == noisy.shape
        )


# prompts


@pytest.mark.parametrize("base", BASES)
def test_cached_prompts_equal_live_ones(base):
    backbone = backbone_of(base)
    with torch.no_grad():
        live = backbone.encode_prompt([*PROMPTS, PROMPTS[0]])
    backbone.cache_prompts(PROMPTS, TensorCache())
    backbone.release_text_encoders()
    cached = backbone.encode_prompt([*PROMPTS, PROMPTS[0]])
    assert cached.keys() == live.keys()
    assert all(torch.allclose(cached[name], live[name], atol=1e-6) for name in live)
    assert not torch.allclose(live["encoder_hidden_states"][0], live["encoder_hidden_states"][1], atol=1e-3)
    assert all(getattr(backbone.pipe, f"text_encoder{s}", None) is None for s in ("", "_2", "_3"))
    with pytest.raises(RuntimeError, match="released"):
        backbone.encode_prompt(["a red toy"])


@pytest.mark.parametrize("base", BASES)
def test_gradients_flow_through_live_prompts(base):
    backbone = backbone_of(base)
    add_lora(backbone.text_encoders[0], LoraFields(rank=2), TEXT_ATTENTION)
    text = backbone.encode_prompt(PROMPTS)
    sum(value.square().sum() for value in text.values()).backward()
    ups = [p for n, p in backbone.text_encoders[0].named_parameters() if "lora_B" in n]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in ups)


@pytest.mark.parametrize("base", BASES)
def test_images_from_cached_prompts_equal_those_from_words(base):
    """As validation draws them after the text encoders were released, guidance and negative prompt
    included."""
    backbone = backbone_of(base)
    method = Method(backbone, MethodConfig(), [])
    backbone.pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = backbone.pipe(
        PROMPTS[0], height=16, width=16, num_inference_steps=2, generator=generator, **short(base)
    ).images[0]
    backbone.cache_prompts([*PROMPTS, ""], TensorCache())
    backbone.release_text_encoders()
    [(prompt, found)] = sample(method, PROMPTS[:1], 1, 16, seed=3, steps=2)
    difference = (torch.tensor(list(expected.tobytes())) - torch.tensor(list(found.tobytes()))).abs().max()
    assert prompt == PROMPTS[0]
    assert difference <= 1


# adapters and modes


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_without_adapters_is_the_base_model_bit_for_bit(base, dora):
    plain, backbone = backbone_of(base), backbone_of(base)
    t, noisy = times_of(base)[:2], noise(2, 4, 8, 8)

    def predict(of):
        with torch.no_grad():
            return of.denoise(noisy, t, Condition(of.encode_prompt(PROMPTS)))

    add_lora(backbone.denoiser, LoraFields(rank=2, use_dora=dora))
    add_lora(backbone.text_encoders[0], LoraFields(rank=2, use_dora=dora), TEXT_ATTENTION)
    for name, p in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(1))
    adapted = predict(backbone)
    with backbone.without_adapters():
        assert torch.equal(predict(backbone), predict(plain))
    assert torch.equal(predict(backbone), adapted)
    assert not torch.allclose(adapted, predict(plain), atol=1e-4)


def test_switching_adapters_off_does_not_change_what_is_trained():
    backbone = backbone_of("sd15")
    add_lora(backbone.denoiser, LoraFields(rank=2))
    add_lora(backbone.text_encoders[0], LoraFields(rank=2), TEXT_ATTENTION)
    lora = [p for name, p in backbone.named_parameters() if "lora_" in name]
    for i, parameter in enumerate(lora):
        parameter.requires_grad_(i % 3 == 0)
    before = [p.requires_grad for p in backbone.parameters()]
    with backbone.without_adapters():
        assert [p.requires_grad for p in backbone.parameters()] == before
    assert [p.requires_grad for p in backbone.parameters()] == before


def test_adapters_return_after_an_error():
    backbone = backbone_of("sd15")
    add_lora(backbone.denoiser, LoraFields(rank=2))
    for name, p in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    condition = Condition(backbone.encode_prompt(PROMPTS[:1]))
    before = backbone.denoise(noise(1, 4, 8, 8), torch.tensor([5]), condition)
    with pytest.raises(ZeroDivisionError), backbone.without_adapters():
        raise ZeroDivisionError
    assert torch.equal(backbone.denoise(noise(1, 4, 8, 8), torch.tensor([5]), condition), before)


@pytest.mark.parametrize("base", BASES)
def test_only_lora_dropout_follows_the_training_mode(base):
    backbone = backbone_of(base)
    add_lora(backbone.denoiser, LoraFields(rank=2, lora_dropout=0.5))
    add_lora(backbone.text_encoders[0], LoraFields(rank=2, lora_dropout=0.5), TEXT_ATTENTION)
    method = Method(backbone, MethodConfig(), [])
    dropouts = [
        m for n, m in method.named_modules() if "lora_dropout" in n and isinstance(m, torch.nn.Dropout)
    ]
    others = [
        m for n, m in method.named_modules() if isinstance(m, torch.nn.Dropout) and "lora_dropout" not in n
    ]
    assert dropouts
    for mode in (True, False, True):
        method.train(mode)
        assert all(m.training is mode for m in dropouts)
        assert not any(m.training for m in others)
        assert not any(m.training for m in (backbone.denoiser, backbone.vae, *backbone.text_encoders))


def test_dropout_of_the_frozen_base_stays_off():
    """T5 has dropout of its own (0.1): the same prompt gives the same embeddings in training mode."""
    method = Method(backbone_of("sd3"), MethodConfig(), [])
    method.train()
    first, second = (method.backbone.encode_prompt(PROMPTS)["encoder_hidden_states"] for _ in range(2))
    assert any(m.p > 0 for m in method.modules() if isinstance(m, torch.nn.Dropout))
    assert torch.equal(first, second)


@pytest.mark.parametrize("base", BASES)
def test_everything_is_frozen_at_first(base):
    assert not any(p.requires_grad for p in backbone_of(base).parameters())


# loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "sd15"
    tiny("sd15").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "base")


def edit(folder, **changes):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


def test_load_base_gives_the_saved_model_in_evaluation_mode(folder):
    pipe = load_base(str(folder))
    assert all(
        torch.equal(a, b)
        for a, b in zip(pipe.unet.state_dict().values(), tiny("sd15").unet.state_dict().values(), strict=True)
    )
    assert not any(m.training for m in (pipe.unet, pipe.vae, pipe.text_encoder))
    assert pipe.unet.dtype == torch.float32


def test_load_base_in_half_precision(folder):
    pipe = load_base(str(folder), torch.bfloat16)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


def test_a_safety_checker_is_neither_needed_nor_loaded(folder):
    edit(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        requires_safety_checker=True,
    )
    assert load_base(str(folder)).safety_checker is None


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "vae", "scheduler"])
def test_a_missing_component_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match=f"lacks its component '{part}'"):
        load_base(str(folder))


def test_a_folder_without_index(folder):
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"no model_index\.json"):
        load_base(str(folder))


def test_a_damaged_index(folder):
    (folder / "model_index.json").write_text('{"_class_name": "Stab')
    with pytest.raises(UserError, match=r"model_index\.json"):
        load_base(str(folder))


def test_an_unsupported_class_is_named(folder):
    edit(folder, _class_name="KandinskyPipeline")
    with pytest.raises(UserError, match=r"KandinskyPipeline.*StableDiffusionXLPipeline"):
        load_base(str(folder))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_a_missing_folder(name):
    with pytest.raises(UserError, match="no folder"):
        load_base(name)


def test_weights_that_are_missing_or_pickled(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="could not be loaded"):
        load_base(str(folder))


def test_damaged_weights(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="could not be loaded"):
        load_base(str(folder))


def test_wrap_refuses_other_pipelines():
    class Other:
        pass

    with pytest.raises(UserError, match="no backbone wraps a Other"):
        wrap(Other())


def with_scheduler(base: str, kind, **settings):
    pipe = tiny(base)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    return pipe


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
@pytest.mark.parametrize("objective", ["sample", "flow_prediction", "velocity", "", None, 5])
def test_an_objective_that_is_not_implemented_is_refused(base, objective):
    with pytest.raises(UserError, match=r"prediction_type is '.*epsilon, v_prediction"):
        wrap(with_scheduler(base, DDIMScheduler, prediction_type=objective))


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        ("sd15", FlowMatchEulerDiscreteScheduler),
        ("sdxl", EDMEulerScheduler),
        ("sd3", DDIMScheduler),
        ("flux", DDIMScheduler),
    ],
)
def test_a_scheduler_of_another_family_is_refused(base, kind):
    with pytest.raises(UserError, match=f"its scheduler is a {kind.__name__}"):
        wrap(with_scheduler(base, kind))


def test_flow_that_runs_backwards_is_refused():
    with pytest.raises(UserError, match="from noise to data"):
        wrap(with_scheduler("sd3", FlowMatchEulerDiscreteScheduler, invert_sigmas=True))


def test_a_flow_scheduler_without_dynamic_shifting():
    assert wrap(with_scheduler("sd3", FlowMatchHeunDiscreteScheduler)).draw_times(4).shape == (4,)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "settings", [{"latents_mean": [0.0] * 4}, {"latents_std": [1.0] * 4}, {"scaling_factor": 0.0}], ids=str
)
def test_autoencoders_whose_latents_are_scaled_otherwise_are_refused(base, settings):
    pipe = tiny(base)
    pipe.vae.register_to_config(**settings)
    with pytest.raises(UserError, match=f"the autoencoder.*{next(iter(settings))}"):
        wrap(pipe)


def test_an_inpainting_denoiser_is_refused():
    pipe = tiny("sd15")
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(UserError, match="takes 9 channels, the autoencoder gives 4"):
        wrap(pipe)
