"""The contrasts between subjects: both losses by loops, on two processes, and as CustomContrast uses
them."""

import itertools
import math
import os
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from customize.backbones.base import Step
from customize.backbones.families import wrap
from customize.errors import UserError
from customize.losses.contrastive import (
    CsclForm,
    appearance_contrast,
    cosines,
    cross_modal_contrast,
    gathered,
    scaled,
)
from customize.trainers.methods.contrast_diagnostics import rank_correlation
from customize.trainers.methods.custom_contrast import CustomContrast, CustomContrastConfig
from tiny import tiny

FORMS = ("ratio", "weight", "soft", "product", "plain")
ROWS, COLUMNS = (
    [0, 1, 0, 2],
    [0, 1, 0, 2, 1, 3, 0],
)  # subjects of the samples, the last three columns from a queue


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_subject(rows, columns):
    return torch.tensor([[row == column for column in columns] for row in rows])


def cosine(a, b):
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()) ** 0.5


def competing(i, rows, columns):
    """The columns that row i is compared with: its positive, and all of other subjects."""
    return [j for j in range(len(columns)) if j == i or columns[j] != rows[i]]


def looped_cross_modal(visual, textual, rows, columns, scale):
    """CLIP's loss without false negatives; both directions, the second over the columns that have a row."""
    n, total = len(visual), 0.0
    for i in range(n):
        across = sum((scale * cosine(visual[i], textual[j])).exp() for j in competing(i, rows, columns))
        down = sum((scale * cosine(visual[j], textual[i])).exp() for j in competing(i, columns[:n], rows))
        total = total + (across.log() + down.log()) / 2 - scale * cosine(visual[i], textual[i])
    return total / n


def looped_stretch(similarity, rows, columns):
    """S: 0 for the least alike negatives of the batch, 1 for the most alike ones and within a subject."""
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    negatives = [similarity[i, j].item() for i, j in pairs if rows[i] != columns[j]]
    low, high = min(negatives), max(negatives)
    stretch = {(i, j): (similarity[i, j].item() - low) / (high - low) for i, j in pairs}
    return {(i, j): 1.0 if rows[i] == columns[j] else s for (i, j), s in stretch.items()}


def looped_appearance(anchors, positives, similarity, rows, columns, form, temperature):
    """The mean over layers and rows of the cross-entropy of one form."""
    stretch, total = looped_stretch(similarity, rows, columns), 0.0
    for layer in range(len(anchors)):
        for i in range(len(rows)):
            others = [j for j in range(len(columns)) if rows[i] != columns[j]]
            distance = sum(1 - stretch[i, j] for j in others) / len(others)
            logits = {}
            for j in competing(i, rows, columns):
                c, s = cosine(anchors[layer, i], positives[layer, j]), stretch[i, j]
                logits[j] = c / temperature
                if form == "ratio":
                    logits[j] = c / (max(s, 0.2) * temperature)
                elif form == "product":
                    logits[j] = s * c / temperature
                elif form == "weight" and j != i:
                    # a thousandth on both sides, so that the most alike pair has a logarithm
                    logits[j] = c / temperature + math.log((1 - s + 1e-3) / (distance + 1e-3))
            target = {j: float(j == i) for j in logits}
            if form == "soft":
                weights = {j: math.exp(stretch[i, j] / 0.2) for j in logits}
                target = {j: weight / sum(weights.values()) for j, weight in weights.items()}
            normaliser = sum(logit.exp() for logit in logits.values()).log()
            total = total - sum(target[j] * (logits[j] - normaliser) for j in logits)
    return total / (len(anchors) * len(rows))


def compare_with_gradients(ours, looped, inputs, atol=1e-5):
    """Both functions of `inputs` have one value, and one gradient for each input."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    found, expected = ours(*inputs), looped(*inputs)
    assert found.item() == pytest.approx(expected.item(), abs=atol)
    pairs = zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for gradient, wanted in pairs:
        assert wanted.abs().max() > 1e-3
        assert torch.allclose(gradient, wanted, atol=atol)


# the contrast of the two Q-Formers


@pytest.mark.parametrize("columns", [ROWS, COLUMNS], ids=["square", "queue"])
def test_the_cross_modal_loss_and_its_gradient_by_loops(columns):
    same = same_subject(ROWS, columns)
    compare_with_gradients(
        lambda v, t, scale: cross_modal_contrast(v, t, same, scale),
        lambda v, t, scale: looped_cross_modal(v, t, ROWS, columns, scale),
        [noise(len(ROWS), 5), noise(len(columns), 5, seed=1), torch.tensor(4.0)],
    )


def test_the_cross_modal_loss_is_symmetric():
    visual, textual, same = noise(4, 5), noise(4, 5, seed=1), same_subject(ROWS, ROWS)
    forth, back = (
        cross_modal_contrast(visual, textual, same, 4.0),
        cross_modal_contrast(textual, visual, same, 4.0),
    )
    assert forth.item() == pytest.approx(back.item(), abs=1e-6)


def test_the_cross_modal_loss_ignores_lengths():
    visual, textual, same = noise(4, 5), noise(4, 5, seed=1), same_subject(ROWS, ROWS)
    stretched = cross_modal_contrast(visual * 7, textual * torch.tensor([[0.1], [1], [20], [3]]), same, 4.0)
    assert stretched.item() == pytest.approx(
        cross_modal_contrast(visual, textual, same, 4.0).item(), abs=1e-5
    )


def test_two_perfect_clusters_cost_nothing():
    subjects = [0, 0, 1, 1]
    states = torch.eye(2)[subjects]
    assert cross_modal_contrast(states, states, same_subject(subjects, subjects), 50.0).item() < 1e-6
    # were each sample a subject of its own, its twin could not be told from it
    alone = cross_modal_contrast(states, states, torch.eye(4, dtype=torch.bool), 50.0)
    assert alone.item() == pytest.approx(math.log(2), abs=1e-5)


def test_states_that_are_all_alike_cost_the_logarithm_of_their_number():
    states = torch.ones(7, 3)
    same = same_subject(range(4), range(7))
    loss = cross_modal_contrast(states[:4], states, same, 9.0)
    assert loss.item() == pytest.approx((math.log(7) + math.log(4)) / 2, abs=1e-5)


def test_a_queue_counts_only_as_negatives_of_the_rows():
    """The queue's columns have no rows: the second direction must not see them."""
    visual, textual = torch.eye(3), torch.eye(3)
    queued = torch.cat([textual, visual[:1]])  # what looks like the first row's own
    loss = cross_modal_contrast(visual, queued, same_subject(range(3), range(4)), 50.0)
    assert loss.item() == pytest.approx(math.log(2) / 3 / 2, abs=1e-5)


# other forms of the contrast of the two Q-Formers


def looped_form(visual, textual, rows, columns, scale, form):
    """One direction after the other, row by row."""
    total = 0.0
    alignment = sum(cosine(visual[i], textual[i]) for i in range(len(rows))) / len(rows)
    if form == "adaptive":
        scale = scale / (1 + max(alignment.item(), 0.0))
    for first, second, own, others in (
        (visual, textual, rows, columns),
        (textual[: len(rows)], visual, rows, rows),
    ):
        for i in range(len(own)):
            logits = {j: scale * cosine(first[i], second[j]) for j in range(len(others))}
            positives = [j for j in logits if own[i] == others[j]] if form == "supervised" else [i]
            negatives = [j for j in logits if own[i] != others[j]]
            if form == "hard":
                weights = {j: math.exp(logits[j].item()) for j in negatives}
                mean = sum(weights.values()) / len(weights)
                logits |= {j: logits[j] + math.log(weights[j] / mean) for j in negatives}
            competing = negatives if form == "decoupled" else positives + negatives
            normaliser = sum(logits[j].exp() for j in competing).log()
            row = sum(normaliser - logits[j] for j in positives) / len(positives)
            total = total + row / len(own) / 2
    return total


@pytest.mark.parametrize("form", ["supervised", "decoupled", "hard", "adaptive"])
@pytest.mark.parametrize("columns", [ROWS, COLUMNS], ids=["square", "queue"])
def test_other_forms_and_their_gradients_by_loops(form, columns):
    same, scale = same_subject(ROWS, columns), 4.0
    visual, textual = noise(len(ROWS), 5), noise(len(columns), 5, seed=1)
    compare_with_gradients(
        lambda v, t: cross_modal_contrast(v, t, same, scale, form),
        lambda v, t: looped_form(v, t, ROWS, columns, scale, form),
        [visual + textual[: len(ROWS)], textual],
    )


def test_alignment_and_uniformity_by_loops():
    """Images of one subject need not be apart; those of a queue count."""
    rows, columns = [0, 1, 1, 2], [0, 1, 1, 2, 3, 0]
    visual, textual = noise(4, 5), noise(6, 5, seed=1)

    def even(states, others, names):
        squares = [
            2 - 2 * cosine(states[i], others[j])
            for i in range(4)
            for j in range(len(others))
            if rows[i] != names[j]
        ]
        return (sum((-2 * square).exp() for square in squares) / len(squares)).log()

    aligned = sum(2 - 2 * cosine(visual[i], textual[i]) for i in range(4)) / 4
    expected = aligned + (even(visual, visual, rows) + even(textual[:4], textual, columns)) / 2
    same = torch.tensor([[a == b for b in columns] for a in rows])
    found = cross_modal_contrast(visual, textual, same, 4.0, "uniform")
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("form", get_args(CsclForm))
def test_each_form_is_finite_for_one_subject_and_falls_as_pairs_align(form):
    visual, textual = noise(4, 5).requires_grad_(), noise(4, 5, seed=1).requires_grad_()
    one = cross_modal_contrast(visual, textual, torch.ones(4, 4, dtype=torch.bool), 4.0, form)
    assert all(g.isfinite().all() for g in torch.autograd.grad(one, (visual, textual), allow_unused=True))
    same, states = torch.eye(4, dtype=torch.bool), torch.eye(4)
    apart = cross_modal_contrast(states, states.roll(1, 0), same, 4.0, form)
    assert cross_modal_contrast(states, states, same, 4.0, form) < apart


# the contrast of S+


@pytest.fixture
def views():
    """Two layers of first views, of second views with a queue, and the cosines of the images."""
    return noise(2, 4, 5), noise(2, 7, 5, seed=1), noise(4, 7, seed=2).tanh()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [ROWS, COLUMNS], ids=["square", "queue"])
def test_the_appearance_loss_and_its_gradient_by_loops(form, columns, views):
    anchors, positives, similarity = views
    positives, similarity, same = (
        positives[:, : len(columns)],
        similarity[:, : len(columns)],
        same_subject(ROWS, columns),
    )
    compare_with_gradients(
        lambda a, p: appearance_contrast(a, p, similarity, same, form, 0.3),
        lambda a, p: looped_appearance(a, p, similarity, ROWS, columns, form, 0.3),
        [anchors, positives],
    )


def test_the_forms_differ(views):
    same = same_subject(ROWS, COLUMNS)
    losses = sorted(appearance_contrast(*views, same, form, 0.3).item() for form in FORMS)
    assert min(b - a for a, b in itertools.pairwise(losses)) > 1e-3


def test_without_a_form_and_a_temperature_it_is_the_soft_form_at_a_tenth(views):
    same = same_subject(ROWS, COLUMNS)
    expected = looped_appearance(*views, ROWS, COLUMNS, "soft", 0.1)
    assert appearance_contrast(*views, same).item() == pytest.approx(expected.item(), rel=1e-5)


def test_similarity_is_stretched_over_the_negatives_alone():
    similarity = torch.tensor([[9.0, 0.3, 0.5], [0.4, -9.0, 0.7]])
    found = scaled(similarity, same_subject([0, 1], [0, 1, 2]))
    assert torch.allclose(found, torch.tensor([[1.0, 0.0, 0.5], [0.25, 1.0, 1.0]]), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_order_and_spacing_of_similarities_count(form, views):
    """Not their range: towers give cosines of very different ones."""
    anchors, positives, similarity = views
    same = same_subject(ROWS, COLUMNS)
    loss = appearance_contrast(anchors, positives, similarity, same, form, 0.3)
    moved = appearance_contrast(anchors, positives, 0.1 * similarity + 0.8, same, form, 0.3)
    assert moved.item() == pytest.approx(loss.item(), abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_the_mean_of_the_layers(form, views):
    anchors, positives, similarity = views
    same = same_subject(ROWS, COLUMNS)
    each = [appearance_contrast(anchors[[i]], positives[[i]], similarity, same, form) for i in range(2)]
    assert abs(each[0] - each[1]) > 1e-2
    both = appearance_contrast(anchors, positives, similarity, same, form)
    assert both.item() == pytest.approx((each[0] + each[1]).item() / 2, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_reaches_the_similarity(form, views):
    anchors, positives, similarity = (x.clone().requires_grad_() for x in views)
    appearance_contrast(anchors, positives, similarity, same_subject(ROWS, COLUMNS), form).backward()
    assert similarity.grad is None
    assert anchors.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_another_image_of_the_subject_is_no_negative(form):
    """One row; its columns are its own second view, two of other subjects, and another image of its
    subject."""
    anchors, positives, similarity = (
        noise(1, 1, 5),
        noise(1, 4, 5, seed=1),
        torch.tensor([[1.0, 0.2, 0.6, 0.9]]),
    )
    same = same_subject([0], [0, 1, 2, 0])

    def loss_with(column):
        changed = positives.clone()
        changed[:, column] = anchors[:, 0]
        return appearance_contrast(anchors, changed, similarity, same, form)

    before = appearance_contrast(anchors, positives, similarity, same, form)
    assert loss_with(3).equal(before)
    assert (
        loss_with(1) - before
    ).abs() > 1e-3 or form == "product"  # where the least alike negative has a logit of 0
    assert loss_with(2) > before + 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_one_subject_costs_nothing_and_has_finite_gradients(form):
    anchors, positives = noise(2, 3, 5).requires_grad_(), noise(2, 3, 5, seed=1).requires_grad_()
    loss = appearance_contrast(
        anchors, positives, noise(3, 3, seed=2), torch.ones(3, 3, dtype=torch.bool), form
    )
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(torch.cat([anchors.grad, positives.grad])).all()


def learned_order(form, subjects=24, dim=64, starts=3):
    """Embeddings trained freely by one form: Spearman's correlation of their cosines with how alike
    negatives look, the mean of several random starts, which are trained beside each other as layers."""
    looks = noise(subjects, 8)
    looks[:, 0] += 1.5
    similarity, same = cosines(looks, looks), torch.eye(subjects, dtype=torch.bool)
    views = [noise(starts, subjects, dim, seed=seed).requires_grad_() for seed in (1, 2)]
    optimizer = torch.optim.Adam(views, lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        appearance_contrast(*views, similarity, same, form, 0.2).backward()
        optimizer.step()
    learned = cosines(*views).detach()[:, ~same].numpy()
    return np.mean([rank_correlation(start, similarity[~same].numpy()) for start in learned])


@pytest.mark.parametrize(
    ("form", "low", "high"),
    [("ratio", 0.5, 1), ("weight", 0.5, 1), ("soft", 0.7, 1), ("product", -1, -0.25), ("plain", -0.15, 0.15)],
)
def test_what_each_form_does_to_look_alikes(form, low, high):
    """`ratio`, `weight` and `soft` leave look-alikes near each other, `product` drives them apart,
    `plain` does not mind."""
    assert low < learned_order(form) < high


# precision


def test_cosines_by_loops():
    a, b = noise(2, 3, 5), noise(2, 4, 5, seed=1)
    found = cosines(a, b)
    assert found.shape == (2, 3, 4)
    for k in range(2):
        for i in range(3):
            for j in range(4):
                assert found[k, i, j].item() == pytest.approx(cosine(a[k, i], b[k, j]).item(), abs=1e-6)


def test_cosines_are_float32_also_under_autocast():
    """A scale of 100 turns bfloat16's error of a cosine, up to 1/512, into a fifth of a nat."""
    a, b = noise(6, 32), noise(6, 32, seed=1)
    exact = cosines(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        found = cosines(a, b)
    assert found.dtype == torch.float32
    assert torch.allclose(found, exact, atol=1e-6)


# several processes

HALF = """
import sys, time
import torch
import torch.distributed as dist
from customize.losses.contrastive import appearance_contrast, cosines, cross_modal_contrast, gathered

folder = sys.argv[1]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
joint = torch.load(f"{folder}/joint.pt")
batch = {name: value[2 * rank : 2 * rank + 2] for name, value in joint["batch"].items()}
layer = torch.nn.Linear(5, 6, bias=False)
layer.load_state_dict(joint["layer"])
scale = torch.nn.Parameter(torch.tensor(4.0))
identity, looks = gathered(batch["identity"]), gathered(batch["looks"])
found = {"identity": identity, "looks": looks}
for name in ("cross", "appearance"):
    first, second = (gathered(layer(batch[view])) for view in ("first", "second"))
    same = identity[:, None] == identity
    if name == "cross":
        loss = cross_modal_contrast(first[:, 0], second[:, 0], same, scale)
    else:
        layers = first.transpose(0, 1), second.transpose(0, 1)
        loss = appearance_contrast(*layers, cosines(looks, looks), same, "ratio", 0.3)
    parameters = [layer.weight, scale] if name == "cross" else [layer.weight]
    gradients = torch.autograd.grad(loss, parameters)
    for gradient in gradients:
        dist.all_reduce(gradient)
    gradients = [gradient / dist.get_world_size() for gradient in gradients]
    found[name] = {"loss": loss.detach(), "gradients": gradients}
torch.save(found, f"{folder}/{rank}.pt")
dist.barrier()
time.sleep(0.5)  # gloo's threads let go of the last tensors before the group goes
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A joint batch of four samples, three layers each, and what two processes make of half of it each."""
    folder = tmp_path_factory.mktemp("halves")
    # subjects meet again in the other half
    batch = {"identity": torch.tensor([5, 6, 5, 7]), "looks": noise(4, 8)}
    batch |= {"first": noise(4, 3, 5, seed=1), "second": noise(4, 3, 5, seed=2)}
    layer = torch.nn.Linear(5, 6, bias=False)
    layer.weight.data = noise(6, 5, seed=3)
    torch.save({"batch": batch, "layer": layer.state_dict()}, folder / "joint.pt")
    (folder / "half.py").write_text(HALF)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [*command, str(folder / "half.py"), str(folder)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=280, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return batch, layer, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_one_process_gathers_itself():
    x = noise(3, 2)
    assert gathered(x) is x


def test_gathered_rows_are_those_of_all_processes_in_their_order(halves):
    batch, _, found = halves
    for each in found:
        assert each["identity"].tolist() == [5, 6, 5, 7]
        assert each["looks"].equal(batch["looks"])


def compare_with_one_process(found, loss, parameters):
    gradients = torch.autograd.grad(loss, parameters)
    for each in found:
        assert each["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
        for gradient, wanted in zip(each["gradients"], gradients, strict=True):
            assert wanted.abs().max() > 1e-2
            assert torch.allclose(gradient, wanted, atol=1e-6, rtol=0)


def test_two_halves_have_the_cross_modal_loss_and_gradient_of_the_whole(halves):
    batch, layer, found = halves
    scale = torch.tensor(4.0, requires_grad=True)
    same = batch["identity"][:, None] == batch["identity"]
    loss = cross_modal_contrast(layer(batch["first"][:, 0]), layer(batch["second"][:, 0]), same, scale)
    compare_with_one_process([each["cross"] for each in found], loss, [layer.weight, scale])


def test_two_halves_have_the_appearance_loss_and_gradient_of_the_whole(halves):
    batch, layer, found = halves
    views = (layer(batch[view]).transpose(0, 1) for view in ("first", "second"))
    same = batch["identity"][:, None] == batch["identity"]
    loss = appearance_contrast(*views, cosines(batch["looks"], batch["looks"]), same, "ratio", 0.3)
    compare_with_one_process([each["appearance"] for each in found], loss, [layer.weight])


# the method


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """The folder of a tiny image encoder."""
    folder = tmp_path_factory.mktemp("tower")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=16, **sizes)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def make(tower, **options):
    """CustomContrast on a tiny model, its words awake: before training S+ is the same for all subjects."""
    backbone = wrap(tiny("sd15"), "tiny-sd15")
    backbone.resolution = 32
    sizes = {"dim": 24, "depth": 1, "heads": 2, "visual_queries": 3, "feature_layers": 2, "time_bins": 4}
    method = CustomContrast(
        backbone,
        CustomContrastConfig(image_encoder=str(tower), initializer_token="photo", **(sizes | options)),
    )
    if method.adapter.has_words:
        for head in method.adapter.encoder.heads:
            torch.nn.init.normal_(head.weight)
    return method.train()


def batch_of(identity, seed=0):
    n = len(identity)
    batch = {
        "pixels": noise(n, 3, 32, 32, seed=seed).tanh(),
        "references": noise(n, 1, 2, 3, 32, 32, seed=seed + 1),
    }
    batch |= {"present": torch.ones(n, 1, dtype=torch.bool), "shows_target": torch.zeros(n, dtype=torch.bool)}
    return batch | {"prompt": ["a photo of <s> dog"] * n, "identity": torch.tensor(identity)}


def step_of(method, batch):
    nothing, t = torch.zeros(len(batch["identity"])), torch.full([len(batch["identity"])], 0.4)
    return Step(nothing, nothing, nothing, t, nothing, method.condition(batch, t), nothing, batch)


def compared(method, batch):
    """What the contrasts compare, from the modules themselves: S+ and CLS of each view alone, the second
    one's embedding."""
    encoder, views = method.adapter.encoder, []
    for i in range(2):
        with torch.no_grad():
            output = method.image_encoder.vision(batch["references"][:, 0, i], output_hidden_states=True)
            features = torch.cat([output.hidden_states[layer] for layer in encoder.layers], -1)[:, None]
            present = torch.ones(features.shape[:2], dtype=torch.bool)
            views.append(encoder(features, present, torch.full([len(features)], 0.4)))
    (first, second), layers = views, [view.words[0].transpose(0, 1) for view in views]
    assert len(second.words) == 1
    return {
        "anchor": layers[0],
        "positive": layers[1],
        "v": first.visual_cls,
        "t": first.textual_cls,
        "looks": output[0],
    }


def expected_terms(method, batch, queued=()):
    """Both terms by loops, with unramped weights; `queued` are earlier batches, the newest first."""
    rows, parts = compared(method, batch), [compared(method, each) for each in (batch, *queued)]
    identity = [
        batch["identity"].tolist(),
        [i for each in (batch, *queued) for i in each["identity"].tolist()],
    ]
    textual = torch.cat([part["t"] for part in parts])
    cscl = looped_cross_modal(rows["v"], textual, *identity, 1 / 0.07)
    positives, looks = (
        torch.cat([part["positive"] for part in parts], 1),
        torch.cat([part["looks"] for part in parts]),
    )
    similarity = torch.tensor([[cosine(a, b).item() for b in looks] for a in rows["looks"]])
    config = method.config
    macl = looped_appearance(
        rows["anchor"], positives, similarity, *identity, config.macl_form, config.macl_temperature
    )
    return {"cscl": config.cscl_weight * cscl.item(), "macl": config.macl_weight * macl.item()}


def values(terms):
    return {name: term.item() for name, term in terms.items()}


def test_the_terms_of_the_method_by_loops(tower):
    """The first view's two CLS states, S+ of both views at every slot, and the tower's embedding of the
    second view."""
    method = make(tower, cscl_weight=0.3, macl_weight=0.2, macl_form="weight", macl_temperature=0.2)
    batch = batch_of([4, 2, 4, 9])
    found = method.contrast(step_of(method, batch))
    assert values(found) == pytest.approx(expected_terms(method, batch), rel=1e-4)
    assert method.queue == {}


def test_the_terms_train_the_encoder_and_the_scale_but_not_the_tower(tower):
    method = make(tower)
    found = method.contrast(step_of(method, batch_of([0, 1, 2])))
    found["cscl"].backward(retain_graph=True)
    encoder = method.adapter.encoder
    assert method.log_scale.grad.any()
    assert encoder.project_visual.weight.grad.any()
    assert encoder.project_textual.weight.grad.any()
    assert encoder.heads[0].weight.grad is None
    found["macl"].backward()
    assert encoder.heads[0].weight.grad.any()
    assert all(p.grad is None for p in method.image_encoder.parameters())


def test_the_scale_stops_at_100(tower):
    method, batch = make(tower, macl_weight=0), batch_of([0, 1, 2])
    losses = []
    for scale in (100.0, 5000.0):
        method.log_scale.data.fill_(math.log(scale))
        losses.append(method.contrast(step_of(method, batch))["cscl"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_weights_rise_over_the_first_steps(tower):
    method = make(tower, contrast_warmup=0.2)
    step = step_of(method, batch_of([0, 1, 2]))
    full = values(method.contrast(step))
    assert min(full.values()) > 0
    for at, share in ((0, 0), (5, 0.25), (10, 0.5), (20, 1), (21, 1), (99, 1)):
        method.on_step(at, 100)
        assert values(method.contrast(step)) == pytest.approx(
            {name: share * value for name, value in full.items()}, rel=1e-5
        )


def test_a_queue_of_earlier_samples_serves_as_negatives(tower):
    method = make(tower, queue_size=5)
    batches = [batch_of([0, 1, 2]), batch_of([1, 3, 0], seed=10), batch_of([4, 2, 0], seed=20)]
    method.contrast(step_of(method, batches[0]))
    assert method.queue["identity"].tolist() == [0, 1, 2]

    second = method.contrast(step_of(method, batches[1]))
    assert values(second) == pytest.approx(expected_terms(method, batches[1], batches[:1]), rel=1e-4)
    assert (
        second["cscl"].item() > expected_terms(method, batches[1])["cscl"]
    )  # subjects 1 and 2 for 0 and 3 are new to it
    assert method.queue["identity"].tolist() == [1, 3, 0, 0, 1]  # the newest come first
    assert all(len(value) == 5 and not value.requires_grad for value in method.queue.values())

    third = method.contrast(step_of(method, batches[2]))
    oldest = {name: value[:2] for name, value in batches[0].items()}
    assert values(third) == pytest.approx(expected_terms(method, batches[2], [batches[1], oldest]), rel=1e-4)
    sum(third.values()).backward()  # nothing of earlier steps is asked for


def test_evaluation_leaves_the_queue_alone(tower):
    method = make(tower, queue_size=5)
    method.contrast(step_of(method, batch_of([0, 1, 2])))
    method.eval()
    method.contrast(step_of(method, batch_of([7, 8, 9], seed=10)))
    assert method.queue["identity"].tolist() == [0, 1, 2]


def test_a_weight_of_zero_removes_its_term(tower):
    batch = batch_of([0, 1, 2])
    method = make(tower, cscl_weight=0)
    assert "log_scale" not in method.trainable()
    assert set(method(batch)) == {"denoise", "macl"}
    assert set(make(tower, macl_weight=0)(batch)) == {"denoise", "cscl"}
    neither = make(tower, cscl_weight=0, macl_weight=0)
    assert set(neither(batch)) == {"denoise"}
    assert neither.condition(batch, torch.full([3], 0.4)).views is None


def test_contrasts_without_words_are_refused(tower):
    with pytest.raises(UserError, match="--cscl_weight 0 --macl_weight 0"):
        make(tower, words=False)
    visual = make(tower, words=False, cscl_weight=0, macl_weight=0)
    assert set(visual(batch_of([0, 1]))) == {"denoise"}
    # nothing to compare
    assert "spearman" not in visual.diagnose([batch_of([0, 1])], tower / "samples", 1)


def test_a_diagnosis_names_its_numbers_and_writes_its_image(tower, tmp_path):
    method = make(tower)
    found = method.diagnose([batch_of([0, 1, 2]), batch_of([3, 4], seed=10)], tmp_path / "samples", 30)
    slots = [found[f"retrieval block {i}"] for i in range(method.adapter.text_blocks)]
    assert found["retrieval"] == pytest.approx(np.mean(slots))
    assert -1 <= found["spearman"] <= 1
    assert found["cscl gradient"] > 0
    assert found["macl gradient"] > 0
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["similarity-000030.png"]


def test_a_diagnosis_leaves_training_as_it_was(tower, tmp_path):
    """Held-out subjects, whose numbers are counted anew, must not become training's negatives."""
    method = make(tower, queue_size=5)
    method.contrast(step_of(method, batch_of([0, 1, 2])))
    queue = dict(method.queue)
    method.eval()  # as the loop does
    method.diagnose([batch_of([0, 1], seed=10)], tmp_path, 1)
    assert all(parameter.grad is None for parameter in method.parameters())
    assert all(method.queue[name].equal(value) for name, value in queue.items())
