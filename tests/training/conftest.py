"""Models and texts that the tests of this folder share."""

import pytest

import tiny


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tiny.Bench:
    return tiny.Bench(tmp_path_factory.mktemp("bench"))
