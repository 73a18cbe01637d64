"""Drawing for the page: one pipeline is kept, images come one by one, with previews during the steps."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

from PIL import Image

from customize.app import generate
from customize.app.generate import GenerateConfig
from customize.embedded import GUIDANCE, is_embedded
from customize.errors import UserError

PREVIEWS = 5  # of an image


class Drawn(NamedTuple):
    """An image, or a preview of it, and how far the request is, from 0 to 1."""

    image: Image.Image
    is_preview: bool
    seed: int
    done: float


class Drawer:
    """Draws requests one after the other; keeps the pipeline of the last one."""

    def __init__(self) -> None:
        self.lock, self.key, self.pipe = threading.Lock(), None, None  # type: Any, Any, Any
        self.closed = threading.Event()

    def pipe_for(self, run: str, config: GenerateConfig) -> Any:
        """The pipeline of a run under settings that change it; loaded unless it is the last one's."""
        settings = tuple(config.lora), config.lora_scale, config.scheduler, config.dtype
        key = run, _version(run), bool(config.subject_images), settings
        if key != self.key:
            self.forget()
            self.pipe = generate.load(run, config)
            self.pipe.set_progress_bar_config(disable=True)
            self.key = key
        return self.pipe

    def forget(self) -> None:
        """Frees the memory of the pipeline."""
        import gc

        import torch

        self.key = self.pipe = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Ends what is being drawn, and waits for it."""
        self.closed.set()
        with self.lock:
            self.forget()

    def draw(
        self,
        run: str,
        prompt: str,
        seeds: Sequence[int],
        config: GenerateConfig,
        masks: Mapping[str, Image.Image] | None = None,
    ) -> Iterator[Drawn]:
        """Previews and images, in the order of the seeds. Ends early when the caller closes it. UserError as
        `customize generate`."""
        events: Queue = Queue()
        stop = threading.Event()
        work = threading.Thread(
            target=self._work, args=(events, stop, run, prompt, seeds, config, masks), daemon=True
        )
        work.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            stop.set()
            work.join()

    def _work(
        self,
        events: Queue,
        stop: threading.Event,
        run: str,
        prompt: str,
        seeds: Sequence[int],
        config: GenerateConfig,
        masks: Mapping[str, Image.Image] | None,
    ) -> None:
        try:
            with self.lock:
                generate.check_request(run, [prompt], config)
                generate.check_subjects(run, config)
                subjects = generate.subject_files(config.subject_images)
                pipe = self.pipe_for(run, config)
                if subjects:
                    from customize.prompts import check_words

                    check_words(prompt, subjects, pipe.adapter.has_words)
                if config.guidance_scale is None and is_embedded(generate.base_of(run)):
                    config.guidance_scale = GUIDANCE
                given = {"subject_masks": masks} if masks else {}
                for i, seed in enumerate(seeds):
                    on_step = self._previews(events, stop, config.num_inference_steps, seed, i, len(seeds))
                    images = generate.draw(
                        pipe, prompt, [seed], config, subjects, callback_on_step_end=on_step, **given
                    )
                    if stop.is_set() or self.closed.is_set():
                        break
                    events.put(Drawn(images[0], False, seed, (i + 1) / len(seeds)))
        except BaseException as error:  # raised again where the images are awaited
            events.put(error)
        finally:
            events.put(None)

    def _previews(
        self, events: Queue, stop: threading.Event, steps: int, seed: int, index: int, count: int
    ) -> Callable[[Any, int, Any, dict], dict]:
        """A callback of the pipeline that sends previews, and ends it when the request was cancelled."""
        every = max(steps // PREVIEWS, 1)

        def on_step(pipe: Any, step: int, t: Any, values: dict) -> dict:
            pipe._interrupt = stop.is_set() or self.closed.is_set()
            if step % every == every - 1 and step < steps - 1 and not stop.is_set():
                image = preview(pipe, values["latents"])
                if image is not None:
                    events.put(Drawn(image, True, seed, (index + (step + 1) / steps) / count))
            return values

        return on_step


def _version(run: str) -> float:
    """Changes when a run is trained anew."""
    info = Path(run) / "run.json"
    return info.stat().st_mtime if info.exists() else 0.0


def preview(pipe: Any, latents: Any) -> Image.Image | None:
    """The latents of a step as an image of at most 512 pixels; None for layouts other than (batch, channels,
    height, width)."""
    if latents.ndim != 4:
        return None
    vae = pipe.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    decoded = vae.decode((latents[:1] / vae.config.scaling_factor + shift).to(vae.dtype)).sample
    image = pipe.image_processor.postprocess(decoded.float(), output_type="pil")[0]
    image.thumbnail((512, 512))
    return image


def with_word(prompt: str, subject: str, word: str) -> str:
    """The prompt with `subject` (<s> or <s2>) before the first `word`; unchanged if it is there already."""
    if subject in prompt:
        return prompt
    if not word.strip():
        raise UserError(
            f"Write {subject} into the prompt where the subject is, or name its word, such as fox."
        )
    position = prompt.lower().find(word.strip().lower())
    if position < 0:
        raise UserError(
            f"The prompt does not have the word '{word.strip()[:40]}' that its images show: add it."
        )
    return f"{prompt[:position]}{subject} {prompt[position:]}"
