"""Emoji: names taken apart, combinations held out, a parquet file built and read."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmdit.data.emoji as emoji
from mmdit.config import EmojiConfig
from mmdit.data import make_dataset
from mmdit.data.emoji import EmojiRecord, build_emoji, hold_out, parse_names

TONES = {"light": "1F3FB", "medium-light": "1F3FC", "medium": "1F3FD", "medium-dark": "1F3FE", "dark": "1F3FF"}


def names_file() -> str:
    """Lines as in emoji-test.txt: firefighters and runners of three genders, hands, two people, things."""
    lines = ["# group: Smileys & Emotion", "# subgroup: face-smiling"]
    lines += ["1F600 ; fully-qualified # X E1.0 grinning face", "263A ; unqualified # X E0.6 smiling face"]
    lines += ["# group: People & Body", "# subgroup: person-role"]

    def add(codes: str, name: str) -> None:
        lines.append(f"{codes:55}; fully-qualified     # X E4.0 {name}")

    for person, prefix in (("1F9D1", ""), ("1F468", "man "), ("1F469", "woman ")):
        add(f"{person} 200D 1F692", f"{prefix}firefighter")
        for tone, code in TONES.items():
            add(f"{person} {code} 200D 1F692", f"{prefix}firefighter: {tone} skin tone")
    for sign, noun in (("", "person"), (" 200D 2642 FE0F", "man"), (" 200D 2640 FE0F", "woman")):
        add(f"1F3C3{sign}", f"{noun} running")
        for tone, code in TONES.items():
            add(f"1F3C3 {code}{sign}", f"{noun} running: {tone} skin tone")
    add("1F468 200D 1F9B0", "man: red hair")
    add("1F469 1F3FD 200D 1F9B0", "woman: medium skin tone, red hair")
    lines.append("# subgroup: hand-fingers-open")
    for hand, code in (("waving hand", "1F44B"), ("raised hand", "270B")):
        add(code, hand)
        for tone, modifier in TONES.items():
            add(f"{code} {modifier}", f"{hand}: {tone} skin tone")
    add("1F9D1 200D 1F91D 200D 1F9D1", "people holding hands")
    add("1F9D1 1F3FB 200D 1F91D 200D 1F9D1 1F3FB", "people holding hands: light skin tone")
    add("1F9D1 1F3FB 200D 1F91D 200D 1F9D1 1F3FF", "people holding hands: light skin tone, dark skin tone")
    lines += ["# group: Objects", "# subgroup: tool"]
    add("1F528", "hammer")
    add("1F448", "backhand index pointing left")
    return "\n".join(lines)


def test_names_are_taken_apart_into_base_tone_and_gender():
    records = {record.caption: record for record in parse_names(names_file())}
    assert "smiling face" not in records  # not fully qualified
    woman = records["woman firefighter: medium-dark skin tone"]
    assert (woman.base, woman.tone, woman.gender) == ("firefighter", "medium-dark", "woman")
    assert (woman.group, woman.subgroup) == ("People & Body", "person-role")
    assert woman.codepoints == "1F469 1F3FE 200D 1F692"
    assert (records["firefighter"].base, records["firefighter"].gender) == ("firefighter", "person")
    runner = records["man running: dark skin tone"]
    assert (runner.base, runner.tone, runner.gender) == ("person running", "dark", "man")
    hair = records["woman: medium skin tone, red hair"]
    assert (hair.base, hair.tone, hair.gender) == ("man: red hair", "medium", "woman")
    hand = records["waving hand: light skin tone"]
    assert (hand.base, hand.tone, hand.gender) == ("waving hand", "light", "")
    assert (records["hammer"].base, records["hammer"].tone, records["hammer"].gender) == ("hammer", "", "")


def test_two_people_have_one_tone_or_two():
    records = {record.caption: record for record in parse_names(names_file())}
    assert records["people holding hands: light skin tone"].tone == "light"
    mixed = records["people holding hands: light skin tone, dark skin tone"]
    assert (mixed.tone, mixed.base, mixed.gender) == ("light+dark", "people holding hands", "")


def many_records() -> list[EmojiRecord]:
    return [
        EmojiRecord(
            f"{base} {gender} {tone}", "g", "s", f"base {base}", tone, gender, "seen", f"{base} {gender} {tone}"
        )
        for base in range(60)
        for gender in ("man", "woman", "person")
        for tone in ("", *TONES)
        for name in [f"{base} {gender} {tone}"]
    ]


def test_a_tenth_of_the_toned_combinations_is_held_out_and_their_parts_stay():
    records = hold_out(many_records())
    toned = [record for record in records if record.tone]
    held = [record for record in records if record.split == "heldout"]
    assert 0.07 < len(held) / len(toned) < 0.13
    assert all(record.tone for record in held)
    left = Counter((r.base, r.gender) for r in toned if r.split == "seen")
    assert set(left) == {(r.base, r.gender) for r in toned}
    tones = Counter(r.tone for r in toned if r.split == "seen")
    assert min(tones.values()) > 150
    assert hold_out(many_records()) == records


def test_holding_out_does_not_depend_on_the_order_or_on_other_bases():
    held = {r.caption for r in hold_out(many_records()) if r.split == "heldout"}
    fewer = {r.caption for r in hold_out(many_records()[: 18 * 20]) if r.split == "heldout"}
    assert fewer == {caption for caption in held if int(caption.split()[0]) < 20}


def test_a_base_with_a_single_tone_is_never_held_out():
    lonely = [EmojiRecord(str(i), "g", "s", f"b{i}", "dark", "", "seen", f"code {i}") for i in range(200)]
    assert all(record.split == "seen" for record in hold_out(lonely))


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A parquet file drawn without the font: each sequence is a picture of its own, two are alike."""

    def draw(font, codepoints: str) -> Image.Image:
        key = "1F528" if codepoints == "1F448" else codepoints
        random = np.random.default_rng(zlib.crc32(key.encode()))
        return Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((128, 128), 0)

    monkeypatch.setattr(emoji, "draw_emoji", draw)
    monkeypatch.setattr(emoji.ImageFont, "truetype", lambda *_, **__: None)
    (tmp_path / "font.ttf").write_bytes(b"")
    (tmp_path / "names.txt").write_text(names_file(), encoding="utf-8")
    counts = build_emoji(tmp_path / "deep" / "emoji.parquet", tmp_path / "font.ttf", tmp_path / "names.txt")
    assert counts["duplicates"] == 1
    assert counts["images"] == counts["sequences"] - 1 == counts["seen"] + counts["heldout"]
    return tmp_path / "deep" / "emoji.parquet"


def test_the_built_file_gives_pixels_captions_and_records(built):
    data = make_dataset(EmojiConfig(path=built, resolution=32), "train")
    held = make_dataset(EmojiConfig(path=built, resolution=32), "heldout")
    pixels = data.pixels([3, 0])
    assert pixels.shape == (2, 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert (pixels[1] == data.pixels([0])[0]).all()
    assert data.captions([0]) == ["grinning face"]
    assert data.records([0])[0].group == "Smileys & Emotion"
    assert len(held) > 0
    assert {r.split for r in held.records(range(len(held)))} == {"heldout"}
    known = {(r.base, r.gender) for r in data.records(range(len(data)))}
    assert all((r.base, r.gender) in known for r in held.records(range(len(held))))
    assert not set(held.captions(range(len(held)))) & set(data.captions(range(len(data))))


def test_seen_is_train_and_val_is_a_part_of_it(built):
    train, seen, val = (make_dataset(EmojiConfig(path=built), split) for split in ("train", "seen", "val"))
    assert train.captions(range(len(train))) == seen.captions(range(len(seen)))
    assert set(val.captions(range(len(val)))) <= set(train.captions(range(len(train))))


def test_flip_adds_mirrored_pictures_except_of_names_a_mirror_would_belie(built):
    plain = make_dataset(EmojiConfig(path=built), "train")
    flipped = make_dataset(EmojiConfig(path=built, flip=True), "train")
    captions = flipped.captions(range(len(plain), len(flipped)))
    assert captions
    assert not any("left" in caption for caption in captions)
    twin = len(plain) + captions.index("grinning face")
    assert (flipped.pixels([twin])[0] == flipped.pixels([0])[0][:, ::-1]).all()
    assert plain.fingerprint != flipped.fingerprint


def test_a_missing_file_names_the_command_and_missing_sources_name_the_packages(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python scripts/build_emoji\.py --out"):
        make_dataset(EmojiConfig(path=tmp_path / "emoji.parquet"), "train")
    with pytest.raises(FileNotFoundError, match=r"apt-get install fonts-noto-color-emoji.*--font"):
        build_emoji(tmp_path / "x.parquet", tmp_path / "none.ttf", tmp_path / "none.txt")
    (tmp_path / "font.ttf").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"apt-get install unicode-data.*--names"):
        build_emoji(tmp_path / "x.parquet", tmp_path / "font.ttf", tmp_path / "none.txt")


def test_an_unknown_split_is_refused(built):
    with pytest.raises(ValueError, match="unknown split 'test' of emoji"):
        make_dataset(EmojiConfig(path=built), "test")
