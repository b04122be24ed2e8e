"""Triton kernels on the CPU: this folder runs with TRITON_INTERPRET=1, set before triton is imported.

``tests/test_interpreted.py`` runs each file in a process of its own. By hand::

    TRITON_INTERPRET=1 pytest tests/interpreted/test_<op>.py

Without the variable nothing here is collected. float32 and float16 only: the interpreter gets bfloat16 wrong.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
