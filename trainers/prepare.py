"""What happens once before training: pictures of the class are made, and all that never changes is encoded and kept."""

import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from customize.backbone import Backbone
from customize.cache import TensorCache, fingerprint, key_of
from customize.data import Bucket, Concept, DataConfig, Key, SubjectDataset, collate, to_device
from customize.errors import UserError, shortened
from customize.output import save_image
from customize.pictures import Picture, find_pictures
from customize.trainers.method import Method


def class_pictures(
    backbone: Backbone,
    concept: Concept,
    index: int,
    folder: Path,
    count: int,
    config: DataConfig,
    seed: int,
    batch_size: int = 4,
) -> list[Picture]:
    """The concept's prior pictures. What `folder` lacks of `count` is drawn by the base model from the class prompt,
    so call this before any adapter is added. Pictures that are there already are used as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    read = partial(
        find_pictures,
        folder,
        concept.class_prompt,
        index,
        True,
        config.strict,
        config.max_pixels,
        allow_outside_files=config.allow_outside_files,
    )
    have = read() if any(not path.name.startswith(".") for path in folder.iterdir()) else []
    pipe = backbone.pipe
    pipe.set_progress_bar_config(disable=True)
    free = (i for i in itertools.count() if not (folder / f"class-{i:05d}.png").exists())
    wanted = list(itertools.islice(free, max(count - len(have), 0)))
    batches = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
    for numbers in tqdm(batches, desc=f"class pictures of '{concept.class_prompt}'"):
        generators = [torch.Generator().manual_seed(seed + i) for i in numbers]
        options = {"height": config.resolution, "width": config.resolution, "generator": generators}
        pictures = pipe([concept.class_prompt] * len(numbers), **options).images
        for i, picture in zip(numbers, pictures, strict=True):
            save_image(picture, folder / f"class-{i:05d}.png")
    return (have if len(have) >= count else read())[:count]


def read_pictures(concepts: list[Concept], config: DataConfig) -> list[Picture]:
    """The instance pictures of all concepts."""
    return [
        picture
        for i, concept in enumerate(concepts)
        for picture in find_pictures(
            concept.instance_data_dir,
            concept.instance_prompt,
            i,
            False,
            config.strict,
            config.max_pixels,
            allow_outside_files=config.allow_outside_files,
        )
    ]


class LatentDataset(Dataset):
    """A `SubjectDataset` whose pictures were encoded: items hold the latents' `mean` and `std` in place of `pixels`, and
    the mask at the latents' size."""

    def __init__(self, dataset: SubjectDataset, backbone: Backbone, cache: TensorCache):
        self.pictures, self.config, self.bucket_of = dataset.pictures, dataset.config, dataset.bucket_of
        self.model = key_of("latents", fingerprint(backbone.vae))
        self.items = {
            key: self._encode(dataset, key, backbone, cache) for key in tqdm(list(all_keys(dataset)), desc="encoding pictures")
        }

    def _encode(self, dataset: SubjectDataset, key: Key, backbone: Backbone, cache: TensorCache) -> dict:
        index, bucket, flip = key
        item = dataset[key]

        def moments():
            return {name: value[0].cpu() for name, value in backbone.moments(item["pixels"][None].to(backbone.device)).items()}

        name = key_of(self.model, dataset.pictures[index].digest, bucket, flip)
        latent = cache.get(name, moments)
        mask = F.interpolate(item.pop("mask")[None], size=latent["mean"].shape[-2:], mode="area")[0]
        item.pop("pixels")
        return item | {"mask": mask, **latent}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Key) -> dict:
        return self.items[key]


def all_keys(dataset: SubjectDataset) -> Iterable[Key]:
    """Every key that `Batches` can ask for: prior pictures are cropped to the buckets of their concept's instances."""
    used: dict[int, set[Bucket]] = {}
    for i, picture in enumerate(dataset.pictures):
        if not picture.is_prior:
            used.setdefault(picture.concept, set()).add(dataset.bucket_of(i))
    for i, picture in enumerate(dataset.pictures):
        for bucket in sorted(used[picture.concept]) if picture.is_prior else [dataset.bucket_of(i)]:
            for flip in (False, True) if dataset.config.random_flip else (False,):
                yield i, bucket, flip


def held_out_batches(dataset: SubjectDataset | LatentDataset, device: torch.device) -> list[dict]:
    """One batch for each held-out picture, on the device."""
    items = [dataset[i, dataset.bucket_of(i), False] for i in range(len(dataset))]
    return [to_device(collate([item]), device) for item in items]


def cache_text(method: Method, pictures: Iterable[Picture], validation_prompts: list[str], cache: TensorCache) -> None:
    """Encodes every prompt that training will ask for, and frees the text encoders, if training leaves them as they are."""
    if method.trains_text:
        return
    prompts = [*(picture.caption for picture in pictures), *method.prompts(), *validation_prompts, ""]
    method.backbone.cache_prompts(prompts, cache)
    method.backbone.release_text_encoders()


def check_lengths(backbone: Backbone, prompts: dict[str, str]) -> None:
    """UserError for a prompt that is too long for the text encoder, by what it is called."""
    tokenizer = backbone.tokenizers[0]
    for name, prompt in prompts.items():
        length, limit = len(tokenizer(prompt).input_ids), tokenizer.model_max_length
        if length > limit:
            raise UserError(f"the {name} has {length} tokens, more than {limit}: shorten '{shortened(prompt)}'.")


def check_captions(method: Method, pictures: Iterable[Picture]) -> None:
    """UserError for a caption that is too long with the words being learned, or has none of them."""
    words = method.tokens.words if method.tokens is not None else []
    for picture in pictures:
        check_lengths(method.backbone, {f"caption of '{picture.path}'": picture.caption})
        if words and not picture.is_prior and not any(word in picture.caption for word in words):
            caption, needed = shortened(picture.caption), " or ".join(words)
            raise UserError(f"--instance_prompt: the caption '{caption}' of '{picture.path}' does not contain {needed}.")
