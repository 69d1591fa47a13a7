"""The README's numbers come from files, and a stale README is noticed."""

import json
from pathlib import Path

import pytest
from mmdit_eval.readme import found_line, results_block, rewrite, rewrite_found, stale_heads, study_block

START, END = "<!-- results:start -->", "<!-- results:end -->"
ROOT = Path(__file__).resolve().parents[2]


def summary():
    def score(value):
        return {"value": value, "low": value - 0.05, "high": min(1.0, value + 0.05), "n": 100, "method": "wilson"}

    cost = {"parameters": 10_087_936, "images": 96_000, "seconds": 241.4, "seconds_range": None, "seeds": 1}
    return {
        "study": "pretend",
        "command": "python scripts/ablate.py configs/studies/pretend.yaml",
        "verdict": ["All correct: something.", "One seed ranks nothing: really."],
        "seconds_note": "",
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


def claim(first, value, half, verdict, score="relation"):
    low, high, p = value - half, value + half, 0.001 if verdict != "none" else 0.4
    names = {"first": first, "second": "mmdit", "split": "heldout", "score": score}
    return {**names, "value": value, "low": low, "high": high, "p": p, "p_holm": p, "seeds": [5, 5],
            "detectable": 0.07, "verdict": verdict}  # fmt: skip


def decided():
    claims = [
        claim("crossdit", -0.062, 0.03, "second"),
        claim("pooled", -0.299, 0.03, "second"),
        claim("joint", 0.051, 0.02, "first"),
        claim("shared", -0.011, 0.03, "none"),
        claim("pooled", 4.25, 0.5, "second", "frechet"),
    ]
    rows = {name: summary()["rows"]["mmdit"] for name in ("mmdit", "crossdit", "pooled", "joint", "shared")}
    score = {"value": 0.9, "low": 0.88, "high": 0.92, "n": 5, "method": "t"}
    scores = {row: {split: {"relation": score, "colour": score} for split in ("seen", "heldout")} for row in rows}
    return {
        **summary(), "claims": claims, "rows": rows, "scores": scores,
        "caveats": ["5 comparisons were stated beforehand.", "pooled is confounded: really."],
    }  # fmt: skip


def test_a_study_with_verdicts_says_them_with_intervals_and_seeds_above_the_claimed_split(tmp_path):
    block = study_block(decided(), tmp_path)
    assert (
        "- Relation, held-out combinations, against mmdit in points (5 seeds, 95 % intervals): "
        "better joint +5.1 [+3.1 to +7.1]; worse pooled −29.9 [−32.9 to −26.9], crossdit −6.2 [−9.2 to −3.2]; "
        "no difference shown after correction for shared −1.1 [−4.1 to +1.9]; this study could have shown 7.0."
    ) in block
    assert "- Fréchet, held-out combinations, against mmdit (5 seeds, 95 % intervals): worse pooled +4.250" in block
    assert "Held-out combinations:" in block
    assert "Seen combinations:" not in block
    assert "| joint | 90.0 % [88.0 – 92.0] | 10.09 M |" in block
    assert "| colour |" not in block
    assert block.endswith("5 comparisons were stated beforehand.\npooled is confounded: really.")


def test_seconds_stand_with_their_range_and_the_foot_says_what_they_do_not_compare(tmp_path):
    found = decided()
    found["rows"]["crossdit"] = {**found["rows"]["mmdit"], "seconds": 418.0, "seconds_range": [181.28, 2900.07]}
    found["rows"]["joint"] = {**found["rows"]["mmdit"], "seconds": 301.2, "seconds_range": [301.1, 301.3], "seeds": 5}
    found["seconds_note"] = "Seconds of one row differ up to 16 times."
    block = study_block(found, tmp_path)
    assert "| crossdit (1 seed) | 90.0 % [88.0 – 92.0] | 10.09 M | 96,000 | 418 [181 – 2,900] |" in block
    assert "| joint (5 seeds) | 90.0 % [88.0 – 92.0] | 10.09 M | 96,000 | 301 |" in block
    assert block.endswith("pooled is confounded: really.\nSeconds of one row differ up to 16 times.")
    assert "Seconds" not in found_line(found)


def test_the_head_of_a_study_says_what_was_found_and_a_stale_one_is_noticed(tmp_path):
    head = "# Question: which?\n# Found: not run yet.\n#        Really not.\n# Command: x\nname: pretend\n"
    (tmp_path / "results/pretend").mkdir(parents=True)
    (tmp_path / "results/pretend/summary.json").write_text(json.dumps(decided()))
    file = tmp_path / "pretend.yaml"
    file.write_text(head)
    (written,) = stale_heads(tmp_path / "results", tmp_path).values()
    lines = written.splitlines()
    assert lines[0] == head.splitlines()[0]
    assert lines[-2:] == ["# Command: x", "name: pretend"]
    assert lines[1].startswith("# Found: Relation, held-out combinations, against mmdit in points (5 seeds")
    assert all(line.startswith("#" + 8 * " ") for line in lines[2:-2])
    assert max(map(len, lines)) <= 120
    assert " ".join(line.lstrip("# ").removeprefix("Found: ") for line in lines[1:-2]) == found_line(decided())
    file.write_text(written)
    assert stale_heads(tmp_path / "results", tmp_path) == {}
    assert rewrite_found("name: x\n", "anything") == "name: x\n"
    one = {**summary(), "caveats": ["One seed ranks nothing: really."]}
    assert found_line(one) == "All correct: something. One seed ranks nothing: really."


def test_the_heads_of_shipped_studies_say_what_the_stored_results_say():
    assert stale_heads(ROOT / "results", ROOT / "configs/studies") == {}, "run: python scripts/readme_table.py"


def stored(folder, **studies):
    """Store studies with a picture each, as `store_study` leaves them."""
    for name, found in studies.items():
        (folder / name).mkdir()
        (folder / name / "summary.json").write_text(json.dumps({**found, "study": name}))
        (folder / name / "grid-heldout.png").write_bytes(b"png")
    return folder


def test_one_picture_stands_above_the_tables(tmp_path):
    block = results_block(stored(tmp_path, first=summary(), second=summary()))
    assert block.startswith("![Held-out combinations")
    assert block.count("![") == 1
    assert f"({(tmp_path / 'first' / 'grid-heldout.png').as_posix()})" in block


def test_a_study_tested_over_seeds_comes_before_those_that_rank_nothing(tmp_path):
    block = results_block(stored(tmp_path, emoji=summary(), which=decided()))
    assert block.index("**[which]") < block.index("**[emoji]")
    assert f"({(tmp_path / 'which' / 'grid-heldout.png').as_posix()})" in block


def test_the_study_of_the_projects_question_comes_first_where_it_is_tested(tmp_path):
    block = results_block(stored(tmp_path, densities=decided(), injection=decided()))
    assert block.index("**[injection]") < block.index("**[densities]")
    assert f"({(tmp_path / 'injection' / 'grid-heldout.png').as_posix()})" in block


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
