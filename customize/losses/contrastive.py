"""Contrastive losses between subjects: CustomContrast's CSCL and MACL (Chen et al., 2025, arXiv
2409.05606, section 3.3).

In similarity matrices, rows are anchors and columns are candidates: column i is the positive of row i,
and a queue may add columns. `same` (rows, columns) is True where both are of one subject; such pairs are
no negatives.
"""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

MaclForm = Literal["ratio", "weight", "soft", "product", "plain"]
CsclForm = Literal["plain", "supervised", "decoupled", "hard", "adaptive", "uniform"]


class _Gather(torch.autograd.Function):
    """torch.distributed.nn's all_gather is deprecated, and mixes up gradients that are not contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gathered(x: Tensor) -> Tensor:
    """All-gather with exact gradients; every process holds the same number of samples. The joint loss,
    averaged over processes by DistributedDataParallel, has the gradient of a single process with the
    whole batch."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _Gather.apply(x.contiguous())


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """All pairwise cosines of vectors (..., n, dim) and (..., m, dim), computed in float32."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(-1, -2)


def info_nce(logits: Tensor, target: Tensor) -> Tensor:
    """The core of every contrast here: cross-entropy of softmax(logits) with the distribution `target`, mean
    over rows (van den Oord et al., 2018, arXiv 1807.03748, eq. 4).

    Both are (..., rows, columns); rows of `target` sum to 1, or are 0 where a row has no positive and does
    not count. Columns with a logit of minus infinity are no candidates.
    """
    log_likelihood = logits.log_softmax(-1)
    each = -torch.where(target > 0, target * log_likelihood, 0.0).sum(-1)
    counts = target.sum(-1) > 0
    return each[counts].mean() if not counts.all() else each.mean()


def supervised_contrast(features: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrast (SupCon, Khosla et al., 2020, arXiv 2004.11362, L_out): samples of one label are
    positives of each other, all others negatives.

    `features` (n, dim), `labels` (n,) whole numbers. Those of this process are compared, since each process
    may have another number. Zero if no label occurs twice.
    """
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels) & ~itself
    logits = cosines(features, features) / temperature
    if not positive.any():
        return logits.sum() * 0
    target = positive / positive.sum(1, keepdim=True).clamp(min=1)
    return info_nce(logits.masked_fill(itself, -torch.inf), target)


def _without_false_negatives(logits: Tensor, same: Tensor) -> Tensor:
    positive = torch.eye(*same.shape, dtype=torch.bool, device=same.device)
    return logits.masked_fill(same & ~positive, -torch.inf)


def decoupled(logits: Tensor, positive: Tensor) -> Tensor:
    """InfoNCE that leaves the positive out of the softmax: logsumexp of the negatives minus the positive,
    mean over rows (decoupled contrast, Yeh et al., 2022, arXiv 2110.06848, eq. 5). `positive` (rows,
    columns) has one True in each row; a row without negatives costs nothing."""
    others = logits.masked_fill(positive | ~logits.isfinite(), -1e30).logsumexp(-1)
    return torch.where(others > -1e29, others - logits[positive], 0.0).mean()


def hardened(logits: Tensor, positive: Tensor) -> Tensor:
    """Logits whose negatives count the more, the more similar they are (hard negatives, Robinson et al.,
    2021, arXiv 2010.04592, eq. 4, beta 1): weights proportional to exp(logit), of mean 1, without
    gradient."""
    negative = ~positive & logits.isfinite()
    weight = logits.detach().masked_fill(~negative, -1e30)
    mean = weight.logsumexp(-1, keepdim=True) - negative.sum(-1, keepdim=True).clamp(min=1).log()
    return torch.where(negative, logits + weight - mean, logits)


def uniformity(features: Tensor, others: Tensor, same: Tensor) -> Tensor:
    """How evenly vectors (n, dim) and (m, dim) lie on the sphere: log of the mean of exp(-2 d^2) over
    pairs at distance d (Wang and Isola, 2020, arXiv 2005.10242, eq. 4), except where `same` (n, m). At
    most 0; lower is more even."""
    squares = (2 - 2 * cosines(features, others))[~same]
    return (-2 * squares).exp().mean().log() if len(squares) else features.sum() * 0


def nearest_word_contrast(
    vectors: Tensor, labels: Tensor, table: Tensor, count: int = 10, temperature: float = 0.1
) -> Tensor:
    """Nearest-word contrast (Arar et al., 2023, arXiv 2307.06925, eq. 3): each predicted word is drawn to
    the `count` words of the vocabulary that are nearest to it, and away from the words of other subjects.

    `vectors` (n, words, dim) of subjects with words of as many vectors, `labels` (n,) numbers of the
    subjects, `table` (vocabulary, dim) the embeddings, which get no gradient. The first vectors are
    compared with first ones, and so on. The paper's constants are not public: these are ours.
    """
    nearest = cosines(vectors.flatten(0, 1), table.detach()).topk(min(count, len(table)), -1).values
    drawn = (nearest / temperature).logsumexp(-1).view(vectors.shape[:2]).T  # (words, n)
    others = cosines(vectors.transpose(0, 1), gathered(vectors).transpose(0, 1)) / temperature
    others = others.masked_fill(labels[:, None] == gathered(labels), -torch.inf)
    logits = torch.cat([drawn[..., None], others], -1)
    target = torch.zeros_like(logits)
    target[..., 0] = 1
    return info_nce(logits, target)


def direction_contrast(effects: Tensor, temperature: float = 0.5) -> Tensor:
    """NoiseCLR's contrast (Dalva and Yanardag, 2024, arXiv 2312.05390): a direction changes all images alike,
    and each image otherwise than the other directions do.

    `effects` (directions, images, dim), two or more of both: what direction k changes of the denoiser's
    output for image a, e_ka = eps(x_a, d_k) - eps(x_a, nothing). Mean over directions k of

        -log( mean_{a != b} exp(cos(e_ka, e_kb) / tau) / mean_{a, j != k} exp(cos(e_ka, e_ja) / tau) )
    """
    directions, images, _ = effects.shape
    by_image = effects.transpose(0, 1)
    alike = _without_diagonal(cosines(effects, effects) / temperature)  # (directions, images, images)
    unlike = _without_diagonal(cosines(by_image, by_image) / temperature)  # (images, directions, directions)
    positives = alike.logsumexp((1, 2)) - math.log(images * (images - 1))
    negatives = unlike.logsumexp((0, 2)) - math.log(images * (directions - 1))
    return (negatives - positives).mean()


def _without_diagonal(logits: Tensor) -> Tensor:
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return logits.masked_fill(itself, -torch.inf)


def _one_way(
    anchors: Tensor, candidates: Tensor, same: Tensor, scale: Tensor | float, form: CsclForm
) -> Tensor:
    pair = torch.eye(*same.shape, dtype=torch.bool, device=same.device)
    positive = same if form == "supervised" else pair
    logits = (scale * cosines(anchors, candidates)).masked_fill(same & ~positive, -torch.inf)
    target = positive / positive.sum(1, keepdim=True)
    if form == "decoupled":
        return decoupled(logits, pair)
    if form == "hard":
        logits = hardened(logits, pair)
    return info_nce(logits, target)


def cross_modal_contrast(
    visual: Tensor, textual: Tensor, same: Tensor, scale: Tensor | float, form: CsclForm = "plain"
) -> Tensor:
    """CSCL: symmetric InfoNCE between the CLS states of the visual and the textual Q-Former, as CLIP's loss.

    `visual` (n, dim), `textual` (m, dim) with m >= n; `scale` is the inverse temperature. The second
    direction uses the first n columns, whose pairs are known. The paper's form is `plain`. The others are of
    the literature: `supervised` counts all images of a subject as positives; `decoupled` leaves the positive
    out of the softmax; `hard` weights similar negatives more; `adaptive` softens the softmax as pairs align
    (Huang et al., 2023, arXiv 2207.07874, eq. 5); `uniform` is alignment + uniformity, without a softmax.
    """
    n = len(visual)
    alignment = cosines(visual[:, None], textual[:n, None]).mean()
    if form == "uniform":
        apart = uniformity(visual, visual, same[:, :n]) + uniformity(textual[:n], textual, same)
        return 2 - 2 * alignment + apart / 2
    if form == "adaptive":
        scale = scale / (1 + alignment.detach().clamp(min=0))
    forward = _one_way(visual, textual, same, scale, form)
    return (forward + _one_way(textual[:n], visual, same[:, :n].T, scale, form)) / 2


def scaled(similarity: Tensor, same: Tensor) -> Tensor:
    """Similarities of appearance (n, m), stretched so that negatives cover [0, 1]; positives are 1. No
    gradient."""
    similarity = similarity.detach().float()
    negatives = similarity[~same]
    if not len(negatives):
        return torch.ones_like(similarity)
    low, high = negatives.min(), negatives.max()
    return torch.where(same, 1.0, (similarity - low) / (high - low).clamp(min=1e-6))


def appearance_contrast(
    anchors: Tensor,
    positives: Tensor,
    similarity: Tensor,
    same: Tensor,
    form: MaclForm = "soft",
    temperature: float = 0.1,
) -> Tensor:
    """MACL: InfoNCE between S+ of two views of a subject at every layer, scaled by how similar subjects
    look.

    `anchors` (layers, n, dim), `positives` (layers, m, dim), `similarity` (n, m) cosines of the images,
    any range. The paper does not say how the factor enters. With c the cosine of two S+ and S in [0, 1]
    the stretched similarity, the forms are: `soft` plain logits against the targets softmax(S / 0.2);
    `ratio` logits c / (S tau), S at least 0.2; `weight` c / tau + log w, w = (1 - S) / mean(1 - S) of the
    negatives; `product` S c / tau, which repels similar subjects most (the opposite of the paper's aim);
    `plain` c / tau.
    """
    cosine, appearance = cosines(anchors, positives), scaled(similarity, same)
    positive = torch.eye(*same.shape, dtype=torch.bool, device=same.device)
    target: Tensor = positive.float()
    if form == "ratio":
        logits = cosine / (appearance.clamp(min=0.2) * temperature)
    elif form == "weight":
        distance = (1 - appearance).masked_fill(same, 0.0)
        mean = distance.sum(1, keepdim=True) / (~same).sum(1, keepdim=True).clamp(min=1)
        weight = (distance + 1e-3) / (mean + 1e-3)
        logits = cosine / temperature + weight.masked_fill(same, 1.0).log()
    elif form == "product":
        logits = appearance * cosine / temperature
    else:
        logits = cosine / temperature
    if form == "soft":
        # other images of the subject are neither asked for nor forbidden
        target = (appearance / 0.2).masked_fill(same & ~positive, -torch.inf).softmax(1)
    return info_nce(_without_false_negatives(logits, same), target)
