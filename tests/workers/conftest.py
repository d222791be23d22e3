"""The tiny model of the catalog, built once for all tests of this room that serve it."""

import pytest

from workers import catalog
from workers.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUNKLINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Checkpoint(str(catalog.fetch("tiny")))
