"""docs/text.md shows what benchmarks/padding.py has stored."""

import json

from benchmarks import padding


def test_the_pages_table_is_what_was_measured():
    stored = json.loads(padding.STORED.read_text(encoding="utf-8"))
    assert padding.markdown(stored) in padding.PAGE.read_text(encoding="utf-8"), (
        "run: python benchmarks/padding.py --table"
    )
    assert {(row["backbone"], row["padding"]) for row in stored["rows"]} == {
        (backbone, way) for backbone in padding.ROWS for way in ("attend", "mask", "trim")
    }
