"""One generation at a time per model object: calls from several threads wait for each other."""

from __future__ import annotations

import threading
import weakref
from typing import Any

_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


def exclusive(model: Any) -> threading.RLock:
    """Returns the lock of one model object, to be held while it generates.

    A thread that holds it may take it again, so that a stopping criterion can ask the model something.
    """
    # One step of the dictionary below: no lock that an interrupt could leave taken.
    return _LOCKS.setdefault(model, threading.RLock())
