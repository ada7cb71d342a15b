"""A server that starts training runs as processes."""

import pytest

from trainer import forks

pytest.register_assert_rewrite("trainer.helpers")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Starts runs of the trainer, each in its own process."""
    server = forks.Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()
