"""docs/metrics.md: its tables are what the stored measurements say."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "metrics.md"
TABLES = {"coverage": "intervals", "distances": "distances", "extractors": "extractors"}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_the_page_is_what_its_command_writes(table, tmp_path):
    script = runpy.run_path(str(ROOT / "benchmarks" / f"{TABLES[table]}.py"))
    text = PAGE.read_text(encoding="utf-8")
    copy = tmp_path / "metrics.md"
    copy.write_text(
        re.sub(rf"(<!-- {table}:start -->\n).*?(<!-- {table}:end -->)", r"\1old\n\2", text, flags=re.DOTALL)
    )
    script["main"].__globals__["PAGE"] = copy
    script["main"](table=True)
    assert copy.read_text(encoding="utf-8") == text, f"run: python benchmarks/{TABLES[table]}.py --table"


def test_the_page_marks_every_coverage_outside_93_to_97_percent():
    cases = json.loads((ROOT / "results" / "calibration" / "intervals.json").read_text(encoding="utf-8"))["cases"]
    assert all(case["repetitions"] == 2_000 for case in cases)
    outside = [case for case in cases if not 0.93 <= case["coverage"] <= 0.97]
    assert all(case["coverage"] > 0.97 and case["conservative"] for case in outside)
    marked = re.findall(r"^\| (.*) \| [\d.]+ % \(wide\) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert marked == [case["case"] for case in outside]


def test_every_file_the_page_and_the_stored_metrics_point_at_is_there():
    for page in (PAGE, ROOT / "results" / "metrics" / "README.md"):
        text = page.read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        commands = re.findall(r"\b(?:benchmarks|scripts|configs)/[\w/]+\.(?:py|yaml)", text)
        missing = [link for link in links if not (page.parent / link).exists()]
        missing += [name for name in commands if not (ROOT / name).exists()]
        assert not missing
