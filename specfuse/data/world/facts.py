"""All factual questions that may be asked about a view.

A question is asked only where the answer is beyond doubt: what counts is clear, all else is hidden.
"""

from __future__ import annotations

from collections.abc import Callable

from specfuse.data.world import fact_drive, fact_things
from specfuse.data.world.fact import Fact
from specfuse.data.world.visible import View
from specfuse.data.world.wording import Wording

FACTS: tuple[Callable[[View, Wording], Fact | None], ...] = (
    fact_things.cars,
    fact_things.people,
    fact_things.nearest,
    fact_things.truck_colour,
    fact_things.signal,
    fact_things.side,
    fact_things.compare,
    fact_drive.turn,
    fact_drive.speed,
    fact_drive.weather,
    fact_drive.light,
    fact_drive.road,
)


def facts(view: View, say: Wording) -> list[Fact]:
    """Every factual question that may be asked about a view, in an order that never changes."""
    single = (ask(view, say) for ask in FACTS)
    return [*(fact for fact in single if fact is not None), *fact_things.presence(view, say)]
