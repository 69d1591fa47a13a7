"""A made-up study of two rows and one seed."""

import pytest

from tests.studies.made_up import write_study


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path)
