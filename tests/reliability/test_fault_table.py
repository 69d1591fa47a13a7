"""The fault table: every row short in the default run, at full size under `slow` and in benchmarks/faults.py."""

import json
from pathlib import Path

import pytest

from benchmarks.faults import FAULTS, MARKS, runner, table, write_table

ROOT = Path(__file__).resolve().parents[2]
MODULES = ROOT / "benchmarks" / "faults"
BUILT = [name for name, fault in FAULTS.items() if fault.module and (MODULES / f"{fault.module}.py").is_file()]


@pytest.mark.parametrize("name", BUILT)
def test_a_fault_does_no_harm(tmp_path, name):
    outcome = runner(name)(tmp_path, False)
    assert outcome.passed, json.dumps(outcome.figures, indent=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_a_fault_does_no_harm_at_full_size(tmp_path, name):
    outcome = runner(name)(tmp_path, True)
    assert outcome.passed, json.dumps(outcome.figures, indent=1)


def test_stored_records_say_what_gave_them():
    for path in sorted((ROOT / "results" / "reliability").glob("F*.json")):
        record = json.loads(path.read_text())
        assert record["id"] == path.stem
        assert record["command"] == f"python benchmarks/faults.py {path.stem}"
        assert isinstance(record["passed"], bool)
        assert record["measured"]
        assert record["figures"]
        assert {"commit", "versions", "hardware", "date", "title", "goal"} <= record.keys()


def test_the_table_holds_every_row_and_keeps_the_page_around_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nOLD ROWS\n{MARKS[1]}\nafter\n")
    write_table(page, {"F1": {"measured": "100 kills, none lost", "passed": True}})
    text = page.read_text()
    assert text.startswith(f"before\n{MARKS[0]}\n| ")
    assert text.endswith(f"{MARKS[1]}\nafter\n")
    assert "OLD ROWS" not in text
    assert "100 kills, none lost | yes |" in text
    assert all(f"| {name} |" in text for name in FAULTS)


def test_the_page_shows_what_is_stored():
    stored = {p.stem: json.loads(p.read_text()) for p in (ROOT / "results" / "reliability").glob("F*.json")}
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert table(stored) in page, "run: python benchmarks/faults.py --table"


def test_a_name_that_is_none_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"no fault test 'F99'; there are F1, F2"):
        runner("F99")


def test_a_power_cut_finds_a_save_that_is_not_synced(tmp_path, monkeypatch):
    """The tests of saving can fail: the same save without fsync loses its checkpoint."""
    import mmdit.checkpoint as room

    monkeypatch.setattr(room, "sync", lambda path: None)
    outcome = runner("F2")(tmp_path, False)
    assert not outcome.passed
    assert any("power cut" in line for line in outcome.figures["broken"])


def test_a_death_finds_a_save_that_writes_in_place(tmp_path, monkeypatch):
    import mmdit.checkpoint as room

    def copied(temporary, path):
        import shutil

        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for file in sorted(temporary.iterdir()):
            (path / file.name).write_bytes(file.read_bytes())
        shutil.rmtree(temporary)

    monkeypatch.setattr(room, "put_in_place", copied)
    assert not runner("F2")(tmp_path, False).passed
