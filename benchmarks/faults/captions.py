"""F11: captions of every kind on their whole way: file, cleaner, tokenizers, encoders; ids against open_clip's."""

from __future__ import annotations

import io
import json
import logging
import random
import tarfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import Outcome
from benchmarks.faults.pictures import encoded, noisy

HARD = [
    "", " \t\n", "!", "a" * 10_000, "word " * 2_500, "nul\0inside",
    "\ufeffbom first", "bom \ufeffwithin", "\x07\x1b[31mred",
    "قطة سوداء على السرير", "חתול שחור", "\u202ereversed\u202c", "猫と犬が公園で遊ぶ",
    "हिन्दी में एक वाक्य", "ภาษาไทยไม่มีช่องว่าง",
    "👩🏽‍🚒 firefighter", "🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿 flags", "👨‍👩‍👧‍👦" * 50,
    "e\u0301 combining", "a" + "\u0301" * 500, "ｆｕｌｌ ｗｉｄｔｈ", "ﬁ ½ №5 ẞ",
    "mojibake: schÃ¶n", "Tom &amp; Jerry &lt;3", "&amp;amp;lt;b&gt;", "<b>bold</b> <script>x</script>",
    "&#x41;&#0;&#1114112;",
    "<|endoftext|> a cat", "<|startoftext|>", "</s><pad><extra_id_0>", "\u2028line\u2029paragraph",
    "a\u00a0b\u3000c\u200bd",
    "\ue000\uf8ff private", "\U0010ffff last", "\ufffe\uffff", "'; DROP TABLE captions; --", "../../etc/passwd",
    "%s %d {0} ${x}",
    "don't stop, it's what we'll do", "3.14159 x 100% = 5", "“quotes” – dash…",
    "i̇stanbul İSTANBUL", "ǅ ǆ Ǆ", "\r\n\r\n", "-1e999",
]  # fmt: skip


def run_captions(folder: Path, full: bool) -> Outcome:
    """F11."""
    logging.disable(logging.WARNING)  # the reasons are counted
    chance = random.Random(11)
    texts, count = _fuzzed(chance, 1000 if full else 150), 200
    began = time.process_time()
    files = _through_files(folder, chance, 1000 if full else 150)
    ids = _through_tokenizers(texts, folder)
    golden = _against_open_clip(chance, count)
    logging.disable(logging.NOTSET)
    wrong = [*files["wrong"], *ids["wrong"], *golden["wrong"], *_cleaner()]
    return Outcome(
        not wrong,
        f"{files['files']:,} caption files of random bytes: {files['taken']:,} taken, {files['refused']:,} refused "
        f"with name and reason; {len(texts):,} texts through the cleaner, {ids['tokenizers']} tokenizers and encoders: "
        f"{len(ids['wrong'])} crashes; ids of {golden['texts']} texts: {golden['equal']} equal open_clip's",
        {
            "files": files, "texts": ids, "open_clip": golden, "wrong": wrong,
            "cpu_seconds": round(time.process_time() - began, 1),
        },
    )  # fmt: skip


def _fuzzed(chance: random.Random, count: int) -> list[str]:
    """Return texts of random characters of all planes, lone surrogates among them, and cut and joined hard ones."""
    planes = ((32, 126), (0, 31), (0x80, 0x24F), (0x590, 0x6FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0xD800, 0xDFFF),
              (0xE000, 0xF8FF), (0x200B, 0x206F), (0x300, 0x36F), (0xF0000, 0x10FFFF))  # fmt: skip
    found = list(HARD)
    while len(found) < count:
        if chance.random() < 0.3:
            a, b = chance.choice(HARD)[:2000], chance.choice(HARD)[:2000]
            found.append(a[: chance.randrange(len(a) + 1)] + b[chance.randrange(len(b) + 1) :])
        else:
            picked = chance.choices(planes, k=chance.choice((1, 2, 4)))
            found.append("".join(chr(chance.randint(*chance.choice(picked))) for _ in range(chance.choice((1, 9, 90)))))
    return found[:count]


def _through_files(folder: Path, chance: random.Random, count: int) -> dict[str, Any]:
    """Write captions of random bytes beside pictures and into a tar's JSON; each is a text or has a reason."""
    from mmdit.config import ImagesConfig, ShardsConfig
    from mmdit.data.images import ImagesDataset, validate
    from mmdit.data.shards import ShardsDataset

    place, wrong = folder / "captions", []
    place.mkdir()
    picture = encoded(_picture(), "PNG")
    for i in range(count):
        text = chance.choice(HARD)[:3000].encode("utf-8", "surrogatepass")
        kind = i % 6
        content = {
            0: chance.randbytes(chance.randrange(60)), 1: b"\xef\xbb\xbf" + text, 2: text.decode().encode("utf-16"),
            3: text.decode().encode("latin-1", "replace"), 4: text, 5: text[: chance.randrange(len(text) + 1)],
        }[kind]  # fmt: skip
        (place / f"{i:04d}.png").write_bytes(picture)
        (place / f"{i:04d}.txt").write_bytes(content)
    config = ImagesConfig(source=str(place), resolution=8, on_error="skip", val_fraction=0.0)
    seen, refused = validate(config, folder / "rejects.jsonl")
    lines = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    wrong += [f"{line}: no reason" for line in lines if not (line["item"] and line["reason"])]
    captions = ImagesDataset(config, "train").captions(range(seen - refused))
    wrong += [f"an empty caption was taken: {c!r}" for c in captions if not c.strip()]
    wrong += [f"no clean text: {c!r:.40}" for c in captions if c.startswith("\ufeff") or not _is_text(c)]
    with tarfile.open(folder / "a.tar", "w") as tar:
        texts = ["fine", "\ud800 lone", "", None, 5, ["a"], *HARD[:12]]
        for i, text in enumerate(texts):
            for name, data in ((f"{i}.png", picture), (f"{i}.json", json.dumps({"text": text}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shards = ShardsConfig(source=str(folder / "a.tar"), resolution=8, on_error="skip", val_fraction=0.0, lanes=1)
    found = ShardsDataset(shards, "train").captions(range(len(texts)))
    wrong += [f"the tar gave {c!r:.40}" for c in found if not isinstance(c, str) or not c.strip() or not _is_text(c)]
    return {"files": count, "taken": seen - refused, "refused": refused, "in_a_tar": len(texts), "wrong": wrong}


def _picture() -> Any:
    from PIL import Image

    return Image.fromarray(noisy(8, 8))


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _through_tokenizers(texts: list[str], folder: Path) -> dict[str, Any]:
    """Read every text by every tokenizer and run the encoders on all: ids in range, states finite, or a ValueError."""
    from mmdit.encoders.text import load_text_encoders
    from mmdit.encoders.tokenizers import CLIP_END, CLIP_START, TINY, ClipTokenizer, ReleasedT5Tokenizer, T5Tokenizer

    clip = {"clip, cleaned": ClipTokenizer(), "clip, released": ClipTokenizer(cleaned=False)}
    t5 = {"t5": T5Tokenizer(TINY), "t5, released": ReleasedT5Tokenizer(TINY)}
    wrong, refused = [], 0
    for text in texts:
        for name, tokenizer in (*clip.items(), *t5.items()):
            try:
                (ids,) = tokenizer([text]) if name in clip else tokenizer([text], 77)
            except ValueError as error:  # a text that is none: half a surrogate pair
                refused += 1
                if _is_text(text) or "surrogate" not in str(error):
                    wrong.append(f"{name}: {text[:20]!r}: {error!s:.80}")
                continue
            except Exception as error:  # the finding
                wrong.append(f"{name}: {text[:20]!r}: {type(error).__name__}: {error!s:.80}")
                continue
            good = ids[0] == CLIP_START and ids[-1] == CLIP_END if name in clip else ids[-1] == 1
            if not good or not 2 * (name in clip) <= len(ids) <= 77:
                wrong.append(f"{name}: {text[:20]!r}: ids {ids[:5]} ... of {len(ids)}")
    encoders = load_text_encoders("tiny", t5_length=32)
    good = [text for text in texts if _is_text(text)]
    with torch.no_grad():
        for start in range(0, len(good), 50):
            batch = encoders.encode(good[start : start + 50])
            if not bool(torch.isfinite(batch.context).all()):
                wrong.append(f"states that are not finite among texts {start} to {start + 50}")
    return {"texts": len(texts), "tokenizers": len(clip) + len(t5), "refused_surrogates": refused, "wrong": wrong}


_CASED_MARKS = {"\u0345"}


def _against_open_clip(chance: random.Random, count: int) -> dict[str, Any]:
    """Compare ids with open_clip's own tokenizer over its own vocabulary, and the two vocabularies byte by byte."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    from mmdit.encoders.tokenizers import BPE_FILE, ClipTokenizer

    texts = [text for text in _fuzzed(chance, 3 * count) if _is_text(text) and not _CASED_MARKS & set(text)][:count]
    theirs = SimpleTokenizer()(texts).tolist()
    ours = ClipTokenizer()(texts)
    differ = [text[:40] for text, a, b in zip(texts, ours, theirs, strict=True) if a + [0] * (77 - len(a)) != b]
    vocabulary = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    wrong = [f"other ids than open_clip's: {text!r}" for text in differ]
    if not vocabulary.is_file() or vocabulary.read_bytes() != BPE_FILE.read_bytes():
        import gzip

        same = vocabulary.is_file() and gzip.decompress(vocabulary.read_bytes()) == gzip.decompress(
            BPE_FILE.read_bytes()
        )
        wrong += [] if same else ["the packaged vocabulary is not open_clip's"]
    return {
        "texts": len(texts), "equal": len(texts) - len(differ), "wrong": wrong,
        "left_out": "texts with U+0345, a mark that open_clip takes for a letter, as its pattern ignores case",
    }  # fmt: skip


def _cleaner() -> list[str]:
    """Training captions are cleaned by default; prompts of released weights are read as they stand."""
    from mmdit.config import ImagesConfig, ShardsConfig
    from mmdit.encoders.tokenizers import ClipTokenizer, clean

    wrong = []
    if not (ImagesConfig(source="x").clean_captions and ShardsConfig(source="x").clean_captions):
        wrong.append("the caption cleaner is not on by default")
    if clean("schÃ¶n  &amp;amp; \n gut") != "schön & gut":
        wrong.append(f"the cleaner gave {clean('schÃ¶n  &amp;amp; gut')!r}")
    released = ClipTokenizer(cleaned=False)
    if released(["a &amp; b"]) == released(["a & b"]):
        wrong.append("released weights read a cleaned prompt")
    return wrong


RUNS = {"F11": run_captions}
