"""Triton kernels on the CPU: this folder runs with TRITON_INTERPRET=1, set before triton is imported.

``tests/test_interpreted.py`` runs each file in a process of its own. By hand::

    TRITON_INTERPRET=1 pytest tests/interpreted/test_<op>.py

Without the variable nothing here is collected. float32 and float16 only: the interpreter gets bfloat16 wrong.
"""

from __future__ import annotations

import os
from typing import Any

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_configure() -> None:
    if not collect_ignore_glob:
        _let_loops_count_with_numpy_24()


def _let_loops_count_with_numpy_24() -> None:
    """``range`` over a kernel's values: numpy 2.4 refuses the ``int(array)`` that triton 3.6 asks of it."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
