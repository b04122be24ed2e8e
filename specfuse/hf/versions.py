"""The tested range of versions: one line of ``pyproject.toml``, read back from the installed metadata."""

from __future__ import annotations

import functools
import warnings
from importlib import metadata

from packaging.requirements import Requirement


def supported_range(package: str) -> tuple[str, str]:
    """Return the lowest tested version and the first one beyond; an empty string where there is no bound."""
    for line in metadata.requires("specfuse") or []:
        requirement = Requirement(line)
        if requirement.name == package and requirement.marker is None:
            bounds = {part.operator: part.version for part in requirement.specifier}
            return bounds.get(">=", ""), bounds.get("<", "")
    return "", ""


def outside_range(package: str, version: str | None = None) -> str | None:
    """Return a sentence if a version (default: the installed one) is outside the tested range, else None."""
    try:
        version = version or metadata.version(package)
        low, high = supported_range(package)
    except metadata.PackageNotFoundError:
        return None
    limits = [f">={low}"] * bool(low) + [f"<{high}"] * bool(high)
    specifier = ",".join(limits)
    if not limits or Requirement(f"{package}{specifier}").specifier.contains(version, prereleases=True):
        return None
    return (
        f"{package} {version} is outside the range that specfuse is tested with ({specifier}): "
        f"pip install '{package}{specifier}'"
    )


@functools.cache
def warn_if_untested(package: str) -> None:
    """Warn once in a process if the installed version of a package is outside the tested range."""
    message = outside_range(package)
    if message is not None:
        warnings.warn(message, stacklevel=3)
