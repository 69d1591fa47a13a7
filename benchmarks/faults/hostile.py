"""F4: files made to do harm, in every loader: none runs code, none takes the memory or the time of the machine."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults import Outcome
from benchmarks.faults.hostile_cases import Case, Trap
from benchmarks.faults.hostile_data import archives, caches, configs, pictures, shards
from benchmarks.faults.hostile_weights import checkpoints, releases, tokenizers, weights

MIB = 2**20
MOST_MIB, MOST_SECONDS = 500, 2.0  # above the imports; of the processor
_ROOM = 6 * 2**30  # address space a case may take on top of what is mapped: a bomb must not take the machine with it
_PATIENCE = 60.0  # seconds on the clock
_SHORT = 3  # of each loader's cases, the first so many are in the short form


class Finding(NamedTuple):
    """What came of one case: `refused`, `loaded`, or how it ended otherwise; its words; what it took."""

    end: str
    said: str
    seconds: float = 0.0
    mib: float = 0.0


def run_hostile(folder: Path, full: bool) -> Outcome:
    """F4."""
    canary = folder / "canary"
    trap, found, wrong = Trap(canary, full), {}, []
    counts: Counter[str] = Counter()
    _warm()
    for loader, make in LOADERS.items():
        place = folder / loader.replace(" ", "-")
        place.mkdir()
        cases = make(place, trap)
        chosen = cases if full else dict(list(cases.items())[:_SHORT])
        for name, case in chosen.items():
            label = f"{loader}: {name}"
            finding = found[label] = _try(case, folder / "said")

            counts[finding.end] += 1
            wrong += [f"{label}: {problem}" for problem in _problems(case, finding)]
            if canary.exists():
                wrong.append(f"{label}: CODE WAS RUN")
                canary.unlink()
    code = sum(line.endswith("CODE WAS RUN") for line in wrong)
    mib, seconds = max(f.mib for f in found.values()), max(f.seconds for f in found.values())
    return Outcome(
        not wrong and (len(found) >= 50 or not full),
        f"{len(found)} files in {len(LOADERS)} loaders: code run by {code}; {counts['refused']} refused by name, "
        f"{counts['loaded']} harmless, {len(found) - counts['refused'] - counts['loaded']} otherwise; at most "
        f"{mib:.0f} MiB above the imports and {seconds:.2f} s (CPU) each; {len(wrong)} wrong",
        {
            "files": len(found), "by_loader": dict(Counter(label.partition(":")[0] for label in found)),
            "ends": dict(counts), "code_run": code, "most_mib": round(mib, 1), "slowest_seconds": round(seconds, 3),
            "wrong": wrong,
            "cases": {k: f._replace(said=f.said.replace(f"{folder}/", "")[:120])._asdict() for k, f in found.items()},
        },
    )  # fmt: skip


LOADERS = {
    "weights": weights,
    "releases": releases,
    "checkpoints": checkpoints,
    "tokenizers": tokenizers,
    "arrays": archives,
    "caches": caches,
    "shards": shards,
    "pictures": pictures,
    "configs": configs,
}


def _warm() -> None:
    """Import whatever a loader imports when it is first called: that is no file's doing."""
    import datasets
    import mmdit_eval.extractor_weights
    import mmdit_eval.image_sets
    import mmdit_eval.moments
    import mmdit_eval.set_comparison  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch.utils.data  # noqa: F401
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer  # noqa: F401

    import mmdit
    import mmdit.data.shards
    import mmdit.weights.convert
    import mmdit.weights.inspect
    from mmdit.encoders.tokenizers import ClipTokenizer

    mmdit.load_vae("tiny")
    ClipTokenizer()
    datasets.disable_progress_bars()


def _try(case: Case, answer: Path) -> Finding:
    """Load in a fork; return what came of it."""
    answer.unlink(missing_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    process = os.fork()
    if process == 0:
        try:
            answer.write_text(json.dumps(_load(case)))
        finally:
            os._exit(0)
    began = time.monotonic()
    while not (done := os.wait4(process, os.WNOHANG))[0]:
        if time.monotonic() - began > _PATIENCE:
            os.kill(process, signal.SIGKILL)
            done = os.wait4(process, 0)
            break
        time.sleep(0.002)
    _, status, usage = done
    seconds = usage.ru_utime + usage.ru_stime
    if not answer.is_file() or not answer.stat().st_size:
        return Finding(f"ended with status {os.waitstatus_to_exitcode(status)}", "", round(seconds, 3))
    end, said, mib = json.loads(answer.read_text())
    return Finding(end, said, round(seconds, 3), round(mib, 1))


def _load(case: Case) -> tuple[str, str, float]:
    """Be the fork: load under a limit, with the peak of memory counted from here."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _ROOM, mapped + _ROOM))
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    try:
        case.load()
        end, said = "loaded", ""
    except case.refusals as error:
        end, said = "refused", str(error)
    except BaseException as error:  # the finding
        end, said = type(error).__name__, str(error)
    return end, said, (_peak() - before) / MIB


def _peak() -> int:
    """Return the most memory this process has held, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _problems(case: Case, finding: Finding) -> list[str]:
    """Say what was wrong about a case."""
    wrong = []
    if finding.end != ("loaded" if case.words is None else "refused"):
        wrong.append(f"{finding.end} {finding.said[:300]}")
    elif case.words is not None:
        lacking = [word for word in case.words if word not in finding.said]
        wrong += [f"the refusal lacks {lacking}: {finding.said[:300]}"] if lacking else []
        wrong += [f"the refusal is {len(finding.said):,} characters long"] if len(finding.said) > 20_000 else []
    wrong += [f"{finding.mib:.0f} MiB"] if finding.mib >= MOST_MIB else []
    wrong += [f"{finding.seconds:.2f} s"] if finding.seconds >= MOST_SECONDS else []
    return wrong


RUNS = {"F4": run_hostile}
