"""What every test run needs."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


class RootIsNoTestPackage:
    """Keeps pytest from importing the root's ``__init__.py`` a second time, named after the checkout."""

    @staticmethod
    def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    # A plugin of its own, because a conftest's hooks are not asked about the folders above it.
    config.pluginmanager.register(RootIsNoTestPackage())
