"""Text to ids: the real CLIP byte-pair vocabulary (packaged) and T5's sentencepiece.

All hand out plain id lists without padding; padding is `encoders.text`'s business, because SD3's CLIP-L pads with
49407 and its CLIP-G with 0, and a tokenizer told `pad_token="!"` (id 0) turns every "!" of a caption into padding.

Two readings of a text. Training captions are cleaned (mojibake, HTML entities), and special tokens written in them are
text. The releases read prompts as transformers' tokenizers do: nothing is repaired, "&amp;" stays five characters, and
a written "<|endoftext|>" or "</s>" is that token and ends the text. Released encoders therefore get the tokenizers
that say `cleaned=False` or `ReleasedT5Tokenizer`.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit.untrusted import read_bytes

TINY = Path(__file__).parent / "tiny"
BPE_FILE = TINY / "bpe_simple_vocab_16e6.txt.gz"

CLIP_VOCAB_SIZE = 49_408
CLIP_START, CLIP_END = 49_406, 49_407
CLIP_LENGTH = 77
T5_PAD, T5_END, T5_UNKNOWN = 0, 1, 2
_MOST_BYTES = 64 << 20  # of a tokenizer's file: T5's has 0.8 MB, the largest of 250,000 pieces 20
_READ = (".json", ".txt", ".model", ".jinja")  # files that transformers reads

# "a photo of a cat"; every load is checked against it, because transformers builds a near-empty vocabulary without
# an error where it is handed a file name it does not know (facts: libraries.md, 0.1).
_GOLDEN_TEXT, _GOLDEN_IDS = "a photo of a cat", [CLIP_START, 320, 1125, 539, 320, 2368, CLIP_END]


def clean(text: str) -> str:
    """Repair mojibake, undo HTML entities twice (as CLIP's training did), and collapse white space."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _encodable(texts: Sequence[str]) -> list[str]:
    """Return texts as a list.

    Raises:
        ValueError: one holds half of a surrogate pair, which is no character (a byte of a command line that is not
            UTF-8 becomes one, and so does "\\ud800" in a JSON file).
    """
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{text[:40]!r} is no text: at place {error.start} stands half of a surrogate pair "
                f"(U+{ord(text[error.start]):04X}); was it read in another encoding than it was written in?"
            ) from None
    return list(texts)


class ClipTokenizer:
    """CLIP's lower-cased byte-pair encoding. Source: Radford et al. 2021, arXiv:2103.00020, section 2.4.

    Args:
        path: None for the packaged vocabulary, else a folder in the Hugging Face layout.
        cleaned: read texts as training captions; False: as the releases read prompts, see the module's text.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: its files do not hold CLIP's vocabulary.
    """

    def __init__(self, path: str | Path | None = None, *, cleaned: bool = True) -> None:
        self.cleaned = cleaned
        self._tokenizer = _clip_from_package() if path is None else _clip_from_folder(Path(path))
        if len(self._tokenizer) != CLIP_VOCAB_SIZE or self([_GOLDEN_TEXT]) != [_GOLDEN_IDS]:
            raise ValueError(
                f"the CLIP tokenizer at {path or BPE_FILE} has {len(self._tokenizer)} entries and encodes "
                f"{_GOLDEN_TEXT!r} as {self([_GOLDEN_TEXT])[0]}; expected {CLIP_VOCAB_SIZE} and {_GOLDEN_IDS}. "
                f"Its files are incomplete: give a folder with tokenizer.json, or with vocab.json and merges.txt"
            )

    def __call__(self, prompts: Sequence[str]) -> list[list[int]]:
        """Encode: start, at most 75 tokens, end. Longer prompts keep their first 76 ids and the end token."""
        rows = self._encode(prompts)
        return [row if len(row) <= CLIP_LENGTH else [*row[: CLIP_LENGTH - 1], CLIP_END] for row in rows]

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt has before it is cut, start and end included."""
        return [len(row) for row in self._encode(prompts)]

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        # "<|endoftext|>" written in a caption is text: it must not end the caption early
        texts = [clean(prompt) for prompt in prompts] if self.cleaned else _encodable(prompts)
        rows = self._tokenizer(texts, truncation=False, split_special_tokens=self.cleaned, verbose=False)
        return list(rows["input_ids"])

    def save(self, folder: Path, *, pad_with_zero: bool = False) -> None:
        """Write the folder of a release: for transformers of today, and for those that read vocab.json and merges.txt.

        Args:
            pad_with_zero: say that padding is "!", id 0, as tokenizer_2 of SDXL and SD3 does.
        """
        from transformers import CLIPTokenizer

        model = json.loads(self._tokenizer.backend_tokenizer.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        pad_token = "!" if pad_with_zero else "<|endoftext|>"
        CLIPTokenizer(
            vocab=model["vocab"], merges=merges, pad_token=pad_token, model_max_length=CLIP_LENGTH
        ).save_pretrained(str(folder))
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")

    def id_to_piece(self, index: int) -> str:
        """Return the piece of one id; pieces that end a word end with "</w>"."""
        return self._tokenizer.convert_ids_to_tokens(index)


@lru_cache(maxsize=1)
def _clip_from_package() -> Any:
    from transformers import CLIPTokenizer

    lines = gzip.decompress(BPE_FILE.read_bytes()).decode("utf-8").split("\n")
    num_merges = CLIP_VOCAB_SIZE - 2 * 256 - 2
    merges = [tuple(line.split()) for line in lines[1 : num_merges + 1]]
    alphabet = _byte_alphabet()
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


def _byte_alphabet() -> list[str]:
    """One printable character for each byte: the byte itself where printable, else one from 256 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(c) for c in printable] + [chr(256 + i) for i in range(others)]


def _clip_from_folder(path: Path) -> Any:
    from transformers import CLIPTokenizer

    if not path.is_dir():
        raise FileNotFoundError(f"no tokenizer folder {path}; leave it out to use the packaged CLIP vocabulary")
    _check_sizes(path)
    try:
        loaded = CLIPTokenizer.from_pretrained(str(path), local_files_only=True)
        # SDXL's and SD3's tokenizer_2 make "!" a special token, to pad with it: every "!" of a prompt would be id 0
        model = json.loads(loaded.backend_tokenizer.to_str())["model"]
        return CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    except Exception as error:  # transformers and tokenizers raise what they like on a damaged file
        raise ValueError(
            f"{path} does not hold CLIP's tokenizer ({type(error).__name__}: {error!s:.300}); give a folder with "
            f"tokenizer.json, or with vocab.json and merges.txt, or leave it out to use the packaged vocabulary"
        ) from error


def _check_sizes(folder: Path) -> None:
    """Refuse a folder with a file that no tokenizer has, before it is read into memory.

    Raises:
        ValueError: naming it.
    """
    for file in folder.iterdir():
        if file.suffix not in _READ or file.is_dir():
            continue
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{file} is no regular file of at most {_MOST_BYTES:,} bytes, as those of tokenizers are")


class T5Tokenizer:
    """Sentencepiece with T5's special ids: pad 0, end 1, unknown 2; no start token.

    Args:
        path: a `spiece.model` file or a folder that holds one.
    """

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        path = Path(path)
        file = path / "spiece.model" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"no sentencepiece model {file}; ours is made by `python scripts/train_tiny_encoders.py`"
            )
        self._bytes = read_bytes(file, _MOST_BYTES)
        try:
            self._pieces = SentencePieceProcessor(model_proto=self._bytes)
        except RuntimeError as error:
            raise ValueError(f"{file} is no sentencepiece model ({error!s:.200})") from error
        special = (self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.unk_id())
        if special != (T5_PAD, T5_END, T5_UNKNOWN):
            raise ValueError(f"{file} has pad, end, unknown ids {special}; T5 needs {(T5_PAD, T5_END, T5_UNKNOWN)}")

    def __call__(self, prompts: Sequence[str], length: int) -> list[list[int]]:
        """Encode and append the end token; longer prompts keep their first `length - 1` ids and the end token."""
        # T5's own normalisation collapses white space; the rest of the text is taken as it is, case included.
        rows = self._pieces.encode([" ".join(prompt.split()) for prompt in _encodable(prompts)])
        return [[*row[: length - 1], T5_END] for row in rows]

    def __len__(self) -> int:
        return self._pieces.get_piece_size()

    def id_to_piece(self, index: int) -> str:
        """Return the piece of one id; word-initial pieces begin with U+2581."""
        return self._pieces.id_to_piece(index)

    @property
    def fingerprint(self) -> str:
        """Hash of the model file."""
        return hashlib.sha256(self._bytes).hexdigest()


class ReleasedT5Tokenizer:
    """T5's pieces as transformers cuts them: sentencepiece, and special tokens wherever they are written.

    Args:
        path: a `spiece.model` or `tokenizer.json` file, or a folder that holds one (a release's `tokenizer_3`).

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the file is not T5's.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        there = [name for name in ("spiece.model", "tokenizer.json") if (path / name).is_file()]
        if not (there if path.is_dir() else path.is_file()):
            raise FileNotFoundError(
                f"no T5 tokenizer at {path}: expected spiece.model or tokenizer.json of google/t5-v1_1-xxl, or a "
                f"folder that holds one (a release's tokenizer_3)"
            )
        self._tokenizer = _t5_from(path)
        special = tuple(getattr(self._tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "unk"))
        ids = self([_GOLDEN_TEXT], 99)[0]
        if special != (T5_PAD, T5_END, T5_UNKNOWN) or set(ids) <= {T5_UNKNOWN, T5_END}:
            raise ValueError(
                f"{path} is no T5 tokenizer: its pad, end and unknown ids are {special}, T5's are "
                f"{(T5_PAD, T5_END, T5_UNKNOWN)}, and it encodes {_GOLDEN_TEXT!r} as {ids}"
            )

    def __call__(self, prompts: Sequence[str], length: int) -> list[list[int]]:
        """Encode and append the end token; longer prompts keep their first `length - 1` ids and the end token."""
        rows = self._tokenizer(_encodable(prompts), truncation=False, verbose=False)["input_ids"]
        return [row if len(row) <= length else [*row[: length - 1], T5_END] for row in rows]

    def save(self, folder: Path) -> None:
        """Write the folder `tokenizer_3` of a release."""
        self._tokenizer.save_pretrained(str(folder))

    def __len__(self) -> int:
        return len(self._tokenizer)

    def id_to_piece(self, index: int) -> str:
        """Return the piece of one id; word-initial pieces begin with U+2581."""
        return self._tokenizer.convert_ids_to_tokens(index)

    @property
    def fingerprint(self) -> str:
        """Hash of the vocabulary and of the rules that cut a text."""
        return hashlib.sha256(self._tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _t5_from(path: Path) -> Any:
    """Build transformers' tokenizer; it reads folders only, and only files of the right name."""
    from transformers import T5Tokenizer as Reference

    with tempfile.TemporaryDirectory() as copy:
        folder = path
        if not path.is_dir():
            folder = Path(copy)
            name = "tokenizer.json" if path.suffix == ".json" else "spiece.model"
            (folder / name).write_bytes(read_bytes(path, _MOST_BYTES))
        else:
            _check_sizes(folder)
        try:
            return Reference.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers and protobuf raise what they like on a damaged file
            raise ValueError(f"{path} does not hold T5's spiece.model or tokenizer.json: {error}") from error


def train_t5_pieces(sentences: Sequence[str], path: str | Path, size: int = 1000, words: Sequence[str] = ()) -> None:
    """Train a unigram model of at most `size` pieces on `sentences` and write it to `path`.

    Source: Kudo 2018, arXiv:1804.10959. Deterministic: one thread, every sentence used.

    Args:
        words: each of them becomes one piece, whatever its frequency.
    """
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        user_defined_symbols=[f"\u2581{word}" for word in words],
        num_threads=1,
        pad_id=T5_PAD,
        eos_id=T5_END,
        unk_id=T5_UNKNOWN,
        bos_id=-1,
        minloglevel=2,
    )
    Path(path).write_bytes(model.getvalue())


def pad(rows: Sequence[Sequence[int]], value: int, length: int) -> Tensor:
    """Stack id lists into int64 [B, length], filling up with `value`."""
    out = torch.full((len(rows), length), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return out
