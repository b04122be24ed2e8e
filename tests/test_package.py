"""The top-level names: lazy, complete, and not shadowed by submodules of the same name."""

from __future__ import annotations

import subprocess
import sys

import pytest

import specfuse


@pytest.mark.parametrize("name", [name for name in specfuse.__all__ if name != "__version__"])
def test_every_name_is_there(name):
    assert callable(getattr(specfuse, name))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        specfuse.nothing  # noqa: B018


def in_a_fresh_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("name", ["generate", "plan"])
def test_a_function_stays_one_once_its_module_is_imported(name):
    code = f"import specfuse.{name}, specfuse; print(type(specfuse.{name}).__name__)"
    assert in_a_fresh_python(code) == "function"


def test_importing_the_package_does_not_import_torch():
    assert in_a_fresh_python("import sys, specfuse; print('torch' in sys.modules)") == "False"
