"""The walkers of F18 and F19 see what they are there for."""

import os

import pytest

from benchmarks.faults.static import ROOT, _outward, hits


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import cloudpickle as c", "eval(text)", "exec(text)",
        "__import__(name)", "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)",
        "np.load(path, allow_pickle=True)", "subprocess.run(words, shell=True)", "os.system(words)", "yaml.load(text)",
        "yaml.load(text, Loader=Mine)", "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "torch.save(table, path)", "serve('0.0.0.0')", "torch.hub.load('a/b', 'c')",
    ],
)  # fmt: skip
def test_dangerous_code_is_found(line):
    found = hits(ROOT / "mmdit" / "new.py", f"x = 1\n{line}\n")
    assert len(found) == 1
    assert found[0].startswith(f"{ROOT}/mmdit/new.py:2: ")


@pytest.mark.parametrize(
    "line",
    [
        "denoiser.eval()", "torch.load(path, weights_only=True)", "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)", "subprocess.run(words, check=True)", "block.compile()", "x = 'never pickle, eval('",
        "model.load(path)", "re.compile('x')",
    ],
)  # fmt: skip
def test_harmless_code_is_not(line):
    assert hits(ROOT / "mmdit" / "new.py", line) == []


def test_the_kernels_calls_are_told_apart(tmp_path):
    ours = [
        '7 connect(3, {sa_family=AF_INET, sin_port=htons(9), sin_addr=inet_addr("127.0.0.1")}, 16) = 0',
        '7 connect(3, {sa_family=AF_INET6, sin6_port=htons(9), inet_pton(AF_INET6, "::1", &sin6_addr)}, 28) = 0',
        '7 connect(3, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("192.0.2.53")}, 16) = 0',
        f'7 sendmmsg(3, [{{base="\\267\\316\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\2{os.uname().nodename}\\0\\0\\1\\0\\1"}}]',
        '7 connect(3, {sa_family=AF_UNIX, sun_path="/run/x"}, 110) = -1 ENOENT',
    ]
    others = [
        '7 connect(3, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("192.0.2.1")}, 16) = 0',
        '7 connect(3, {sa_family=AF_INET6, sin6_port=htons(9), inet_pton(AF_INET6, "2001:db8::1", &a)}, 28) = 0',
        '7 sendto(3, "?", 1, 0, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("192.0.2.53")}, 16) = 1',
    ]
    (tmp_path / "trace").write_text("\n".join([*ours, *others]))
    assert _outward(tmp_path / "trace") == others
    question = r'7 sendto(3, "\267\316\1\0\0\1\0\0\0\0\0\0\2s3\7example\0\0\1\0\1", 28, 0, NULL, 0) = 28'
    (tmp_path / "trace").write_text(question)
    assert _outward(tmp_path / "trace") == ["7 asked a name server for s3.example"]
