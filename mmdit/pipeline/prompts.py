"""Prompts against the encoders' lengths: which words are cut, said once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mmdit.encoders.text import TextEncoders, clip_lengths, t5_lengths
from mmdit.encoders.tokenizers import CLIP_LENGTH

logger = logging.getLogger(__name__)


def cut_words(text: TextEncoders, prompt: str) -> dict[str, str]:
    """Return what each encoder does not read of a prompt: {encoder: the words cut}, only encoders that cut.

    CLIP reads 75 tokens between start and end token, T5 `t5_length - 1` before its end token. Neither vocabulary joins
    words, so tokens are counted word by word.
    """
    words, cut = prompt.split(), {}
    for name, tokenizer in text.tokenizers.items():
        if name not in text.towers:
            continue
        if name == "t5":
            room, counts = text.t5_length - 1, [len(tokenizer([word], 10_000)[0]) - 1 for word in words]
        else:
            room, counts = CLIP_LENGTH - 2, [len(tokenizer([word])[0]) - 2 for word in words]
        for place, count in enumerate(counts):
            room -= count
            if room < 0:
                cut[name] = " ".join(words[place:])
                break
    return cut


class CutWarning:
    """Say once per pipeline that prompts are cut, naming the words of the first one."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self, text: TextEncoders, prompts: Sequence[str]) -> None:
        """Look at prompts that fill an encoder and warn about the first that overflows."""
        if self.said:
            return
        different = list(dict.fromkeys(prompts))
        ids = {name: rows for name, rows in text.tokenize(different).items() if name in text.towers}
        real = {name: t5_lengths(rows) if name == "t5" else clip_lengths(rows) for name, rows in ids.items()}
        for place, prompt in enumerate(different):
            full = any(int(real[name][place]) == ids[name].shape[1] for name in ids)
            cut = cut_words(text, prompt) if full else {}
            if cut:
                parts = "; ".join(f"{name} does not read {words!r}" for name, words in cut.items())
                logger.warning(
                    "prompt %r is longer than the encoders read: %s. Said once; a longer t5_length reads on in T5",
                    prompt if len(prompt) <= 60 else f"{prompt[:57]}...",
                    parts,
                )
                self.said = True
                return
