"""Learned words as outputs of the text encoders (ConES, He et al., 2023, arXiv 2305.18993): the vectors stand
in the text that the denoiser reads, not in the one that the text encoder reads."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5EncoderModel

from customize.adapters.words import OUTPUTS, LearnedWords, pieces
from customize.backbones.text import text_parts
from customize.errors import UserError
from customize.files import tensors_of
from customize.tensor_checks import check_finite

LAST = -1  # the encoder's own output, behind its last normalization


class OutputWords(LearnedWords):
    """`words` maps each placeholder to the word that it starts from, which the text encoder goes on to
    read in its place. Wherever the placeholder stands, the encoder's output is replaced by trained
    vectors, for each encoder whose output the denoiser attends to: (words * num_vectors, dim), float32.
    They start as what the encoder makes of the starting word in "a photo of a ..."."""

    files = (OUTPUTS,)
    backbone: Any

    def __init__(self, backbone: Any, words: dict[str, str], num_vectors: int = 1):
        super().__init__(backbone, words, num_vectors)
        self.vectors.requires_grad_(False)
        self.__dict__["backbone"] = backbone  # past nn.Module: it is no part of the adapter
        self.outputs = nn.ParameterDict()
        tokens = [piece for word in self.words for piece in pieces(word, num_vectors)]
        starts = self._starts()
        for name, (tokenizer, encoder, layer) in encoders_read(backbone.pipe).items():
            ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
            self.outputs[name] = nn.Parameter(torch.cat(starts[name]).float())
            replace_outputs(encoder, layer, ids, partial(self.outputs.__getitem__, name))

    @torch.no_grad()
    def _starts(self) -> dict[str, list[Tensor]]:
        """What each encoder makes of each word in "a photo of a ...", (num_vectors, dim), as the pipeline
        calls it."""
        found: dict[str, list[Tensor]] = {}
        with ExitStack() as stack:
            for name, (tokenizer, encoder, layer) in encoders_read(self.backbone.pipe).items():
                tokens = [piece for word in self.words for piece in pieces(word, self.num_vectors)]
                ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
                read = partial(_read, ids, layer, found.setdefault(name, []))
                hook = encoder.register_forward_hook(read, prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
            for word in self.words:
                self.backbone.encode_prompt([f"a photo of a {word}"])
        return found

    @torch.no_grad()
    def start_from(self, folder: Path, info: Mapping[str, Any]) -> None:
        """Also takes the outputs of a run that learned them; else they start as what the encoders make of its
        vectors."""
        super().start_from(folder, info)
        state = tensors_of(folder / OUTPUTS) if (folder / OUTPUTS).exists() else {}
        for name, starts in self._starts().items():
            found = [state.get(f"{word}.{name}", own) for word, own in zip(self.words, starts, strict=True)]
            self.outputs[name].copy_(torch.cat(found))

    def save(self, folder: Path) -> dict:
        split = {
            f"{word}.{name}": part
            for name, outputs in self.outputs.items()
            for word, part in zip(self.words, outputs.detach().split(self.num_vectors), strict=True)
        }
        save_file({key: value.float().cpu().contiguous() for key, value in split.items()}, folder / OUTPUTS)
        return super().save(folder)

    @staticmethod
    def load(folder: Path, info: Mapping[str, Any], pipe: DiffusionPipeline) -> None:
        if not (folder / OUTPUTS).exists():
            return
        state = tensors_of(folder / OUTPUTS)
        check_finite(state, folder / OUTPUTS)
        for word in info["words"]:
            for name, (tokenizer, encoder, layer) in encoders_read(pipe).items():
                outputs = state.get(f"{word}.{name}")
                if outputs is None or outputs.ndim != 2 or outputs.shape[1] != encoder.config.hidden_size:
                    raise UserError(
                        f"the learned word '{word}' does not fit this base model ('{name}' of its outputs); "
                        "load the base model it was trained on."
                    )
                ids = torch.tensor(tokenizer.convert_tokens_to_ids(pieces(word, len(outputs))))
                replace_outputs(encoder, layer, ids, partial(_itself, outputs.to(encoder.device)))


def _hidden(output: Any, layer: int) -> Tensor:
    return output.last_hidden_state if layer == LAST else output.hidden_states[layer]


def _read(
    ids: Tensor, layer: int, found: list[Tensor], module: Any, args: tuple, kwargs: dict, output: Any
) -> None:
    asked = args[0] if args else kwargs["input_ids"]
    found.append(_hidden(output, layer)[torch.isin(asked, ids.to(asked.device))])


def _itself(outputs: Tensor) -> Tensor:
    return outputs


def encoders_read(pipe: DiffusionPipeline) -> dict[str, tuple[Any, Any, int]]:
    """The text encoders to whose output the denoiser attends, by their names in files: tokenizer, encoder,
    and which of its hidden states that is."""
    parts = list(zip(*text_parts(pipe), strict=True))
    clip = [part for part in parts if not isinstance(part[1], T5EncoderModel)]
    t5 = [part for part in parts if isinstance(part[1], T5EncoderModel)]
    found = {name: (*part, LAST) for name, part in zip(("t5",), t5, strict=False)}
    if found and len(clip) == 1:  # Flux: of CLIP it reads the pooled output alone
        return found
    layer = -2 if len(clip) > 1 else LAST
    return {name: (*part, layer) for name, part in zip(("clip_l", "clip_g"), clip, strict=False)} | found


def replace_outputs(encoder: Any, layer: int, ids: Tensor, outputs: Callable[[], Tensor]) -> None:
    """Makes a text encoder's hidden state number `layer` hold `outputs()` (words, dim) wherever one of `ids`
    (words,) stands; gradients flow into it."""

    def replace(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        asked = args[0] if args else kwargs["input_ids"]
        found = asked.unsqueeze(-1) == ids.to(asked.device)
        known = found.any(-1, keepdim=True)
        if known.any():
            hidden, vectors = _hidden(output, layer), outputs().to(asked.device)
            made = torch.where(known, (found.to(vectors.dtype) @ vectors).to(hidden.dtype), hidden)
            if layer == LAST:
                output["last_hidden_state"] = made
            else:
                states = output.hidden_states
                output["hidden_states"] = (*states[:layer], made, *states[layer + 1 :])
        return output

    encoder.register_forward_hook(replace, with_kwargs=True)
