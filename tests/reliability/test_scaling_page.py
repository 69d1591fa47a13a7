"""docs/scaling.md shows what its benchmarks have stored."""

import json

import pytest

from benchmarks import data, scaling


def test_the_page_shows_what_is_stored():
    page = scaling.PAGE.read_text()
    for table in scaling.tables(json.loads(scaling.STORED.read_text())).values():
        assert table in page, "run: python benchmarks/scaling.py --table"
    assert data.report(json.loads(data.STORED.read_text())) in page, "run: python benchmarks/data.py --table"


def test_a_page_without_markers_is_told(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no markers\n")
    stored = json.loads(data.STORED.read_text())
    with pytest.raises(ValueError, match="has no markers <!-- feeding"):
        data.write_report(page, stored)
    page.write_text(f"before\n{data.MARKS[0]}\nOLD\n{data.MARKS[1]}\nafter\n")
    data.write_report(page, stored)
    assert page.read_text() == f"before\n{data.MARKS[0]}\n{data.report(stored)}\n{data.MARKS[1]}\nafter\n"
