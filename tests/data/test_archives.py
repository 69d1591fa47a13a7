"""Archives read in bounds hold the same as numpy, tarfile and pyarrow find in honest ones; bombs are told."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmdit.data.archives import array_names, check_dictionaries, check_parquet, read_arrays, read_row_group, walk_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = ["a.png", "folder/b.txt", "ü/日本.json", "x" * 99, "deep/" * 18 + "c.png", "../../out.png", "/etc/root.txt", ""]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(tmp_path, save):
    arrays = {
        "floats": np.arange(12.0).reshape(3, 4), "turned": np.asfortranarray(np.arange(12).reshape(3, 4)),
        "words": np.array(["a", "ü"]), "one": np.int64(7), "none": np.empty((0, 3), np.float16),
        "half": np.ones((2, 2), np.float16),
    }  # fmt: skip
    save(tmp_path / "a.npz", **arrays)
    found = read_arrays(tmp_path / "a.npz", [*arrays, "absent"])
    assert array_names(tmp_path / "a.npz") == list(arrays) == list(found)
    with np.load(tmp_path / "a.npz") as stored:
        for name in arrays:
            assert found[name].dtype == stored[name].dtype
            assert np.array_equal(found[name], stored[name])
            assert found[name].shape == stored[name].shape
            assert found[name].flags.f_contiguous == stored[name].flags.f_contiguous


def test_much_that_is_packed_well_is_read_and_a_bomb_is_not(tmp_path):
    np.savez_compressed(tmp_path / "dark.npz", arr_0=np.zeros((100, 64, 64, 3), np.uint8))
    assert read_arrays(tmp_path / "dark.npz", ["arr_0"])["arr_0"].shape == (100, 64, 64, 3)
    np.savez_compressed(tmp_path / "bomb.npz", arr_0=np.zeros(65 << 20, np.uint8))
    with pytest.raises(ValueError, match=r"bomb\.npz is no readable .npz of arrays: arr_0 .*claims 68,157,440 bytes"):
        read_arrays(tmp_path / "bomb.npz", ["arr_0"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        array_names(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_tar_is_walked_as_tarfile_walks_it(tmp_path, kind):
    names = [n for n in NAMES if n and (kind != "ustar" or n.isascii())]
    names += ["long/" * 40 + "d.png", "日" * 60 + ".txt"] if kind != "ustar" else []
    with tarfile.open(tmp_path / "a.tar", "w", format=FORMATS[kind]) as archive:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = number * 300
            archive.addfile(member, io.BytesIO(bytes([number]) * member.size))
            for special, target in ((tarfile.SYMTYPE, "a.png"), (tarfile.LNKTYPE, "a.png"), (tarfile.DIRTYPE, "")):
                other = tarfile.TarInfo(f"special{number}")
                other.type, other.linkname = special, target * (1 if number % 2 else 40)
                if kind != "ustar" or number % 2:
                    archive.addfile(other)
    with tarfile.open(tmp_path / "a.tar") as archive:
        theirs = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    assert list(walk_tar(tmp_path / "a.tar")) == theirs
    assert [name for name, *_ in theirs] == names


def test_sizes_in_base_256_and_a_missing_end_are_read(tmp_path):
    member = tarfile.TarInfo("a.txt")
    member.size = 5
    head = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    head[124:136], head[148:156] = b"\x80" + bytes(10) + b"\x05", b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "a.tar").write_bytes(bytes(head) + b"hello" + bytes(507))
    assert list(walk_tar(tmp_path / "a.tar")) == [("a.txt", 512, 5)]
    (tmp_path / "b.tar").write_bytes(bytes(head) + b"hel")
    with pytest.raises(ValueError, match=r"'a.txt' is cut off: 5 bytes at byte 512 of 515"):
        list(walk_tar(tmp_path / "b.tar"))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"x" * 600, "no tar header at byte 0"), (b"x" * 100, "inside the header at 0")],
)
def test_what_is_no_tar_is_told(tmp_path, content, words):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        list(walk_tar(tmp_path / "a.tar"))


def test_a_row_group_is_what_pyarrow_reads(tmp_path):
    rows = [{"bytes": bytes([i % 7]) * 3000, "path": None if i % 3 else f"{i}.png"} for i in range(1000)]
    table = pa.table({"image": rows, "text": [f"caption {i % 5}" for i in range(1000)], "other": list(range(1000))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=600)
    opened = pq.ParquetFile(tmp_path / "a.parquet")
    check_parquet(opened, (tmp_path / "a.parquet").stat().st_size)
    check_dictionaries(opened)
    for group in (0, 1):
        found = read_row_group(opened, group, ["image", "text"])
        assert found.to_pylist() == opened.read_row_group(group, columns=["image", "text"]).to_pylist()


def test_bombs_in_parquet_are_told(tmp_path):
    table = pa.table({"a": [bytes(1 << 20)] * 65})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match=r"row group 0 claims 68,\d+,\d+ bytes out of"):
        check_parquet(pq.ParquetFile(tmp_path / "a.parquet"), (tmp_path / "a.parquet").stat().st_size)
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(300, np.int32)), pa.array([bytes(1 << 20)]))
    pq.write_table(
        pa.table({"a": values}), tmp_path / "b.parquet", dictionary_pagesize_limit=1 << 30, store_schema=False
    )
    opened = pq.ParquetFile(tmp_path / "b.parquet")
    check_parquet(opened, (tmp_path / "b.parquet").stat().st_size)  # it says nothing of it
    with pytest.raises(ValueError, match="row group 0 unpacks to more than"):
        read_row_group(opened, 0, ["a"])
    with pytest.raises(ValueError, match="row group 0 unpacks to more than"):
        check_dictionaries(opened)
