"""The drafter's way of talking about a scene: short, in the first person, one thing after the other."""

from __future__ import annotations

from collections.abc import Callable

from specfuse.data.world.visible import Seen, View
from specfuse.data.world.wording import Wording, compose, listing, number, sentence

LEAST, MOST = 32, 46  # words
LEAST_FACT, MOST_FACT = 12, 26

ROAD = {
    "country": ("a straight country road", "a quiet country lane"),
    "curve": ("a curved road", "a bend in the road"),
    "junction": ("a junction", "a road junction with a crossing"),
    "city": ("a city street", "a street in town"),
    "highway": ("a highway", "a big motorway"),
}
LIGHT = {
    "day": ("by day", "in daylight"),
    "dusk": ("at dusk", "at sunset"),
    "night": ("at night", "in the dark"),
}
WEATHER = {
    "clear": ("in clear weather", "with no clouds"),
    "rain": ("in rain", "with rain coming down"),
    "fog": ("in fog", "with a lot of fog"),
    "snow": ("in snow", "with snow coming down"),
}
SIDE = {
    "left": ("on the left", "at left"),
    "middle": ("in front", "ahead"),
    "right": ("on the right", "at right"),
}
CAR = {
    "ahead": ("driving away", "going our way"),
    "oncoming": ("driving at us", "coming closer"),
    "parked": ("parked", "not moving"),
    "crossing": ("going across", "driving across"),
}
PERSON = {
    "walking": ("walks", "is on foot"),
    "standing": ("stands", "waits"),
    "crossing": ("crosses", "walks across"),
}
VERBS = ("go", "drive")
SIGN = {"stop": "stop sign", "limit": "speed sign", "crossing": "crossing sign"}


def _where(thing: Seen, say: Wording, slot: str) -> str:
    return say.pick(slot, SIDE[thing.side])


def _place(view: View, say: Wording) -> str:
    scene = view.scene
    road, light = say.pick("road", ROAD[scene.road]), say.pick("light", LIGHT[scene.light])
    weather = say.pick("weather", WEATHER[scene.weather])
    options = (
        f"this is {road} {light} {weather}",
        f"I see {road} {weather} {light}",
        f"it is {road}, {light} and {weather}",
    )
    return sentence(say.pick("place", options))


def _ego(view: View, say: Wording) -> str:
    motion = view.scene.ego
    if motion.pace == "standing":
        return sentence(say.pick("stand", ("we stand still", "we do not move")))
    pace = {"slow": ("slowly", "at low speed"), "fast": ("fast", "at high speed")}[motion.pace]
    turn = {
        "straight": ("straight on", "ahead"),
        "left": ("to the left", "into a left turn"),
        "right": ("to the right", "into a right turn"),
    }
    return sentence(
        f"we {say.pick('verb', VERBS)} {say.pick('pace', pace)} {say.pick('turn', turn[motion.turn])}"
    )


def _cars(view: View, say: Wording) -> str:
    found = view.of("car")
    if not found:
        return sentence(say.pick("nocar", ("I see no cars", "no cars here")))
    if len(found) == 1:
        car = found[0]
        doing, where = say.pick("car0", CAR[car.pose]), _where(car, say, "carside0")
        return sentence(
            say.pick(
                "cars1",
                (f"a {car.colour} car is {doing} {where}", f"I see one {car.colour} car {where}, {doing}"),
            )
        )
    each = [f"{car.colour} {_where(car, say, f'carside{i}')}" for i, car in enumerate(found)]
    return sentence(
        say.pick(
            "cars",
            (
                f"I see {number(len(found))} cars, {listing(each)}",
                f"{number(len(found))} cars: {listing(each)}",
            ),
        )
    )


def _trucks(view: View, say: Wording) -> str:
    sentences = []
    for i, truck in enumerate(view.of("truck")):
        doing, where = say.pick(f"truck{i}", CAR[truck.pose]), _where(truck, say, f"truckside{i}")
        sentences.append(
            sentence(
                say.pick(
                    "trucks", (f"a {truck.colour} truck is {where}", f"a {truck.colour} truck is {doing}")
                )
            )
        )
    return " ".join(sentences)


def _people(view: View, say: Wording) -> str:
    found = view.of("pedestrian")
    if not found:
        return sentence(say.pick("nobody", ("I see no people", "nobody is on foot")))
    if len(found) == 1:
        doing, where = say.pick("person0", PERSON[found[0].pose]), _where(found[0], say, "personside0")
        return sentence(
            say.pick("people1", (f"one person {doing} {where}", f"I see one person who {doing} {where}"))
        )
    sides = listing([_where(p, say, f"personside{i}") for i, p in enumerate(found)])
    return sentence(
        say.pick(
            "people",
            (f"I see {number(len(found))} people, {sides}", f"{number(len(found))} people are here, {sides}"),
        )
    )


def _cyclist(view: View, say: Wording) -> str:
    found = view.of("cyclist")
    if not found:
        return ""
    where = _where(found[0], say, "cyclistside")
    return sentence(say.pick("cyclist", (f"a bike rider is {where}", f"somebody rides a bike {where}")))


def _signal(view: View, say: Wording) -> str:
    found = view.of("signal")
    if not found:
        return ""
    return sentence(
        say.pick("signal", (f"the light is {found[0].colour}", f"a {found[0].colour} traffic light is up"))
    )


def _sign(view: View, say: Wording) -> str:
    found = view.of("sign")
    if not found:
        return ""
    name, where = SIGN[found[0].pose], _where(found[0], say, "signside")
    return sentence(say.pick("sign", (f"a {name} is {where}", f"I see a {name} {where}")))


def _surroundings(view: View, say: Wording) -> str:
    trees, houses = view.scenery["tree"], view.scenery["building"]
    if trees and houses:
        options = ("houses and trees are around", "I see houses and trees")
    elif houses:
        options = ("houses are around", "I see houses")
    elif trees:
        options = ("trees are around", "I see trees")
    elif trees is False and houses is False:
        options = ("the land is open", "nothing stands beside the road")
    else:
        return ""
    return sentence(say.pick("surroundings", options))


def _advice(view: View, say: Wording) -> str:
    if any(p.pose == "crossing" for p in view.of("pedestrian")):
        options = ("let the person cross", "watch the person who crosses")
    elif any(light.colour == "red" for light in view.of("signal")):
        options = ("wait for green", "stop at the red light")
    elif view.scene.weather in ("rain", "snow"):
        options = ("the road is slippery", "brake early")
    elif view.scene.weather == "fog" or view.scene.light == "night":
        options = ("take care, one cannot see far", "the view is short")
    elif view.of("car", "truck"):
        options = ("keep your distance", "mind the others on the road")
    else:
        options = ("the way is free", "go on as before")
    return sentence(say.pick("advice", options))


def _closing(view: View, say: Wording) -> str:
    count = len(view.of("car", "truck", "pedestrian", "cyclist"))
    if count == 0:
        options = ("the road is empty", "nobody else is here")
    elif count < 3:
        options = ("it is a calm scene", "there is not much traffic")
    else:
        options = ("it is a busy scene", "a lot is going on")
    return sentence(say.pick("closing", options))


Aspect = Callable[[View, Wording], str]
ASPECTS: dict[str, Aspect] = {
    "place": _place,
    "lanes": _surroundings,
    "ego": _ego,
    "cars": _cars,
    "trucks": _trucks,
    "people": _people,
    "cyclist": _cyclist,
    "signal": _signal,
    "sign": _sign,
    "surroundings": _surroundings,
    "advice": _advice,
}
FILLERS: tuple[Aspect, ...] = (_closing, _advice, _surroundings, _ego, _place, _people, _cars)
PLANS: dict[str, tuple[tuple[Aspect, ...], ...]] = {
    "describe": ((_place, _cars, _trucks, _people, _cyclist), (_ego, _place, _cars, _trucks, _people)),
    "elements": (
        (_cars, _trucks, _people, _cyclist, _signal, _sign),
        (_people, _cars, _trucks, _sign, _surroundings),
    ),
    "layout": ((_place, _signal, _sign, _surroundings), (_surroundings, _place, _sign, _signal)),
    "vehicles": ((_cars, _trucks, _cyclist, _ego), (_ego, _trucks, _cars, _cyclist)),
    "happening": ((_ego, _cars, _people, _trucks), (_people, _ego, _cars, _signal)),
    "attention": ((_advice, _people, _cars, _signal), (_advice, _cars, _trucks, _cyclist)),
}


def describe(kind: str, view: View, say: Wording) -> str:
    """The short answer to a question that asks for a description."""
    plan = say.pick("plan", PLANS[kind])
    wanted, fillers = ([aspect(view, say) for aspect in aspects] for aspects in (plan, FILLERS))
    return compose(wanted, fillers, LEAST, MOST)


def with_fact(fact: str, related: tuple[str, ...], view: View, say: Wording) -> str:
    """The short answer to a factual question: the fact, and something that goes with it."""
    wanted = [fact, *(ASPECTS[name](view, say) for name in related)]
    return compose(wanted, [filler(view, say) for filler in FILLERS], LEAST_FACT, MOST_FACT)
