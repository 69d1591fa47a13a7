"""F18 and F19: what the code may not contain, and connections it may not try."""

from __future__ import annotations

import ast
import ipaddress
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults import Outcome

ROOT = Path(__file__).resolve().parents[2]
OURS = ("mmdit", "eval", "scripts", "benchmarks", "docs", "tests")

_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
_BUILTINS = {"eval", "exec", "compile", "__import__"}
_CALLS = {
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "torch.hub.load",
    "subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle", "tempfile.mktemp",
}  # fmt: skip
# keyword: the values that are allowed
_KEYWORDS = {"weights_only": (True,), "shell": (False,), "trust_remote_code": (False,), "allow_pickle": (False,)}
_NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", 0)}
_LIBRARY = {"mmdit", "eval", "scripts"}  # the others write pickles for peers, or to see that they are refused


def hits(path: Path, text: str | None = None) -> list[str]:
    """Return what a Python file does that could run foreign code, as `file:line: what`."""
    tree = ast.parse(path.read_text(encoding="utf-8") if text is None else text)
    return [
        f"{path}:{line}: {what}"
        for line, what in _dangers(tree, library=bool(_LIBRARY & set(path.relative_to(ROOT).parts[:1])))
    ]


def _dangers(tree: ast.AST, library: bool) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from ((node.lineno, f"import {name}") for name in names if name.partition(".")[0] in _MODULES)
        if isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _dangers_of_call(node, library))
        if library and isinstance(node, ast.Constant) and node.value == "0.0.0.0":
            yield node.lineno, "an address that all the network can reach"


def _dangers_of_call(call: ast.Call, library: bool) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {word.arg: word.value for word in call.keywords if word.arg}
    if name in _CALLS or (isinstance(call.func, ast.Name) and name in _BUILTINS):
        yield f"{name}()"
    if name == "torch.save" and library:
        yield f"{name}(), which pickles"
    for word, allowed in _KEYWORDS.items():
        value = given.get(word)
        if value is not None and not (isinstance(value, ast.Constant) and value.value in allowed):
            yield f"{word}={ast.unparse(value)}"
    if name in _NEEDED and library and _NEEDED[name][0] not in given:
        yield f"{name}() without {_NEEDED[name][0]}={_NEEDED[name][1]}"


def run_static(folder: Path, full: bool) -> Outcome:
    """F18: walk through the syntax trees of all our code."""
    files = sorted(path for room in OURS for path in (ROOT / room).rglob("*.py"))
    found = [hit.removeprefix(f"{ROOT}/") for file in files for hit in hits(file)]
    return Outcome(
        not found,
        f"{len(found)} hits in {len(files)} files",
        {"files": len(files), "hits": found},
    )


# --- F19 --------------------------------------------------------------------------------------------------------

# a question to a name server: identifier, flags, counts, then the name with the length of each label before it
_QUESTION = re.compile(r"(?:sendto|sendmmsg)\(.*?\"[^\"]{2,8}\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0((?:[^\"\\]|\\.)+?)\\0\\0")
_CONNECT = re.compile(
    r"(?:connect|sendto)\(.*sa_family=AF_INET6?, .*?(?:inet_addr\(\"|inet_pton\(AF_INET6, \")([^\"]+)"
)


def run_offline(folder: Path, full: bool) -> Outcome:
    """F19: run the tests behind the guard, and below it count the kernel's own calls, which native code makes too."""
    tests = ["-m", "not slow and not gpu and not network"]
    tests += ["tests"] if full else ["tests/core/test_rng.py", "tests/core/test_network_guard.py"]
    tests += ["--deselect", "tests/reliability/test_fault_table.py"]
    tracer = shutil.which("strace")
    trace, log = folder / "trace.txt", folder / "tries.log"
    log.touch()
    paths = [str(ROOT / "tests" / "guard"), str(ROOT), str(ROOT / "eval")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "MMDIT_NETWORK_LOG": str(log),
        "HF_HOME": str(folder / "hub"),  # nothing that this machine has downloaded before
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = (
        [tracer, "-f", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmmsg", "-s", "256", "-o", str(trace)]
        if tracer
        else []
    )
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    tries = log.read_text(encoding="utf-8").splitlines()
    calls = _outward(trace) if tracer and trace.exists() else []
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return Outcome(
        done.returncode == 0 and not tries and not calls,
        f"{len(tries)} attempts, {len(calls)} calls of the kernel that leave the machine; {summary}",
        {
            "python_attempts": tries[:20],
            "kernel_calls": calls[:20] if tracer else "strace is not installed",
            "tests": summary,
            "failed": failed[:20],
        },
    )


def _outward(trace: Path) -> list[str]:
    """Return the traced calls whose address is another machine's."""
    found = []
    with trace.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            match = _CONNECT.search(line)
            asked = _QUESTION.search(line)
            if asked:  # of a name server: what the lines before it connected to
                name = re.sub(r"\\(?:[0-7]{1,3}|.)", ".", asked[1]).strip(".")
                if name not in _own_names():
                    found.append(f"{line.split()[0]} asked a name server for {name}")
            elif match and not _is_own(match[1]) and "htons(53)" not in line:
                found.append(line.strip())
    return found


def _own_names() -> set[str]:
    name = os.uname().nodename
    return {name, f"{name}.local", "localhost"}


def _is_own(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return parsed.is_loopback or parsed.is_unspecified or address in _own_addresses()


def _own_addresses() -> set[str]:
    """Addresses of this machine's interfaces: processes of one run meet there too."""
    try:
        done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False)
    except OSError:
        return set()
    return set(done.stdout.split())


RUNS = {"F18": run_static, "F19": run_offline}
