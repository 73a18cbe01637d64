"""The denoising loss and its weights, by loops."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from customize.backbones.families import wrap
from customize.errors import UserError
from customize.losses import contrastive_flow, denoising, subject_fidelity
from customize.trainers.methods.base import Method
from tiny import BASES, random, tiny


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 6, generator=generator), torch.randn(2, 3, 4, 6, generator=generator)


def looped(prediction, target, weight):
    """The weighted mean of each sample's squared error; `weight` is indexed as (sample, row, column)."""
    errors = []
    for b in range(len(prediction)):
        total, weights = 0.0, 0.0
        for c in range(prediction.shape[1]):
            for y in range(prediction.shape[2]):
                for x in range(prediction.shape[3]):
                    total += (
                        weight(b, y, x) * (prediction[b, c, y, x].item() - target[b, c, y, x].item()) ** 2
                    )
                    weights += weight(b, y, x)
        errors.append(total / weights)
    return torch.tensor(errors)


def test_without_a_mask_it_is_the_mean_of_each_sample(pair):
    assert torch.allclose(denoising(*pair), looped(*pair, lambda b, y, x: 1.0), atol=1e-6)


def test_a_mask_weights_places(pair):
    mask = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        denoising(*pair, mask), looped(*pair, lambda b, y, x: mask[b, 0, y, x].item()), atol=1e-6
    )


def test_a_mask_of_another_size_is_averaged_over_blocks(pair):
    mask = torch.rand(2, 1, 8, 18, generator=torch.Generator().manual_seed(1))

    def weight(b, y, x):
        return sum(mask[b, 0, 2 * y + i, 3 * x + j].item() for i in range(2) for j in range(3)) / 6

    assert torch.allclose(denoising(*pair, mask), looped(*pair, weight), atol=1e-6)


def test_what_lies_outside_the_mask_does_not_count(pair):
    prediction, target = pair
    mask = torch.zeros(2, 1, 4, 6)
    mask[:, :, 1:3, 2:4] = 1
    disturbed = torch.where(mask.bool(), prediction, prediction + 100)
    assert torch.equal(denoising(prediction, target, mask), denoising(disturbed, target, mask))


def test_a_small_subject_counts_as_much_as_a_large_one():
    """The same error everywhere gives the same loss, whatever the mask's area."""
    target = torch.zeros(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 0, 0] = 1
    mask[1] = 1
    assert torch.allclose(denoising(target + 2, target, mask), torch.tensor([4.0, 4.0]))


def test_an_empty_mask_gives_zero_and_finite_gradients(pair):
    prediction = pair[0].requires_grad_()
    loss = denoising(prediction, pair[1], torch.zeros(2, 1, 4, 6))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert torch.isfinite(prediction.grad).all()


def test_half_precision_is_compared_in_float32():
    prediction, target = torch.full((1, 1, 2, 2), 300.0).half(), torch.zeros(1, 1, 2, 2).half()
    assert denoising(prediction, target).item() == 90000.0  # beyond the largest half


def alphas_by_hand() -> list[float]:
    """The cumulative alphas of the scaled-linear schedule from 0.00085 to 0.012."""
    product, found = 1.0, []
    for i in range(1000):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999
        product *= 1 - root**2
        found.append(product)
    return found


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_by_hand(prediction_type):
    pipe = tiny("sd15")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    times, alphas = [0, 1, 100, 400, 999], alphas_by_hand()
    expected = []
    for t in times:
        snr = alphas[t] / (1 - alphas[t])
        expected.append(min(snr, 5.0) / (snr if prediction_type == "epsilon" else snr + 1))
    assert expected[0] < 0.1  # clamped: nearly clean latents
    assert torch.allclose(
        wrap(pipe).snr_weights(torch.tensor(times) / 1000, 5.0), torch.tensor(expected), rtol=1e-4
    )


def test_min_snr_is_refused_for_flow_models():
    with pytest.raises(UserError, match="snr_gamma"):
        wrap(tiny("flux")).snr_weights(torch.tensor([0.5]), 5.0)


# contrastive flow matching


def test_contrastive_flow_is_minus_the_error_to_the_other_target(pair):
    mask = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(contrastive_flow(*pair), -looped(*pair, lambda b, y, x: 1.0), atol=1e-6)
    assert torch.allclose(
        contrastive_flow(*pair, mask), -looped(*pair, lambda b, y, x: mask[b, 0, y, x].item()), atol=1e-6
    )


def test_the_minimum_with_contrast_is_as_stated():
    """One place, three samples: the prediction for which the gradient of both terms is zero."""
    target, other = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 1.0, -1.0])
    best = ((target - 0.2 * other) / (1 - 0.2)).requires_grad_(True)
    shaped = [x.view(3, 1, 1, 1) for x in (best, target, other)]
    (denoising(*shaped[:2]) + 0.2 * contrastive_flow(shaped[0], shaped[2])).sum().backward()
    assert torch.allclose(best.grad, torch.zeros(3), atol=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_the_others_target_is_of_their_latents_and_noise_at_this_samples_time(base):
    """Every sample of a batch of three against the next one, recomputed one by one."""
    backbone = wrap(tiny(base), base)
    method = Method(backbone, Method.Config(contrastive_flow_weight=0.3), []).train()
    noised, add_noise, predictions, denoise = [], backbone.add_noise, [], backbone.denoise
    backbone.add_noise = lambda *given: noised.append(given) or add_noise(*given)
    backbone.denoise = lambda *given: predictions.append(denoise(*given)) or predictions[-1]
    batch = {
        "pixels": random(3, 3, 32, 32).clamp(-1, 1),
        "prompt": ["a dog", "a cat", "a toy"],
        "mask": torch.rand(3, 1, 4, 4),
    }
    with torch.no_grad():
        terms = method(batch)
    latents, noise, t = noised[0]
    expected = []
    for i, j in ((0, 2), (1, 0), (2, 1)):
        _, other = add_noise(latents[j : j + 1], noise[j : j + 1], t[i : i + 1])
        expected.append(-0.3 * denoising(predictions[0][i : i + 1], other, batch["mask"][i : i + 1]))
    assert torch.allclose(terms["contrastive_flow"], torch.cat(expected).mean(), atol=1e-5)
    method.eval()
    with torch.no_grad():
        assert method(batch).keys() == {
            "denoise"
        }  # a validation loss can be compared with those of runs without it


def test_contrastive_flow_needs_another_sample():
    method = Method(wrap(tiny("sd15")), Method.Config(contrastive_flow_weight=0.05), []).train()
    with pytest.raises(UserError, match=r"--contrastive_flow_weight.*--train_batch_size"):
        method({"pixels": random(1, 3, 16, 16), "prompt": ["a dog"]})


def test_subject_fidelity_by_hand():
    """SFO: minus the log of the sigmoid of beta times how much more the negative's error rose."""
    errors = [torch.tensor(values) for values in ([0.3, 0.2], [0.4, 0.5], [0.35, 0.1], [0.4, 0.6])]
    found = subject_fidelity(*errors, beta=20.0).item()
    total = 0.0
    for i in range(2):
        positive, negative, reference_positive, reference_negative = (own[i].item() for own in errors)
        gained = (positive - negative) - (reference_positive - reference_negative)
        total += -math.log(1 / (1 + math.exp(20.0 * gained)))
    assert found == pytest.approx(total / 2, rel=1e-5)


def test_subject_fidelity_lowers_the_subjects_error_alone():
    positive, negative = torch.tensor([0.3], requires_grad=True), torch.tensor([0.3], requires_grad=True)
    subject_fidelity(positive, negative, torch.tensor([0.3]), torch.tensor([0.3])).backward()
    assert positive.grad.item() == pytest.approx(500)  # beta / 2
    assert negative.grad.item() == pytest.approx(-500)
