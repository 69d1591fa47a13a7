"""The README's numbers come from files, and a stale README is noticed."""

import json
from pathlib import Path

import pytest
from mmdit_eval.readme import END, START, results_block, rewrite

ROOT = Path(__file__).resolve().parents[2]


def summary():
    def score(value):
        return {"value": value, "low": value - 0.05, "high": min(1.0, value + 0.05), "n": 100, "method": "wilson"}

    cost = {"parameters": 10_087_936, "images": 96_000, "seconds": 241.4}
    return {
        "study": "pretend",
        "command": "python scripts/ablate.py configs/studies/pretend.yaml",
        "verdict": ["All correct: something.", "One seed ranks nothing: really."],
        "rows": {"mmdit": cost, "unet": {**cost, "seconds": None}},
        "scores": {
            row: {split: {"all_correct": score(value), "colour": score(0.97)} for split in ("seen", "heldout")}
            for row, value in (("mmdit", 0.934), ("unet", 0.871), ("ceiling", 0.99))
        },
    }


def test_the_table_holds_values_intervals_costs_and_the_warning(tmp_path):
    (tmp_path / "pretend").mkdir()
    (tmp_path / "pretend" / "summary.json").write_text(json.dumps(summary()))
    block = results_block(tmp_path)
    assert "| mmdit | 97.0 % | 93.4 % [88.4 – 98.4] | 10.09 M | 96,000 | 241 |" in block
    assert "| unet | 97.0 % | 87.1 % [82.1 – 92.1] | 10.09 M | 96,000 | – |" in block
    assert "| ceiling | 97.0 % | 99.0 % [94.0 – 100.0] |" in block
    assert "One seed ranks nothing" in block
    assert block.count("| mmdit |") == 2


def test_one_picture_stands_above_the_tables(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({**summary(), "study": name}))
        (tmp_path / name / "grid-heldout.png").write_bytes(b"png")
    block = results_block(tmp_path)
    assert block.startswith("![Held-out combinations")
    assert block.count("![") == 1
    assert f"({(tmp_path / 'first' / 'grid-heldout.png').as_posix()})" in block


def test_only_what_stands_between_the_markers_changes_and_twice_changes_nothing():
    text = f"before\n{START}\nold\n{END}\nafter\n"
    once = rewrite(text, "new")
    assert once == f"before\n{START}\nnew\n{END}\nafter\n"
    assert rewrite(once, "new") == once


@pytest.mark.parametrize("text", ["none", START, f"{END}{START}", f"{START}{END}{START}{END}"])
def test_missing_markers_are_an_error(text):
    with pytest.raises(ValueError, match="once each"):
        rewrite(text, "x")


def test_no_results_is_said():
    assert "No study" in results_block(Path("nowhere"))


def test_the_readme_says_what_the_stored_results_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path("README.md").read_text(encoding="utf-8")
    assert rewrite(text, results_block("results")) == text, "run: python scripts/readme_table.py"
