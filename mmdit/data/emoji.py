"""Emoji: artist-drawn pictures with real names, in combinations of base, skin tone and gender.

`build_emoji` draws the font's glyphs once and writes a parquet file; `EmojiDataset` reads it. Whole combinations
(base x tone x gender) are held out although their true picture exists, so a generated picture can be compared with it
and with its nearest relatives. Neither the font nor the names are part of the package.

Source: Unicode Technical Standard #51 (emoji-test.txt, version 15.0), Noto Color Emoji (SIL OFL 1.1).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from mmdit.config import EmojiConfig

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # where Debian's packages put them
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
SPLITS = ("train", "val", "seen", "heldout")
VAL_RECORDS = 256

_FONT_SIZE = 109  # the only size the font's bitmaps have; every other one is refused
_CANVAS = 160  # narrower than 140 clips wide glyphs
_ORIGIN, _BOX = (12, 16), (16, 16, 144, 144)  # the union of all 3,655 glyphs' boxes, when drawn at this origin
_TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
_PEOPLE = {0x1F468: "man", 0x1F469: "woman", 0x1F9D1: "person"}
_SIGNS = {0x2642: "man", 0x2640: "woman"}
_PERSON, _JOINER, _PRESENTATION = 0x1F9D1, 0x200D, 0xFE0F
_LINE = re.compile(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E\d+\.\d+ (.+)")
# a mirrored picture of these would belie its name
_ONE_WAY = re.compile(r"\b(left|right|clock|counterclock)|o’clock|thirty|writing|calendar|keycap", re.IGNORECASE)
_ONE_WAY_GROUPS = ("Symbols", "Flags")  # letters, arrows, signs, flags


@dataclass(frozen=True)
class EmojiRecord:
    """One emoji.

    Attributes:
        caption: Unicode's English name.
        base: name without tone and gender ("firefighter"); the same for all its variants.
        tone: light | medium-light | medium | medium-dark | dark, two joined by "+" where two people differ, or "".
        gender: man | woman | person where the base comes in several, else "".
        split: seen (training may show it) | heldout.
        codepoints: hexadecimal, separated by spaces.
    """

    caption: str
    group: str
    subgroup: str
    base: str
    tone: str
    gender: str
    split: str
    codepoints: str


def parse_names(text: str) -> list[EmojiRecord]:
    """Read emoji-test.txt: its fully-qualified sequences, all still with split "seen"."""
    rows: list[tuple[EmojiRecord, tuple[int, ...]]] = []
    group = subgroup = ""
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ").strip()
        elif match := _LINE.match(line):
            codes = tuple(int(code, 16) for code in match[1].split())
            key, gender = _neutral(codes)
            record = EmojiRecord(
                match[2].strip(), group, subgroup, "", _tone(codes), gender, "seen", " ".join(f"{c:04X}" for c in codes)
            )
            rows.append((record, key))

    names: dict[tuple[int, ...], str] = {}
    genders: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for record, key in rows:
        genders[key].add(record.gender)
        # the neutral form's name is the base's; where there is none, the first form's
        if not record.tone and (key not in names or record.gender == "person"):
            names[key] = record.caption
    out = []
    for record, key in rows:
        base = names.get(key) or _without_tone(record.caption)
        gender = record.gender if len(genders[key]) > 1 else ""
        out.append(replace(record, base=base, gender=gender))
    return out


def _tone(codes: Sequence[int]) -> str:
    tones = [_TONES[code] for code in codes if code in _TONES]
    return "+".join(tones[:1] if len(set(tones)) == 1 else tones)


def _neutral(codes: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """Strip tone and gender from a sequence: (what is left, gender or "person")."""
    plain = [code for code in codes if code not in _TONES and code != _PRESENTATION]
    people = [code for code in plain if code in _PEOPLE]
    if len(people) == 1 and plain[0] in _PEOPLE:  # a man, a woman or a person, alone or joined with a thing
        return (_PERSON, *plain[1:]), _PEOPLE[people[0]]
    if len(plain) > 2 and plain[-1] in _SIGNS and plain[-2] == _JOINER:  # person running + joiner + female sign
        return tuple(plain[:-2]), _SIGNS[plain[-1]]
    if len(people) == 2 and _JOINER in plain and 0x1F91D in plain:  # two people holding hands, name decides
        codes_of_pair = {  # the one-code forms carry one tone, the joined forms two: same picture family
            (0x1F469, 0x1F469): 0x1F46D, (0x1F469, 0x1F468): 0x1F46B, (0x1F468, 0x1F468): 0x1F46C,
        }  # fmt: skip
        single = codes_of_pair.get((people[0], people[1]))
        return ((single,) if single else tuple(plain)), "person"
    return tuple(plain), "person"


def _without_tone(name: str) -> str:
    head, _, tail = name.partition(": ")
    kept = [part for part in tail.split(", ") if part and not part.endswith("skin tone")]
    return f"{head}: {', '.join(kept)}" if kept else head


def hold_out(records: Sequence[EmojiRecord]) -> list[EmojiRecord]:
    """Mark about one tenth of the toned combinations as held out, by hash.

    Every (base, gender) keeps a training picture with some tone and every tone stays frequent, so that what is asked
    of a held-out combination is to join two known things.
    """
    left: dict[tuple[str, str], int] = defaultdict(int)
    for record in records:
        if record.tone:
            left[record.base, record.gender] += 1
    out = []
    for record in records:
        family = record.base, record.gender
        if record.tone and _hash(record.codepoints) % 10 == 0 and left[family] > 1:
            left[family] -= 1
            record = replace(record, split="heldout")
        out.append(record)
    return out


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def draw_emoji(font: ImageFont.FreeTypeFont, codepoints: str) -> Image.Image:
    """Draw one sequence on white: RGB, 128 x 128."""
    canvas = Image.new("RGB", (_CANVAS, _CANVAS), "white")
    sequence = "".join(chr(int(code, 16)) for code in codepoints.split())
    ImageDraw.Draw(canvas).text(_ORIGIN, sequence, font=font, embedded_color=True)
    return canvas.crop(_BOX)


def _mirrors_well(record: EmojiRecord) -> bool:
    return record.group not in _ONE_WAY_GROUPS and not _ONE_WAY.search(record.caption)


def build_emoji(out: Path, font: Path = FONT, names: Path = NAMES) -> dict[str, int]:
    """Draw all emoji and write the parquet file `EmojiDataset` reads.

    Equal pictures are kept once (the first name wins): a held-out picture must not stand in training under another
    name, and retrieval needs one true answer.

    Returns:
        Counts: sequences, duplicates, images, seen, heldout, toned, bases (with tones).

    Raises:
        FileNotFoundError: font or names are missing; the message says how to get them.
        RuntimeError: Pillow has no raqm, which joins sequences into one glyph.
    """
    for path, package, flag in ((font, "fonts-noto-color-emoji", "--font"), (names, "unicode-data", "--names")):
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{path} is missing: `apt-get install {package}` brings it on Debian and Ubuntu; elsewhere give its "
                f"path with {flag}"
            )
    if not features.check("raqm"):
        raise RuntimeError("Pillow was built without raqm, so emoji of several code points would fall apart")
    import pyarrow
    import pyarrow.parquet

    truetype = ImageFont.truetype(str(font), _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    parsed = parse_names(Path(names).read_text(encoding="utf-8"))
    kept, pictures, known = [], [], set()
    for record in parsed:
        picture = draw_emoji(truetype, record.codepoints)
        digest = hashlib.sha256(picture.tobytes()).digest()
        if digest in known or picture.getextrema() == ((255, 255),) * 3:
            continue
        known.add(digest)
        kept.append(record)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})  # the `datasets` library reads this as an image
    records = hold_out(kept)
    columns: dict[str, Any] = {"image": pictures}
    for name in asdict(records[0]):
        columns[name] = [getattr(record, name) for record in records]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
    temporary.replace(out)
    toned = [record for record in records if record.tone]
    return {
        "sequences": len(parsed),
        "duplicates": len(parsed) - len(records),
        "images": len(records),
        "seen": sum(record.split == "seen" for record in records),
        "heldout": sum(record.split == "heldout" for record in records),
        "toned": len(toned),
        "bases": len({record.base for record in toned}),
    }


class EmojiDataset:
    """Emoji of one split.

    `train` and `seen` are the same pictures: there is one picture a name, so "seen" asks whether a trained name is
    drawn, not whether a fresh picture is. `val` is a fixed subset of them too (its loss measures fit); `heldout` holds
    the combinations training lacks. With `flip`, `train` is twice as long and its second half mirrored, without those
    whose name a mirror would belie.
    """

    def __init__(self, config: EmojiConfig, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of emoji; known: {', '.join(SPLITS)}")
        if not config.path.is_file():
            raise FileNotFoundError(f"{config.path} is missing: `python scripts/build_emoji.py --out {config.path}`")
        import pyarrow.parquet

        self.config = config
        self.split = split
        wanted = "heldout" if split == "heldout" else "seen"
        rows = [row for row in pyarrow.parquet.read_table(config.path).to_pylist() if row["split"] == wanted]
        if split == "val":
            rows = sorted(rows, key=lambda row: _hash("val" + row["codepoints"]))[:VAL_RECORDS]
        images = [row.pop("image")["bytes"] for row in rows]
        self._records = [EmojiRecord(**row) for row in rows]
        self._mirrored = [False] * len(rows)
        if config.flip and split == "train":
            both = [i for i, record in enumerate(self._records) if _mirrors_well(record)]
            images += [images[i] for i in both]
            self._records += [self._records[i] for i in both]
            self._mirrored += [True] * len(both)
        self._images = images
        self._pixels: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._records)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides pixels and captions."""
        digest = hashlib.sha256(f"emoji|1|{self.split}|{self.config.resolution}|{self.config.flip}".encode())
        for record, image in zip(self._records, self._images, strict=True):
            digest.update(record.caption.encode())
            digest.update(hashlib.sha256(image).digest())
        return digest.hexdigest()[:32]

    def records(self, indices: Sequence[int] | np.ndarray) -> list[EmojiRecord]:
        """Return names, bases, tones and genders, for retrieval among relatives."""
        return [self._records[int(i)] for i in indices]

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Return Unicode's English names."""
        return [self._records[int(i)].caption for i in indices]

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return pictures on white: uint8 [B, R, R, 3]."""
        side = self.config.resolution
        out = np.empty((len(indices), side, side, 3), dtype=np.uint8)
        for row, index in enumerate(indices):
            out[row] = self._picture(int(index))
        return out

    def _picture(self, index: int) -> np.ndarray:
        if index not in self._pixels:
            side = self.config.resolution
            picture = Image.open(io.BytesIO(self._images[index])).convert("RGB")
            if picture.size != (side, side):
                picture = picture.resize((side, side), Image.Resampling.LANCZOS)
            pixels = np.asarray(picture)
            self._pixels[index] = pixels[:, ::-1] if self._mirrored[index] else pixels
        return self._pixels[index]
