"""docs/studies.md: its tables are what was simulated, its example runs, and no field is left out."""

import json
import re
from pathlib import Path

import yaml
from mmdit_eval.calibration import calibrate, markdown
from mmdit_eval.plan import make_plan
from mmdit_eval.readme import rewrite

from mmdit.config import StudyConfig, load_study

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
STORED = json.loads((ROOT / "results" / "calibration" / "verdicts.json").read_text(encoding="utf-8"))


def test_the_pages_tables_are_what_was_simulated():
    assert rewrite(PAGE, markdown(STORED), "calibration") == PAGE


def test_the_stored_simulation_has_the_cases_of_todays_code():
    def cases(found):
        keep = ("rows", "seeds", "pictures", "method", "spread_ratio")
        kinds = ("false_verdicts", "planted_effects", "other_intervals")
        return [{k: case[k] for k in keep if k in case} for kind in kinds for case in found[kind]]

    assert cases(calibrate(studies=1)) == cases(STORED)
    assert STORED["studies"] == 1_000


def test_every_field_of_a_study_has_its_line():
    fields = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in PAGE.splitlines() if "|" in line)))
    assert set(StudyConfig.model_fields) <= fields


def test_the_example_is_a_study(tmp_path):
    [example] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    tree = yaml.safe_load(example)
    tree["base"] = str(ROOT / "configs/train/quickstart.yaml")
    (tmp_path / "example.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    study = load_study(tmp_path / "example.yaml")
    plan = make_plan(study, "docs/studies.md")
    assert set(plan.costs) == {"mmdit+flow", "mmdit+v", "unet+flow", "unet+v"}
    assert study.executor == "slurm"
