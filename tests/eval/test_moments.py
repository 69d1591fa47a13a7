"""Streaming means and covariances against numpy on all rows at once, and the files they travel in."""

import numpy as np
import pytest
from mmdit_eval import frechet_distance
from mmdit_eval.moments import Moments, asymmetry, symmetrical, transposed

OURS = {"name": "tiny_clip", "hash": "abc", "resize": "bicubic"}


def draw(n, d, seed=0, shift=0.0):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, d)) @ random.normal(size=(d, d)) + shift


def streamed(x, cuts):
    moments = Moments()
    for part in np.split(x, cuts):
        moments.update(part)
    return moments


@pytest.mark.parametrize(("n", "d"), [(2, 5), (900, 6), (1_000, 6), (3_500, 6), (40, 60)])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_they_equal_numpy_on_all_rows(n, d, shift):
    x = draw(n, d, shift=shift)
    moments = Moments.of(x)
    expected = np.cov(x, rowvar=False)
    assert moments.count == n
    assert moments.mean == pytest.approx(x.mean(0), rel=1e-13, abs=1e-13)
    assert moments.covariance == pytest.approx(expected, rel=1e-10, abs=1e-12 * np.diag(expected).max())
    assert (moments.covariance == moments.covariance.T).all()


def test_the_cut_into_batches_does_not_matter_to_the_last_bit():
    x = draw(2_345, 7)
    whole = Moments.of(x)
    for cuts in ([], range(1, 2_345), range(0, 2_345, 128), [3, 3, 2_344]):
        parts = streamed(x, list(cuts))
        assert (parts.mean == whole.mean).all()
        assert (parts.covariance == whole.covariance).all()


def test_reading_in_between_changes_nothing_that_follows():
    x = draw(1_700, 4)
    moments = Moments.of(x[:1_100])
    assert moments.covariance == pytest.approx(np.cov(x[:1_100], rowvar=False), rel=1e-12)
    moments.update(x[1_100:])
    assert (moments.covariance == Moments.of(x).covariance).all()


@pytest.mark.parametrize("cuts", [[5], [1_200], [10, 2_000], [1_100, 2_200]])
def test_parts_of_several_processes_merge_to_the_whole(cuts):
    x = draw(3_300, 6, shift=50.0)
    merged = Moments()
    for part in np.split(x, cuts):
        merged.merge(streamed(part, [1]))
    assert merged.count == 3_300
    assert merged.mean == pytest.approx(x.mean(0), rel=1e-13)
    assert merged.covariance == pytest.approx(np.cov(x, rowvar=False), rel=1e-11, abs=1e-11)
    merged.merge(Moments())
    assert merged.count == 3_300


def test_rows_are_kept_while_they_are_no_more_than_features_and_merge_as_rows():
    x = draw(30, 40)
    halves = Moments.of(x[:12])
    halves.merge(Moments.of(x[12:]))
    assert (halves.rows == x).all()
    assert Moments.of(draw(41, 40)).rows is None
    b = draw(35, 40, seed=1)
    assert frechet_distance(halves, b) == frechet_distance(x, b)


def test_a_distance_of_moments_is_that_of_features():
    a, b = draw(300, 12, 0), draw(200, 12, 1, 0.5)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == frechet_distance(a, b)
    assert frechet_distance(Moments.of(a), b) == frechet_distance(a, b)


@pytest.mark.parametrize("n", [30, 300])
def test_a_file_brings_back_the_same_distance_at_every_rank(tmp_path, n):
    a, b = draw(n, 40, 0), draw(260, 40, 1)
    Moments.of(a).save(tmp_path / "a.npz", OURS)
    back = Moments.load(tmp_path / "a.npz", OURS)
    assert back.count == n
    assert frechet_distance(back, b) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    with np.load(tmp_path / "a.npz") as stored:  # as other tools read it
        assert stored["mu"] == pytest.approx(a.mean(0), rel=1e-12)
        assert stored["sigma"] == pytest.approx(np.cov(a, rowvar=False), rel=1e-9, abs=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("n", [30, 300])
def test_a_file_can_be_added_to(tmp_path, n):
    x = draw(n + 50, 40)
    Moments.of(x[:n]).save(tmp_path / "a.npz")
    back = Moments.load(tmp_path / "a.npz")
    back.update(x[n:])
    assert back.covariance == pytest.approx(np.cov(x, rowvar=False), rel=1e-10, abs=1e-10)


def test_another_tools_file_is_read_with_a_warning_that_it_does_not_name_its_extractor(tmp_path):
    a, b = draw(200, 8, 0), draw(200, 8, 1)
    np.savez(tmp_path / "reference.npz", mu=a.mean(0).astype(np.float32), sigma=np.cov(a, rowvar=False))
    with pytest.warns(UserWarning, match="does not say which extractor"):
        back = Moments.load(tmp_path / "reference.npz", OURS)
    assert back.count is None
    assert frechet_distance(back, b) == pytest.approx(frechet_distance(a, b), rel=1e-6)
    with pytest.raises(ValueError, match="without a count"):
        back.update(b)
    with pytest.raises(ValueError, match="without a count"):
        Moments.of(b).merge(back)


def test_a_file_of_another_extractor_is_refused_by_the_field_that_differs(tmp_path):
    Moments.of(draw(20, 3)).save(tmp_path / "a.npz", OURS)
    with pytest.raises(ValueError, match="hash 'abc' instead of 'xyz'"):
        Moments.load(tmp_path / "a.npz", {**OURS, "hash": "xyz"})


def test_a_singular_covariance_of_a_foreign_file_is_refused_or_named(tmp_path):
    a, b = draw(10, 30, 0), draw(100, 30, 1)
    arrays = {"mu": a.mean(0), "sigma": np.cov(a, rowvar=False)}
    np.savez(tmp_path / "counted.npz", **arrays, count=10)
    with pytest.raises(ValueError, match="10 samples of 30 features"):
        Moments.load(tmp_path / "counted.npz")
    np.savez(tmp_path / "uncounted.npz", **arrays)
    with pytest.warns(UserWarning, match="has rank 9"):
        assert frechet_distance(Moments.load(tmp_path / "uncounted.npz"), b) == pytest.approx(
            frechet_distance(a, b), rel=1e-5
        )


def test_files_that_are_no_statistics_are_refused_in_words(tmp_path):
    file = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"Moments\.of\(features\)\.save"):
        Moments.load(file)
    Moments.of(draw(20, 3)).save(file)
    whole = file.read_bytes()
    for broken in (b"", b"not an archive", whole[: len(whole) // 2]):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"no readable \.npz"):
            Moments.load(file)
    np.savez(file, mean=np.zeros(3))
    with pytest.raises(ValueError, match="has no mu and no sigma; it holds mean"):
        Moments.load(file)
    for arrays, words in (
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"sigma \[d, d\]"),
        ({"mu": np.array([0.0, np.nan]), "sigma": np.eye(2)}, "not finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "not symmetric"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "must be numbers"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(ValueError, match=words):
            Moments.load(file)
    np.savez(file, mu=np.array([{}], dtype=object), sigma=np.eye(1))  # a pickle is not opened
    with pytest.raises(ValueError, match=r"no readable \.npz"):
        Moments.load(file)


def test_a_files_covariance_with_a_negative_eigenvalue_is_refused_by_its_name(tmp_path):
    path = tmp_path / "broken.npz"
    sigma = np.eye(4)
    sigma[0, 1] = sigma[1, 0] = 2.0
    np.savez(path, mu=np.zeros(4), sigma=sigma)
    with pytest.raises(ValueError, match=r"broken\.npz: sigma has the negative eigenvalue -1"):
        Moments.load(path)
    sigma[0, 1] = sigma[1, 0] = 1.0  # a duplicated feature is a covariance
    np.savez(path, mu=np.zeros(4), sigma=sigma, count=9)
    assert Moments.load(path).covariance == pytest.approx(sigma)


@pytest.mark.parametrize("size", [1, 127, 128, 300])
def test_asymmetry_is_found_wherever_it_stands(size):
    matrix = np.random.default_rng(0).normal(size=(size, size))
    matrix = matrix + matrix.T
    assert asymmetry(matrix) == 0
    assert symmetrical(matrix) is matrix
    if size > 1:
        matrix[size - 1, 0] += 0.5
        assert asymmetry(matrix) == pytest.approx(0.5)
        assert asymmetry(symmetrical(matrix)) == 0


@pytest.mark.parametrize("size", [1, 127, 128, 300])
def test_a_transpose_by_blocks_is_the_transpose_in_lapacks_order(size):
    matrix = np.random.default_rng(0).normal(size=(size, size))
    assert np.array_equal(transposed(matrix), matrix.T)
    assert transposed(matrix).flags.f_contiguous


@pytest.mark.parametrize("d", [1, 130, 257])
def test_the_covariance_is_symmetrical_to_the_last_bit_at_every_width(d):
    x = np.random.default_rng(0).normal(size=(300, d))
    covariance = Moments.of(x).covariance
    assert np.array_equal(covariance, covariance.T)
    assert covariance == pytest.approx(np.atleast_2d(np.cov(x, rowvar=False)), rel=1e-12, abs=1e-14)


def test_unusable_batches_are_refused_in_words():
    moments = Moments.of(draw(5, 3))
    with pytest.raises(ValueError, match="had 3, got 4"):
        moments.update(draw(5, 4))
    with pytest.raises(ValueError, match=r"\[N, d\]"):
        moments.update(np.zeros(3))
    with pytest.raises(ValueError, match="first is row 1"):
        moments.update([[0.0, 1.0, 2.0], [0.0, np.inf, 0.0]])
    assert moments.count == 5
    with pytest.raises(ValueError, match="no features"):
        Moments().mean  # noqa: B018
    one = Moments()
    one.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2"):
        one.covariance  # noqa: B018
    with pytest.raises(ValueError, match=r"a has 1 sample"):
        frechet_distance(one, moments)
