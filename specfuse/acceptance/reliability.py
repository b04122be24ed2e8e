"""Is an estimate of agreement to be believed: reliability curve, calibration error, what bounds would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from specfuse.acceptance.calibration import AgreementModel, Observations, log_loss

BINS = 10
BOUNDS = (0.02, 0.05, 0.1, 0.2, 0.3)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


def reliability(model: AgreementModel, held_out: Observations, seed: int = 0) -> dict[str, Any]:
    """How estimates do on places that nothing was fitted on.

    Args:
        model: to look at.
        held_out: places.
        seed: of the control.

    Returns:
        - ``places``, ``agreement``, ``log_loss``;
        - ``curve``: by tenths of the estimates, as full as each other, their mean and the share that agreed;
        - ``calibration_error``: mean distance of the two, by places (expected calibration error);
        - ``control``: the same error when agreement is dealt out at random, which an estimate that says
          something cannot survive;
        - ``bounds``: by disagreement that a user may allow, the share of drafts let through, how many of them
          the target is estimated to choose, and how many it chose;
        - ``by_cosine``: the share of places at or above a cosine, and how many of those agreed.

    Raises:
        ValueError: nothing held out.

    Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015.
    """
    agreed = held_out.agreed
    if not len(agreed):
        raise ValueError("held_out must hold at least one place, got none")
    chance = model.estimate(held_out.cosine, held_out.draft)
    curve = _curve(chance, agreed)
    dealt = np.random.Generator(np.random.PCG64(seed)).permutation(agreed)
    return {
        "places": len(agreed),
        "groups": len(np.unique(held_out.groups)),
        "agreement": float(agreed.mean()),
        "log_loss": log_loss(chance, agreed),
        "curve": curve,
        "calibration_error": _error(curve),
        "control": _error(_curve(chance, dealt)),
        "bounds": [_let_through(bound, chance >= 1 - bound, chance, agreed) for bound in BOUNDS],
        "by_cosine": [
            {
                "threshold": threshold,
                "share": float((held_out.cosine >= threshold).mean()),
                "agreement": _mean(agreed[held_out.cosine >= threshold]),
            }
            for threshold in THRESHOLDS
        ],
    }


def _curve(chance: np.ndarray, agreed: np.ndarray) -> list[dict[str, float]]:
    order = np.argsort(chance, kind="stable")
    return [
        {
            "places": len(part),
            "estimated": float(chance[part].mean()),
            "measured": float(agreed[part].mean()),
        }
        for part in np.array_split(order, BINS)
        if len(part)
    ]


def _error(curve: list[dict[str, float]]) -> float:
    places = sum(part["places"] for part in curve)
    return sum(part["places"] * abs(part["estimated"] - part["measured"]) for part in curve) / places


def _let_through(bound: float, let: np.ndarray, chance: np.ndarray, agreed: np.ndarray) -> dict[str, Any]:
    return {
        "max_disagreement": bound,
        "share": float(let.mean()),
        "estimated": _mean(chance[let]),
        "measured": _mean(agreed[let]),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def write_reliability_picture(path: Path, report: dict[str, Any]) -> None:
    """Draws the curve, and agreement by cosine.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("png needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8))
    left.plot([0, 1], [0, 1], "C7--", linewidth=0.8)
    curve = report["curve"]
    left.plot([part["estimated"] for part in curve], [part["measured"] for part in curve], marker="o")
    title = f"calibration error {report['calibration_error']:.3f} (dealt at random {report['control']:.3f})"
    left.set(title=title, xlabel="estimated agreement", ylabel="measured agreement")
    rows = [row for row in report["by_cosine"] if row["agreement"] is not None]
    right.plot([row["threshold"] for row in rows], [row["agreement"] for row in rows], marker="o")
    right.set(title="same token", xlabel="cosine at least", ylabel="measured agreement", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
