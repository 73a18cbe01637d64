"""What is measured of S+ while it trains: by loops and by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from customize.trainers.methods.contrast_diagnostics import (
    appearance_correlation,
    gradient_ratios,
    rank_correlation,
    similarity_image,
    view_retrieval,
    write_similarity,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return (sum(x * y for x, y in zip(a, b, strict=True))) / (
        sum(x * x for x in a) * sum(y * y for y in b)
    ) ** 0.5


def looped_cosines(a, b):
    return np.array([[cosine(x, y) for y in b.tolist()] for x in a.tolist()])


def with_cosines(matrix):
    """Two layers of one, first and second views, whose cosines are `matrix` (n, n), of small entries:
    unit vectors along the axes, and its columns, made unit vectors by one more axis."""
    n = len(matrix)
    rest = (1 - (matrix**2).sum(0)).sqrt()
    return torch.eye(n, n + 1)[None], torch.cat([matrix.T, rest[:, None]], 1)[None]


# retrieval


def test_view_retrieval_by_loops():
    anchors, positives, identity = (
        noise(3, 8, 4),
        noise(3, 8, 4, seed=1),
        torch.tensor([0, 1, 2, 3, 0, 1, 2, 2]),
    )
    expected = []
    for layer in range(3):
        likeness = looped_cosines(anchors[layer], positives[layer])
        hits = [
            identity[max(range(8), key=lambda j, row=row: row[j])] == identity[i]
            for i, row in enumerate(likeness)
        ]
        expected.append(sum(map(float, hits)) / 8)
    assert len(set(expected)) > 1
    assert view_retrieval(anchors, positives, identity) == pytest.approx(expected)


def test_view_retrieval_by_hand():
    """In the first layer each view finds its own, in the second a neighbour, in the third all find the
    first."""
    axes = torch.eye(4)
    positives = torch.stack([3 * axes, axes.roll(1, 0), torch.cat([torch.ones(1, 4), -axes[1:]])])
    anchors = axes.expand(3, 4, 4)
    assert view_retrieval(anchors, positives, torch.tensor([0, 1, 2, 3])) == [1.0, 0.0, 0.25]
    # another image of the subject counts: 0 and 1 are one, 2 and 3 another
    assert view_retrieval(anchors, positives, torch.tensor([7, 7, 8, 8])) == [1.0, 0.5, 0.5]


# correlation


def looped_spearman(a, b):
    """1 - 6 sum d^2 / (n (n^2 - 1)), d the difference of ranks."""
    n = len(a)
    ranks = [[sum(y < x for y in sample) for x in sample] for sample in (a, b)]
    return 1 - 6 * sum((r - s) ** 2 for r, s in zip(*ranks, strict=True)) / (n * (n**2 - 1))


def test_rank_correlation_by_loops():
    a = noise(20).numpy()
    for b in (noise(20, seed=1).numpy(), a + noise(20, seed=2).numpy()):
        assert rank_correlation(a, b) == pytest.approx(looped_spearman(a, b), abs=1e-6)


def test_rank_correlation_asks_for_the_order_alone():
    a = noise(20).numpy()
    assert rank_correlation(a, np.exp(5 * a)) == pytest.approx(1)
    assert rank_correlation(a, -(a**3)) == pytest.approx(-1)


def test_appearance_correlation_by_loops():
    anchors, positives, looks, identity = (
        noise(3, 6, 4),
        noise(3, 6, 4, seed=1),
        noise(6, 5, seed=2),
        [0, 1, 2, 1, 3, 0],
    )
    learned = sum(looped_cosines(a, p) for a, p in zip(anchors, positives, strict=True)) / 3
    real = looped_cosines(looks, looks)
    pairs = [(i, j) for i in range(6) for j in range(6) if identity[i] != identity[j]]
    # images have one cosine in both directions: which of a pair comes first is left open
    expected = looped_spearman(
        [learned[i, j] for i, j in pairs], [real[i, j] + 1e-9 * (i < j) for i, j in pairs]
    )
    found = appearance_correlation(anchors, positives, looks, torch.tensor(identity))
    assert found == pytest.approx(expected, abs=0.1)


def test_subjects_that_are_as_unlike_as_they_look_correlate_fully():
    looks = noise(8, 5)
    real = torch.tensor(looped_cosines(looks, looks)).float()
    for sign in (1, -1):
        views = with_cosines(sign * 0.2 * real**3)
        # two entries of a symmetric matrix share a rank, in either order
        assert appearance_correlation(*views, looks, torch.arange(8)) == pytest.approx(sign, abs=5e-3)


def test_the_layers_are_averaged_before_they_are_ranked():
    looks, twist = noise(8, 5), 0.2 * noise(8, 8, seed=1).tanh()
    real = 0.1 * torch.tensor(looped_cosines(looks, looks)).float()
    layers = [with_cosines(real + twist), with_cosines(real - twist)]
    anchors, positives = (torch.cat([layer[i] for layer in layers]) for i in range(2))
    assert appearance_correlation(*layers[0], looks, torch.arange(8)) < 0.9
    assert appearance_correlation(anchors, positives, looks, torch.arange(8)) > 0.995


def test_pairs_of_one_subject_do_not_count():
    looks, identity = noise(8, 5), torch.tensor([0, 0, 1, 1, 2, 3, 4, 0])
    real = 0.1 * torch.tensor(looped_cosines(looks, looks)).float()
    same = identity[:, None] == identity
    views = with_cosines(torch.where(same, -0.3, real))
    assert appearance_correlation(*views, looks, identity) > 0.995
    assert (
        appearance_correlation(*views, looks, torch.arange(8)) < 0.995
    )  # where they do, they are out of order


def test_correlation_and_image_work_in_mixed_precision():
    """Validation runs under training's autocast."""
    anchors, positives, looks = noise(2, 6, 4), noise(2, 6, 4, seed=1), noise(6, 5, seed=2)
    exact = appearance_correlation(anchors, positives, looks, torch.arange(6))
    image = np.asarray(similarity_image(anchors, positives, looks))
    with torch.autocast("cpu", torch.bfloat16):
        assert appearance_correlation(anchors, positives, looks, torch.arange(6)) == pytest.approx(
            exact, abs=0.05
        )
        found = np.asarray(similarity_image(anchors, positives, looks))
    assert np.abs(found.astype(int) - image.astype(int)).max() <= 3


# the image


def test_the_image_shows_both_matrices_from_black_to_white():
    anchors, positives, looks = noise(2, 4, 3), noise(2, 4, 3, seed=1), noise(4, 5, seed=2)
    image = similarity_image(anchors, positives, looks, side=40)
    assert image.mode == "L"
    assert image.size == (82, 40)
    learned = sum(looped_cosines(a, p) for a, p in zip(anchors, positives, strict=True)) / 2
    for left, matrix in ((0, learned), (42, looped_cosines(looks, looks))):
        assert image.crop((left, 0, left + 40, 40)).getextrema() == (0, 255)
        for i in range(4):
            for j in range(4):
                shade = 255 * (matrix[i, j] - matrix.min()) / (matrix.max() - matrix.min())
                square = image.crop((left + 10 * j, 10 * i, left + 10 * j + 10, 10 * i + 10)).getextrema()
                assert (
                    square[0] == square[1] == pytest.approx(shade, abs=1.01)
                )  # first views from top to bottom
    assert image.crop((40, 0, 42, 40)).getextrema() == (255, 255)  # the gap


def test_subjects_that_are_all_alike_give_a_image_too():
    """As before training, when S+ is the same for all."""
    assert similarity_image(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(3, 5)).size == (492, 240)


def test_the_image_is_written_by_its_step(tmp_path):
    views = noise(2, 4, 3), noise(2, 4, 3, seed=1), noise(4, 5, seed=2)
    write_similarity(tmp_path / "new" / "samples", 250, *views)
    with Image.open(tmp_path / "new" / "samples" / "similarity-000250.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(similarity_image(*views)))


# gradients


def test_gradient_ratios_by_hand():
    a, b = torch.tensor([2.0, 1.0], requires_grad=True), torch.tensor(3.0, requires_grad=True)
    losses = {
        "denoise": (a * torch.tensor([3.0, 4.0])).sum() + 12 * b,  # (3, 4, 12): 13
        "cscl": (a**2).sum() * 1.5,  # (6, 3)
        "macl": 0.5 * b**2,  # 3
    }
    found = gradient_ratios(losses, [a, b, torch.zeros(2, requires_grad=True)])
    assert found == pytest.approx({"cscl gradient": 45**0.5 / 13, "macl gradient": 3 / 13})
    assert a.grad is None
    assert b.grad is None


def test_gradient_ratios_leave_the_graph_for_training():
    a = torch.tensor([2.0, 1.0], requires_grad=True)
    losses = {"denoise": (a**2).sum(), "cscl": (a**3).sum()}
    gradient_ratios(losses, [a])
    sum(losses.values()).backward()
    assert a.grad.tolist() == [2 * 2 + 3 * 4, 2 * 1 + 3 * 1]


def test_a_diffusion_loss_without_gradient_gives_finite_ratios():
    a = torch.tensor([2.0], requires_grad=True)
    found = gradient_ratios({"denoise": (0 * a).sum(), "cscl": a.sum()}, [a])
    assert np.isfinite(found["cscl gradient"])
