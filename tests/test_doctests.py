"""Every example in a docstring is run. (``--doctest-modules`` would load a second copy of the package.)"""

import doctest
import pkgutil
from importlib import import_module

import pytest

import gossamer

MODULES = ["gossamer", *(module.name for module in pkgutil.walk_packages(gossamer.__path__, "gossamer."))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    failed, _ = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
