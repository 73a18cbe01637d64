"""CustomContrast: an encoder that needs no tuning, trained by contrast between subjects (Chen et al.,
2025, arXiv 2409.05606).

L = L_LDM + lambda_1 L_CSCL + lambda_2 L_MACL. CSCL makes the visual and the textual Q-Former agree on the
subject. MACL makes S+ of two views of a subject similar at every layer, and S+ of two subjects as
different as they look. There is no public code; weights, temperatures and all that the paper leaves open
are choices of this project and have flags. The default weights and form measured best on the embedded
base model. `--holdout` logs the gradient of each contrast relative to that of the diffusion loss: MACL's
is up to two fifths in the first steps and a fifth later. The ratio form needs a tenth of the weight for
that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from customize.adapters.attention import TextGate
from customize.adapters.encoders.output import Encoded
from customize.adapters.subject import SubjectAdapter, multimodal
from customize.backbones.base import Condition, Step
from customize.config import check_ranges, option
from customize.errors import UserError
from customize.losses.contrastive import (
    CsclForm,
    MaclForm,
    appearance_contrast,
    cosines,
    cross_modal_contrast,
    gathered,
)
from customize.randomness import fixed_randomness
from customize.trainers.methods.contrast_diagnostics import (
    appearance_correlation,
    gradient_ratios,
    view_retrieval,
    write_similarity,
)
from customize.trainers.methods.encoder_method import SubjectConfig, SubjectMethod, of_subjects


@dataclass
class CustomContrastConfig(SubjectConfig):
    initializer_token: str = option("photo", "the word that S+, the subject's pseudo-words, starts from")
    cscl_weight: float = option(
        0.005, "weight of CSCL, the contrast between visual and textual CLS; 0 is off", least=0
    )
    cscl_form: CsclForm = option("plain", "form of CSCL, the contrast between visual and textual CLS")
    macl_weight: float = option(
        0.005, "weight of MACL, the contrast between two views' S+ (pseudo-words); 0 is off", least=0
    )
    macl_form: MaclForm = option(
        "soft", "how the similarity of two subjects' images enters MACL, the contrast between views"
    )
    macl_temperature: float = option(0.1, "temperature of the MACL softmax", above=0)
    contrast_warmup: float = option(
        0.1, "share of the steps in which the weights of CSCL and MACL rise from 0", least=0, most=1
    )
    queue_size: int = option(
        0,
        "samples of earlier batches used as negatives of CSCL and MACL, for small batches; empty on resuming",
        least=0,
    )
    words: bool = option(True, "S+: a pseudo-word of the subject for each block of cross-attention layers")
    fusion: bool = option(True, "refine the visual tokens by S+, the subject's pseudo-words")
    location: bool = option(True, "a map in every cross-attention layer of where the subject belongs")
    text_gate: TextGate = option(
        "none", "how location maps gate the text branch: not at all, by the same map, or by its complement"
    )
    dim: int = option(768, "width of the encoder's Q-Formers", least=1)
    depth: int = option(4, "blocks of each Q-Former of the encoder", least=1)
    heads: int = option(12, "attention heads of the encoder's Q-Formers", least=1)
    visual_queries: int = option(16, "visual tokens of a subject", least=1)
    feature_layers: int = option(4, "layers of the image encoder that the visual branch reads", least=1)
    time_bins: int = option(10, "denoising times that S+ tells apart", least=1)


PARTS = ("words", "fusion", "location")


SIZES = ("dim", "depth", "heads", "visual_queries", "feature_layers", "time_bins")


@dataclass
class ContrastiveCondition(Condition):
    """A condition with the inputs of the contrasts: both views of each first subject encoded, and the
    image encoder's embedding of the cut-out view."""

    views: tuple[Encoded, Encoded] | None = None
    image_embeds: Tensor | None = None


class CustomContrast(SubjectMethod):
    Config = CustomContrastConfig
    embedded_defaults = SubjectMethod.embedded_defaults | {"heads": 6, "feature_layers": 3}

    def __init__(self, backbone, config: CustomContrastConfig, concepts=()):
        super().__init__(backbone, config, concepts)
        if config.words and not self.adapter.has_words:
            raise UserError(
                "--pretrained_adapter: a released IP-Adapter has no S+ to go on from; train ip_adapter "
                "with it."
            )
        if not config.words and (config.cscl_weight or config.macl_weight):
            raise UserError("--no_words leaves nothing to contrast: add --cscl_weight 0 --macl_weight 0.")
        if config.cscl_weight:
            self.log_scale = torch.nn.Parameter(torch.tensor(1 / 0.07).log())
        self.queue: dict[str, Tensor] = {}
        self.ramp = 1.0

    def make_adapter(self) -> SubjectAdapter:
        config = self.config
        check_ranges(config)
        sizes = {name: getattr(config, name) for name in (*PARTS, *SIZES)}
        return multimodal(
            self.backbone.pipe, self.image_encoder, config.initializer_token, config.text_gate, **sizes
        )

    def on_step(self, step: int, steps: int) -> None:
        warmup = self.config.contrast_warmup * steps
        self.ramp = min(1.0, step / warmup) if warmup else 1.0

    @property
    def contrasts(self) -> bool:
        return bool(self.config.cscl_weight or self.config.macl_weight)

    def condition(self, batch: dict, t: Tensor) -> Condition:
        adapter, present, both = self.adapter, batch["present"], self.uses_both()
        used = 2 if both or self.contrasts else 1
        output = self.image_encoder(batch["references"][present][:, :used].flatten(0, 1))
        features, times = adapter.encoder.read(output).unflatten(0, (-1, used)), of_subjects(t, present)
        # the second view at a time of its own: S+ could tell pairs by the time that they share
        other = of_subjects(self.draw_times(len(t)), present) if self.training and self.contrasts else times
        views = [
            self.encode(features[:, i : i + 1], (times, other)[i])
            for i in range(2 if self.contrasts else 1 - both)
        ]
        shows_target = of_subjects(batch["shows_target"], present)
        encoded = (self.encode(features, times, shows_target) if both else views[0]).spread(present)
        no_text, no_image = self.dropped(len(present))
        injected = adapter.injected(
            encoded, (present & ~no_image[:, None]).float(), regions=self.regions_of(batch)
        )
        prompts = self.prompts_of(batch, no_text)
        if adapter.has_words:
            texts = self.texts(prompts, adapter.word_vectors(encoded, present.float()))
            texts = self.without_text(texts, no_text, dim=1)
            injected.block_texts = texts["encoder_hidden_states"]
            text = {name: value[adapter.text_blocks // 2] for name, value in texts.items()}
        else:
            text = self.without_text(self.backbone.encode_prompt(prompts), no_text)
        if not self.contrasts:
            return ContrastiveCondition(text, injected)
        first = torch.arange(present.shape[1], device=present.device).expand_as(present)[present] == 0
        compared = [view.each(lambda value: value[first]) for view in views]
        image_embeds = output.image_embeds[1::2][first]
        return ContrastiveCondition(
            text, injected, views=(compared[0], compared[1]), image_embeds=image_embeds
        )

    def texts(self, prompts: list[str], vectors: list[Tensor]) -> dict[str, Tensor]:
        """The denoiser's text arguments with S+ of each block in the prompts, (text_blocks, samples,
        ...)."""
        arguments = (
            self.backbone.encode_prompt,
            self.backbone.tokenizers,
            self.backbone.text_encoders,
            prompts,
            vectors,
        )
        if self.recomputes_text:
            return checkpoint(self.adapter.texts, *arguments, use_reentrant=False)
        return self.adapter.texts(*arguments)

    def losses(self, step: Step) -> dict[str, Tensor]:
        return super().losses(step) | (self.contrast(step) if self.contrasts else {})

    def contrast(self, step: Step) -> dict[str, Tensor]:
        """Both contrasts, over the samples of all processes and of the queue."""
        config, condition = self.config, cast(ContrastiveCondition, step.condition)
        anchor, positive = cast(tuple[Encoded, Encoded], condition.views)
        rows = {
            "anchor": gathered(stacked_words(anchor)),
            "positive": gathered(stacked_words(positive)),
            "visual": gathered(cast(Tensor, anchor.visual_cls)),
            "textual": gathered(cast(Tensor, anchor.textual_cls)),
            "image_embeds": gathered(cast(Tensor, condition.image_embeds)),
            "identity": gathered(step.batch["identity"]),
        }
        columns = {
            name: torch.cat([value, self.queue[name]]) if name in self.queue else value
            for name, value in rows.items()
        }
        if len(columns["identity"]) == 1 and not config.queue_size:
            raise UserError(
                "--train_batch_size 1 gives the contrasts no others: raise it, or add --queue_size 256."
            )
        same = rows["identity"][:, None] == columns["identity"]
        terms = {}
        if config.cscl_weight:
            scale = self.log_scale.exp().clamp(max=100)
            loss = cross_modal_contrast(rows["visual"], columns["textual"], same, scale, config.cscl_form)
            terms["cscl"] = self.ramp * config.cscl_weight * loss
        if config.macl_weight:
            layers = rows["anchor"].transpose(0, 1), columns["positive"].transpose(0, 1)
            similarity = cosines(rows["image_embeds"], columns["image_embeds"])
            loss = appearance_contrast(*layers, similarity, same, config.macl_form, config.macl_temperature)
            terms["macl"] = self.ramp * config.macl_weight * loss
        if config.queue_size and self.training:
            self.queue = {name: value[: config.queue_size].detach() for name, value in columns.items()}
        return terms

    def diagnose(self, batches: list[dict], folder: Path, step: int) -> dict[str, float]:
        """Also retrieval of S+ by CLS states across modalities, of views by Z for every block, its rank
        correlation with the similarity of images, and the terms' gradients."""
        found = super().diagnose(batches, folder, step)
        if not self.contrasts:
            return found
        with torch.no_grad():
            middle = [torch.full_like(batch["identity"], 0.5, dtype=torch.float) for batch in batches]
            found_all = [self.condition(*pair) for pair in zip(batches, middle, strict=True)]
        conditions = cast(list[ContrastiveCondition], found_all)
        first, second = (
            torch.cat([stacked_words(cast(tuple, c.views)[i]) for c in conditions]).transpose(0, 1)
            for i in range(2)
        )
        image_embeds = torch.cat([cast(Tensor, c.image_embeds) for c in conditions])
        identity = torch.cat([batch["identity"] for batch in batches])
        visual, textual = (
            torch.cat([cast(Tensor, getattr(cast(tuple, c.views)[0], name)) for c in conditions])[None]
            for name in ("visual_cls", "textual_cls")
        )
        [found["cross-modal retrieval"]] = view_retrieval(visual, textual, identity)
        retrieved = view_retrieval(first, second, identity)
        found |= {f"retrieval block {i}": share for i, share in enumerate(retrieved)}
        found |= {
            "retrieval": sum(retrieved) / len(retrieved),
            "spearman": appearance_correlation(first, second, image_embeds, identity),
        }
        write_similarity(folder, step, first, second, image_embeds)
        with torch.enable_grad(), fixed_randomness(0):
            parameters = [p for p in self.adapter.encoder.parameters() if p.requires_grad]
            return found | gradient_ratios(self(batches[0]), parameters)


def stacked_words(encoded: Encoded) -> Tensor:
    """Z: the offset of S+ from its starting word in every block, over all text encoders, (batch,
    text_blocks, dim)."""
    return torch.cat(encoded.words, -1)
