"""How much memory a run takes, from a simulation of its parts: no weights are read, nothing is computed."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from customize.backbones.base import Backbone
from customize.backbones.families import as_called
from customize.backbones.quantize import in_block
from customize.data.latents import all_keys
from customize.data.subject_images import SubjectData, SubjectImages
from customize.data.training_data import Preparation, TrainingData
from customize.tensor_checks import without_weights
from customize.trainers.methods.base import Method
from customize.trainers.optimizers import chosen
from customize.trainers.prepare import PRECISIONS, add_assistant, load_backbone
from customize.trainers.settings import ModelConfig, TrainConfig
from customize.trainers.simulation import Kind, Simulation, rounded, simulated

CONTEXT = 600_000_000  # bytes that CUDA and its libraries take beside torch's tensors; assumed
SLACK = 0.05  # share of torch's memory that lies idle between tensors; assumed
# bytes that an optimizer keeps for each trained number; Adafactor's rows and columns are next to nothing
OPTIMIZERS = {"adamw": 8.0, "adamw8bit": 2.03, "prodigy": 16.0, "adafactor": 0.1, "lion": 4.0}
OPTIMIZERS |= {"schedule_free_adamw": 8.0}
QUANTIZED = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5625}  # bytes for each weight, with their scales


@dataclass(frozen=True)
class RunPlan:
    """A run that is asked for: its method, its configurations, and its data as found on the disk."""

    method: type[Method]
    model: ModelConfig
    data: Any
    train: TrainConfig
    own: Any  # of the method
    source: Any

    def setting(self, name: str, default: Any = None) -> Any:
        """The value of a setting, or `default` where no configuration has it."""
        found = (getattr(part, name) for part in self.parts() if hasattr(part, name))
        return next(found, default)

    def parts(self) -> tuple[Any, ...]:
        return self.model, self.data, self.train, self.own

    def changed(self, **settings: Any) -> "RunPlan":
        """The run with other settings, whose names some configuration has."""
        model, data, train, own = (_with(part, settings) for part in self.parts())
        source = copy.copy(self.source)
        source.config = data
        if hasattr(source, "images"):  # class images are added to them
            source.images = list(source.images)
        return RunPlan(self.method, model, data, train, own, source)


def _with(part: Any, settings: dict[str, Any]) -> Any:
    names = {own.name for own in fields(part)}
    return replace(part, **{name: value for name, value in settings.items() if name in names})


@dataclass
class Phase:
    """A part of a run: the weights on the device by component, and what is made beside them, in bytes."""

    name: str
    weights: dict[str, int]
    others: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + sum(self.others.values())


@dataclass
class Estimate:
    """The memory of a run on one device, in bytes."""

    parameters: dict[str, int]  # by component
    trained: int  # parameters
    phases: list[Phase]
    linear: dict[str, tuple[int, int]]  # bytes and number of the linear layers' weights, by component
    cached: int = 0  # of encoded images and prompts: in main memory, and on disk with --cache_dir
    kind: Kind = "cuda"
    data_size: str = ""

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def overhead(self) -> int:
        """What CUDA takes beside tensors; 0 on a CPU."""
        return CONTEXT + int(SLACK * self.largest.total) if self.kind == "cuda" else 0

    @property
    def peak(self) -> int:
        return self.largest.total + self.overhead


@dataclass
class Simulated:
    """A run that is being simulated: what it has loaded so far, and the phases that were measured."""

    plan: RunPlan  # with the largest batches that are possible
    asked: RunPlan
    simulation: Simulation
    backbone: Backbone
    accelerator: Accelerator
    phases: list[Phase] = field(default_factory=list)
    cached: int = 0

    @property
    def precision(self) -> torch.dtype | None:
        return PRECISIONS.get(self.plan.train.mixed_precision)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast("cpu", self.precision or torch.bfloat16, enabled=self.precision is not None):
            yield


def estimate(
    plan: RunPlan,
    accelerator: Accelerator,
    kind: Kind = "cuda",
    check: Callable[[Method, TrainingData], None] | None = None,
) -> Estimate:
    """Simulates the run from loading to the last training step, on an NVIDIA GPU or on a CPU; `priced` adds
    the optimizer's state.

    UserError for what the real run refuses once its base model is loaded, also by `check`.
    """
    asked, plan = plan, plan.changed(**_worst_case(plan.own), smaller_resolutions=[])
    with without_weights():
        backbone = load_backbone(_unquantized(plan.model), plan.data, _as(accelerator, plan), empty=True)
        asked.data.resolution = plan.data.resolution  # as it is now known
        plan.method.check_base(backbone)
        plan.source.check(backbone)
        if plan.model.assistant_lora:
            add_assistant(backbone, plan.model.assistant_lora)
        with simulated(kind) as simulation:
            simulation.place(backbone)
            return _simulate(Simulated(plan, asked, simulation, backbone, accelerator), check)


def _as(accelerator: Accelerator, plan: RunPlan) -> Any:
    """What `load_backbone` asks an accelerator for, in the plan's precision."""
    return type(
        "Precision", (), {"mixed_precision": plan.train.mixed_precision, "device": accelerator.device}
    )


def _unquantized(model: ModelConfig) -> ModelConfig:
    """Quantized weights are counted, not made."""
    return replace(model, quantize="none", quantize_text_encoder="none")


def _worst_case(own: Any) -> dict[str, Any]:
    """Settings under which every batch is as large as the largest: two references, none left out."""
    found: dict[str, Any] = {name: 0.0 for name in ("dropout_text", "dropout_image", "dropout_both")}
    found["multi_reference_rate"] = 1.0 if getattr(own, "multi_reference_rate", 0) else 0.0
    return {name: value for name, value in found.items() if getattr(own, name, 0) not in (0, 1)}


def _simulate(run: Simulated, check: Callable[[Method, TrainingData], None] | None) -> Estimate:
    plan, backbone = run.plan, run.backbone
    plan.method.prepare_data(plan.source, backbone, plan.train, plan.own, run.accelerator)
    draw_class_images(run)
    method = plan.method(backbone, plan.own, plan.source.concepts)
    run.simulation.place(method)
    method.check_drawing(plan.train.validation_prompt)
    preparation = Preparation(plan.train.train_batch_size, None, plan.train.validation_prompt)
    data = plan.source.prepare(method, preparation)
    batch = first_batch(data, plan)
    count = {name: _count(module) for name, module in components(method).items()}
    linear = {name: _linear(module) for name, module in components(method).items()}
    if isinstance(data, SubjectData) and plan.model.cache_latents:
        batch = encode(run, method, data, batch)
    method.train()
    if plan.train.gradient_checkpointing:
        method.enable_gradient_checkpointing()
    trained = {id(p): p for _ in stages(run, method) for p in method.trainable().values()}
    run.phases.append(training(run, method, batch, [*trained.values()]))
    if plan.train.validation_prompt:
        run.phases.append(validation(run, method))
    if check:
        check(method, data)
    number = sum(p.numel() for p in trained.values())
    return Estimate(count, number, run.phases, linear, run.cached, run.simulation.kind, data.size)


def priced(found: Estimate, plan: RunPlan) -> Estimate:
    """The estimate with the optimizer's state, and with the linear layers of quantized components in their
    size."""
    state = math.ceil(OPTIMIZERS[chosen(plan.train)] * found.trained)
    phases = []
    for phase in found.phases:
        weights = dict(phase.weights)
        for name, (held, number) in found.linear.items():
            if name in weights and (scale := _quantization(plan, name)):
                weights[name] += int(scale * number) - held
        others = {k: state if k == "optimizer" else v for k, v in phase.others.items()}
        phases.append(Phase(phase.name, weights, others))
    return replace(found, phases=phases)


def stages(run: Simulated, method: Method) -> Iterator[int]:
    """The first and the last step, where a method may train different parts."""
    for step in (0, run.plan.train.max_train_steps - 1):
        method.on_step(step, run.plan.train.max_train_steps)
        yield step


def first_batch(data: TrainingData, plan: RunPlan) -> dict:
    """A batch of true images, read before the simulation."""
    with _disable_current_modes():
        plan.source.config.dataloader_num_workers = 0
        return next(iter(data.batches(0, plan.train.train_batch_size, plan.train.seed)))


# weights


def components(method: Method) -> dict[str, nn.Module]:
    """The parts of a method: those of the base model, the method's own modules, and what is trained."""
    backbone = method.backbone
    found: dict[str, Any] = {**backbone.components(), "vae": backbone.vae}
    if hasattr(method, "image_encoder"):
        found["image_encoder"] = method.image_encoder
    return found


def _held(module: nn.Module) -> list[Tensor]:
    return [*{id(own): own for own in (*module.parameters(), *module.buffers())}.values()]


def _count(module: nn.Module) -> int:
    """The parameters of a component that are not trained."""
    return sum(p.numel() for p in module.parameters() if not p.requires_grad)


def _linear(module: nn.Module) -> tuple[int, int]:
    """Bytes and number of the frozen weights that `--quantize` would pack."""
    linear = [part for name, part in module.named_modules() if isinstance(part, nn.Linear) and in_block(name)]
    own = {id(part.weight): part.weight for part in linear if not part.weight.requires_grad}.values()
    return sum(map(_bytes, own)), sum(weight.numel() for weight in own)


def weights_of(run: Simulated, method: Method | None) -> dict[str, int]:
    """Bytes of the weights on the device, by component; what is trained under a name of its own."""
    backbone, kind = run.backbone, run.simulation.kind
    parts: dict[str, nn.Module] = {**backbone.components(), "vae": backbone.vae}
    parts |= components(method) if method else {}
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in parts.items():
        own = [t for t in _held(module) if id(t) not in seen and not t.requires_grad]
        seen |= {id(tensor) for tensor in own}
        found[name] = sum(rounded(_bytes(tensor), kind) for tensor in own)
    rest = [t for t in _held(method or backbone) if id(t) not in seen and not t.requires_grad]
    if frozen := sum(rounded(_bytes(tensor), kind) for tensor in rest):
        found["other modules"] = frozen
    if method and (trained := sum(rounded(_bytes(p), kind) for p in method.parameters() if p.requires_grad)):
        found["trained"] = trained
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _quantization(plan: RunPlan, name: str) -> float:
    """Bytes for each weight of the linear layers of a component; 0 if it is not quantized."""
    names = {"unet": "quantize", "transformer": "quantize"}
    setting = "quantize_text_encoder" if name.startswith("text_encoder") else names.get(name, "")
    return QUANTIZED.get(getattr(plan.model, setting), 0.0) if setting else 0.0


# phases


def encode(run: Simulated, method: Method, data: SubjectData, batch: dict) -> dict:
    """Encodes one image and the prompts of the batch, frees what is not needed any more, and returns the
    batch as training gets it from the cache."""
    backbone, plan = run.backbone, run.plan
    with _disable_current_modes():
        for key in all_keys(data.dataset):  # a crop may lose its mask
            if data.dataset.images[key[0]].mask is not None:
                data.dataset[key]
    prompts = [] if method.trains_text else _prompts(method, plan, batch["prompt"])
    with run.simulation.measured() as tally:
        moments = backbone.moments(batch["pixels"][:1])
        if prompts:
            backbone.keep_prompts(prompts)
    weights = weights_of(run, method)
    if run.simulation.kind == "cuda":
        weights.pop(backbone.denoiser_name)  # it comes to the device when the text encoders have gone
    run.phases.append(Phase("encoding", weights, {"activations": tally.peak}))
    run.cached = int(_sizes(run.asked) * len([*all_keys(data.dataset)]) * sum(map(_bytes, moments.values())))
    if prompts:
        images = *plan.source.images, *plan.source.held_out
        captions = len({caption for image in images for caption in image.captions})
        largest = max(sum(map(_bytes, entry.values())) for entry in backbone.prompts.values())
        run.cached += (captions + len(prompts) - len(set(batch["prompt"]))) * largest
        backbone.release_text_encoders()
    shape = len(batch["pixels"]), *moments["mean"].shape[1:]
    rest = {name: value for name, value in batch.items() if name != "pixels"}
    mask = batch["mask"].new_ones(shape[0], 1, *shape[2:])
    return rest | {"mask": mask, "mean": torch.zeros(shape), "std": torch.ones(shape)}


def _sizes(plan: RunPlan) -> float:
    """How many latents of the full resolution an image's latents of all resolutions are as large as."""
    smaller = plan.setting("smaller_resolutions", [])
    return 1.0 + sum((side / plan.data.resolution) ** 2 for side in smaller)


def _prompts(method: Method, plan: RunPlan, captions: Sequence[str]) -> list[str]:
    return [*dict.fromkeys([*captions, *method.prompts(), *plan.train.validation_prompt, ""])]


def training(run: Simulated, method: Method, batch: dict, trained: list[nn.Parameter]) -> Phase:
    """The larger of the first and the last step, with what an optimizer keeps from the steps before."""
    weights, kind = weights_of(run, method), run.simulation.kind
    if isinstance(run.plan.source, SubjectImages) and run.plan.model.cache_latents:
        if not run.plan.train.validation_prompt:
            weights.pop("vae")  # it is moved to the CPU
        weights = {name: size for name, size in weights.items() if size}
    peak, gradients = max(step(run, method, batch) for _ in stages(run, method))
    sizes = [rounded(4 * p.numel(), kind) for p in trained]
    others = {"gradients": gradients, "optimizer": 0, "activations": max(peak - gradients, 0)}
    if run.plan.train.use_ema:
        others["running average"] = sum(sizes)
    held = sum(_bytes(value) for value in batch.values() if isinstance(value, Tensor))
    return Phase("training", weights, others | {"batch": held})


def step(run: Simulated, method: Method, batch: dict) -> tuple[int, int]:
    """One forward and backward pass: most bytes beside the weights, and bytes of the gradients."""
    batch = {k: run.simulation.taken_in(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with run.simulation.measured() as tally:
        with run.autocast():
            losses = method(batch)
        total = torch.stack([value.float() for value in losses.values()]).sum()
        total.backward()
        del losses, total
    parameters = [*method.parameters()]
    gradients = sum(_bytes(p.grad) for p in parameters if p.grad is not None)
    for parameter in parameters:
        parameter.grad = None
    return tally.peak, gradients


def draw_class_images(run: Simulated) -> None:
    """Adds the phase in which missing class images are drawn, if there are any."""
    missing = [
        image for image in getattr(run.plan.source, "images", []) if image.is_prior and not image.digest
    ]
    if not missing:
        return
    pipe, at_once = run.backbone.pipe, run.plan.own.sample_batch_size
    side = {"height": run.backbone.resolution, "width": run.backbone.resolution}
    generators = [torch.Generator() for _ in range(at_once)]
    arguments = {"prompt": [missing[0].caption] * at_once, "generator": generators, **side}
    arguments["num_inference_steps"] = 2
    pipe.set_progress_bar_config(disable=True)
    with run.simulation.measured() as tally, drawing(), run.autocast():
        pipe(**as_called(pipe, arguments))
    run.phases.append(Phase("class images", weights_of(run, None), {"activations": tally.peak}))


def validation(run: Simulated, method: Method) -> Phase:
    """Drawing one validation image; gradients are gone, the optimizer's state is not."""
    train, side = run.plan.train, run.backbone.resolution
    options = {"height": side, "width": side, "num_inference_steps": 2, "generator": torch.Generator()}
    if train.validation_guidance_scale is not None:
        options["guidance_scale"] = train.validation_guidance_scale
    method.eval()
    run.backbone.pipe.set_progress_bar_config(disable=True)
    with run.simulation.measured() as tally, drawing(), run.autocast(), run.backbone.without_assistant():
        method.draw(train.validation_prompt[0], **options)
    before = {k: v for k, v in run.phases[-1].others.items() if k in ("optimizer", "running average")}
    return Phase("validation images", run.phases[-1].weights, before | {"activations": tally.peak})


@contextmanager
def drawing() -> Iterator[None]:
    """Context in which a pipeline ends once its image is decoded: a simulated one has no pixels."""

    def decoded(self: Any, image: Any, *args: Any, **named: Any) -> list:
        return [image]

    with torch.no_grad(), patch.object(VaeImageProcessor, "postprocess", decoded):
        yield
