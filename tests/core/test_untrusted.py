"""Small files of other people: what is too large, no file or no JSON is told by name before it is read."""

import os

import pytest

from mmdit.untrusted import read_bytes, read_json, read_text


def test_what_is_small_and_right_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, "ü"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, "ü"]}
    assert read_text(tmp_path / "a.json") == '{"a": [1, "ü"]}'
    assert read_bytes(tmp_path / "a.json", 16) == '{"a": [1, "ü"]}'.encode()


def test_what_is_not_is_told_by_name(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"deep\.json is not JSON"):
        read_json(tmp_path / "deep.json")
    with pytest.raises(ValueError, match=r"latin\.json is not UTF-8 at byte 1"):
        read_json(tmp_path / "latin.json")
    with pytest.raises(ValueError, match=r"deep\.json has 100,000 bytes; more than 99,999"):
        read_bytes(tmp_path / "deep.json", 99_999)
    for name in ("pipe", "zero", "."):
        with pytest.raises(ValueError, match="is no regular file"):
            read_bytes(tmp_path / name, 9)
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing"):
        read_json(tmp_path / "nothing")
