"""Questions about what is on the road: how many, which colour, on which side, is it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from specfuse.data.world.fact import Fact
from specfuse.data.world.scene import VEHICLES
from specfuse.data.world.visible import View
from specfuse.data.world.wording import Wording, number


def _count(
    kind: str, view: View, thing: str, one: str, many: str, brief: tuple[str, str], aspect: str
) -> Fact:
    count = len(view.of(thing))
    noun, verb = (one, "is") if count == 1 else (many, "are")
    short = brief[0] if count == 1 else brief[1]
    n = number(count)
    return Fact(
        kind,
        (
            f"How many {many} are visible?",
            f"How many {many} can you see in the video?",
            f"Count the {many} in this scene.",
        ),
        str(count),
        (
            f"There {verb} {n} {noun} in the video.",
            f"I can see {n} {noun} in this scene.",
            f"In total, {n} {noun} {verb} visible.",
        ),
        (f"{n.capitalize()} {short}.", f"I see {n} {short}.", f"There {verb} {n} {short}."),
        (aspect, "place") if count else ("place", "surroundings"),
    )


def cars(view: View, say: Wording) -> Fact | None:
    """How many cars?"""
    return _count("count_cars", view, "car", "car", "cars", ("car", "cars"), "cars")


def people(view: View, say: Wording) -> Fact | None:
    """How many pedestrians?"""
    return _count(
        "count_people", view, "pedestrian", "pedestrian", "pedestrians", ("person", "people"), "people"
    )


def nearest(view: View, say: Wording) -> Fact | None:
    """The colour of the nearest car or truck, if one is clearly nearest."""
    vehicle = view.nearest_vehicle()
    if vehicle is None:
        return None
    kind, colour = vehicle.kind, vehicle.colour
    return Fact(
        "nearest_colour",
        (
            "What colour is the nearest vehicle?",
            "Which colour does the closest vehicle have?",
            "What is the colour of the vehicle closest to us?",
        ),
        colour,
        (
            f"The nearest vehicle is a {colour} {kind}.",
            f"The {kind} closest to the camera is {colour}.",
            f"The closest vehicle in the scene has the colour {colour}.",
        ),
        (f"It is {colour}.", f"The nearest one is {colour}.", f"A {colour} {kind} is nearest."),
        ("cars", "trucks", "ego"),
    )


def truck_colour(view: View, say: Wording) -> Fact | None:
    """The colour of the only truck."""
    trucks = view.of("truck")
    if len(trucks) != 1:
        return None
    colour = trucks[0].colour
    return Fact(
        "truck_colour",
        (
            "What colour is the truck?",
            "Which colour does the truck have?",
            "Describe the colour of the truck.",
        ),
        colour,
        (
            f"The truck is {colour}.",
            f"The truck in the video has a {colour} body.",
            f"It is a {colour} truck.",
        ),
        (f"It is {colour}.", f"The truck is {colour}.", f"A {colour} truck."),
        ("trucks", "cars", "place"),
    )


def signal(view: View, say: Wording) -> Fact | None:
    """The colour of the traffic light, or none; less often asked where there is none."""
    found = view.of("signal")
    ask = (
        "What does the traffic light show?",
        "Is there a traffic light, and which colour is it?",
        "What colour is the traffic light, if there is one?",
    )
    if not found:
        if say.fresh("ask no signal") > 0.4:
            return None
        long = (
            "There is no traffic light in the video.",
            "No traffic light can be seen here.",
            "The scene has no traffic light.",
        )
        return Fact(
            "signal",
            ask,
            "none",
            long,
            ("No traffic light.", "There is no light.", "I see no traffic light."),
            ("sign", "place"),
        )
    colour = found[0].colour
    long = (
        f"The traffic light is {colour}.",
        f"There is a traffic light, and it is {colour}.",
        f"The traffic light shows {colour}.",
    )
    return Fact(
        "signal",
        ask,
        colour,
        long,
        (f"It is {colour}.", f"The light is {colour}.", f"A {colour} light."),
        ("signal", "ego", "advice"),
    )


def side(view: View, say: Wording) -> Fact | None:
    """On which side something is of which there is only one."""
    names = {
        "cyclist": "cyclist",
        "truck": "truck",
        "signal": "traffic light",
        "sign": "traffic sign",
        "car": "car",
        "pedestrian": "pedestrian",
    }
    single = [view.of(kind)[0] for kind in names if len(view.of(kind)) == 1]
    single = [thing for thing in single if thing.stays_on_one_side]
    if not single:
        return None
    thing = single[int(say.fresh("side of") * len(single))]
    name, where = names[thing.kind], thing.side
    ask = (
        f"Is the {name} on the left or on the right?",
        f"On which side is the {name}?",
        f"Where is the {name}, left or right?",
    )
    long = (
        f"The {name} is on the {where} side.",
        f"The {name} can be seen on the {where}.",
        f"It is on the {where} side of the view.",
    )
    return Fact(
        "side",
        ask,
        where,
        long,
        (f"On the {where}.", f"It is on the {where}.", f"The {name} is on the {where}."),
        ("cyclist", "trucks", "cars", "people"),
    )


def compare(view: View, say: Wording) -> Fact | None:
    """Are there more cars than pedestrians, or the other way round."""
    counts = {"cars": len(view.of("car")), "pedestrians": len(view.of("pedestrian"))}
    if counts["cars"] == counts["pedestrians"]:
        return None
    first, second = ("cars", "pedestrians") if say.fresh("compare") < 0.5 else ("pedestrians", "cars")
    ask = (
        f"Are there more {first} than {second}?",
        f"Do you see more {first} than {second}?",
        f"Is the number of {first} larger than the number of {second}?",
    )
    if counts[first] > counts[second]:
        long = (
            f"Yes, there are more {first} than {second}.",
            f"Yes, the {first} outnumber the {second}.",
            f"Yes, more {first} than {second} can be seen.",
        )
        return Fact(
            "compare",
            ask,
            "yes",
            long,
            ("Yes.", f"Yes, more {first}.", "Yes, there are more."),
            ("cars", "people"),
        )
    long = (
        f"No, there are more {second} than {first}.",
        f"No, the {second} outnumber the {first}.",
        f"No, fewer {first} than {second} can be seen.",
    )
    return Fact(
        "compare", ask, "no", long, ("No.", f"No, more {second}.", "No, there are fewer."), ("cars", "people")
    )


SUBJECTS: dict[str, tuple[str, str, Callable[[View], bool | None]]] = {
    # name: how to ask, how to say it, whether it is there (None: not clear, so not asked)
    "car": ("a car", "cars", lambda view: bool(view.of("car"))),
    "truck": ("a truck", "trucks", lambda view: bool(view.of("truck"))),
    "pedestrian": ("a pedestrian", "people", lambda view: bool(view.of("pedestrian"))),
    "cyclist": ("a cyclist", "cyclist", lambda view: bool(view.of("cyclist"))),
    "traffic light": ("a traffic light", "signal", lambda view: bool(view.of("signal"))),
    "traffic sign": ("a traffic sign", "sign", lambda view: bool(view.of("sign"))),
    "tree": ("a tree", "surroundings", lambda view: view.scenery["tree"]),
    "building": ("a building", "surroundings", lambda view: view.scenery["building"]),
    "crossing": (
        "a pedestrian crossing the road",
        "people",
        lambda view: any(p.pose == "crossing" for p in view.of("pedestrian")),
    ),
    "red vehicle": ("a red vehicle", "cars", lambda view: any(v.colour == "red" for v in view.of(*VEHICLES))),
}


def presence(view: View, say: Wording) -> Iterator[Fact]:
    """Two yes-or-no questions: about something that is there, and about something that is not."""
    for answer in ("yes", "no"):
        fitting = [name for name, (_, _, there) in SUBJECTS.items() if there(view) is (answer == "yes")]
        if not fitting:
            continue
        what, aspect, _ = SUBJECTS[fitting[int(say.fresh(f"presence {answer}") * len(fitting))]]
        ask = (f"Is there {what} in the video?", f"Can you see {what}?", f"Does the scene show {what}?")
        if answer == "yes":
            long = (
                f"Yes, there is {what} in the video.",
                f"Yes, I can see {what} in this scene.",
                f"Yes, the scene shows {what}.",
            )
            short = ("Yes.", "Yes, there is.", f"Yes, {what}.")
        else:
            bare = what.removeprefix("a ")
            long = (
                f"No, there is no {bare} in the video.",
                f"No, I cannot see {what} in this scene.",
                f"No, the scene does not show {what}.",
            )
            short = ("No.", "No, there is not.", f"No {bare}.")
        yield Fact("presence", ask, answer, long, short, (aspect, "place"))
