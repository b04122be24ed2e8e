"""The target's way of talking about a scene: full sentences, careful, with advice at the end."""

from __future__ import annotations

from collections.abc import Callable

from specfuse.data.world.visible import Seen, View
from specfuse.data.world.wording import Wording, compose, listing, number, sentence

LEAST, MOST = 58, 88  # words of a description; a tokenizer makes a few more of them
LEAST_FACT, MOST_FACT = 50, 78

ROAD = {
    "country": ("a straight country road between open fields", "a rural road that runs straight ahead"),
    "curve": ("a road that bends in a long curve", "a curved road that winds through the land"),
    "junction": (
        "a road that leads to an intersection with a crosswalk",
        "an intersection with a zebra crossing",
    ),
    "city": ("a city street with pavements on both sides", "an urban street lined with pavements"),
    "highway": ("a wide highway with guard rails on both sides", "a highway that is bounded by guard rails"),
}
LIGHT = {
    "day": ("during the day", "in bright daylight", "in the daytime"),
    "dusk": ("at dusk", "in the evening light", "around sunset"),
    "night": ("at night", "after dark", "in the darkness of the night"),
}
WEATHER = {
    "clear": ("under a clear sky", "in clear weather", "while the sky is clear"),
    "rain": ("in the rain", "while rain is falling", "while it is raining"),
    "fog": ("in thick fog", "while fog covers the view", "with fog hanging over the road"),
    "snow": ("in falling snow", "while it is snowing", "with snow lying beside the road"),
}
SIDE = {
    "left": ("on the left", "on the left side", "to the left of the lane"),
    "middle": ("in the middle of the view", "in the centre of the picture"),
    "right": ("on the right", "on the right side", "to the right of the lane"),
}
CAR = {
    "ahead": ("driving ahead of us", "moving in the same direction"),
    "oncoming": ("coming towards us", "approaching from the opposite direction"),
    "parked": ("parked at the roadside", "parked and empty"),
    "crossing": ("passing from one side to the other", "driving across the intersection"),
}
PERSON = {
    "walking": ("walking along the road", "walking beside the road"),
    "standing": ("standing at the edge of the road", "waiting at the roadside"),
    "crossing": ("crossing the road", "walking across the road"),
}
SIGN = {"stop": "stop sign", "limit": "speed limit sign", "crossing": "blue crossing sign"}


def _where(thing: Seen, say: Wording, slot: str) -> str:
    return say.pick(slot, SIDE[thing.side])


def _place(view: View, say: Wording) -> str:
    scene = view.scene
    road, light = say.pick("road", ROAD[scene.road]), say.pick("light", LIGHT[scene.light])
    weather = say.pick("weather", WEATHER[scene.weather])
    return sentence(
        say.pick(
            "place",
            (
                f"the video shows {road} {light} {weather}",
                f"the scene takes place on {road}, {light} and {weather}",
                f"in this video, the camera looks at {road} {light}, {weather}",
                f"we are looking at {road}; the recording was made {light} {weather}",
            ),
        )
    )


def _ego(view: View, say: Wording) -> str:
    motion = view.scene.ego
    who = say.pick("who", ("the vehicle with the camera", "the ego vehicle", "our car"))
    if motion.pace == "standing":
        return sentence(
            f"{who} {say.pick('stand', ('is standing still', 'has stopped and does not move', 'is waiting'))}"
        )
    pace = {"slow": ("slowly", "at a low speed"), "fast": ("fast", "at a high speed")}[motion.pace]
    turn = {
        "straight": ("and keeps going straight", "and follows the lane straight ahead"),
        "left": ("and turns to the left", "while it is turning left"),
        "right": ("and turns to the right", "while it is turning right"),
    }[motion.turn]
    verb = say.pick("move", ("is moving forward", "drives", "is travelling"))
    return sentence(f"{who} {verb} {say.pick('pace', pace)} {say.pick('turn', turn)}")


def _cars(view: View, say: Wording) -> str:
    found = view.of("car")
    if not found:
        return sentence(say.pick("nocar", ("there are no cars in view", "no cars can be seen on the road")))
    if len(found) == 1:
        car = found[0]
        doing, where = say.pick("car0", CAR[car.pose]), _where(car, say, "carside0")
        one = (
            f"there is one car in view, a {car.colour} one that is {doing} {where}",
            f"one car is visible: a {car.colour} one {doing} {where}",
        )
        return sentence(say.pick("cars1", one))
    each = [
        f"a {car.colour} one {say.pick(f'car{i}', CAR[car.pose])} {_where(car, say, f'carside{i}')}"
        for i, car in enumerate(found)
    ]
    if len(found) > 3:
        each = [f"a {car.colour} one {_where(car, say, f'carside{i}')}" for i, car in enumerate(found)]
    many = (
        f"there are {number(len(found))} cars in view: {listing(each)}",
        f"{number(len(found))} cars can be seen, namely {listing(each)}",
        f"the traffic includes {number(len(found))} cars, {listing(each)}",
    )
    return sentence(say.pick("cars", many))


def _trucks(view: View, say: Wording) -> str:
    sentences = []
    for i, truck in enumerate(view.of("truck")):
        doing, where = say.pick(f"truck{i}", CAR[truck.pose]), _where(truck, say, f"truckside{i}")
        how = (
            f"a large {truck.colour} truck is {doing} {where}",
            f"{where} there is a {truck.colour} truck {doing}",
        )
        sentences.append(sentence(say.pick("trucks", how)))
    return " ".join(sentences)


def _people(view: View, say: Wording) -> str:
    found = view.of("pedestrian")
    if not found:
        return sentence(
            say.pick("nobody", ("no pedestrians are visible", "there are no pedestrians near the road"))
        )
    each = [
        f"{say.pick(f'person{i}', PERSON[p.pose])} {_where(p, say, f'personside{i}')}"
        for i, p in enumerate(found)
    ]
    if len(found) == 1:
        return sentence(
            say.pick(
                "people1", (f"one pedestrian is {each[0]}", f"there is one pedestrian, who is {each[0]}")
            )
        )
    if len(found) > 3:
        return sentence(f"there are {number(len(found))} pedestrians around the road")
    parts = listing([f"one is {text}" for text in each])
    count = number(len(found))
    return sentence(
        say.pick(
            "people", (f"there are {count} pedestrians: {parts}", f"{count} pedestrians are visible; {parts}")
        )
    )


def _cyclist(view: View, say: Wording) -> str:
    found = view.of("cyclist")
    if not found:
        return ""
    where = _where(found[0], say, "cyclistside")
    return sentence(
        say.pick(
            "cyclist",
            (
                f"a cyclist with a bright helmet is riding {where}",
                f"{where}, a cyclist rides in the same direction",
            ),
        )
    )


def _signal(view: View, say: Wording) -> str:
    found = view.of("signal")
    if not found:
        return ""
    colour, where = found[0].colour, _where(found[0], say, "signalside")
    return sentence(
        say.pick(
            "signal", (f"the traffic light {where} is {colour}", f"a traffic light {where} shows {colour}")
        )
    )


def _sign(view: View, say: Wording) -> str:
    found = view.of("sign")
    if not found:
        return ""
    name, where = SIGN[found[0].pose], _where(found[0], say, "signside")
    return sentence(say.pick("sign", (f"a {name} stands {where}", f"{where}, a {name} can be made out")))


def _surroundings(view: View, say: Wording) -> str:
    trees, houses = view.scenery["tree"], view.scenery["building"]
    if trees and houses:
        options = ("trees and buildings stand beside the road", "the road is bordered by buildings and trees")
    elif houses:
        options = ("buildings rise beside the road", "the background is filled with buildings")
    elif trees:
        options = ("trees grow along the road", "the roadside is lined with trees")
    elif trees is False and houses is False:
        options = (
            "the land beside the road is open and empty",
            "there is nothing but open land beside the road",
        )
    else:
        return ""
    return sentence(say.pick("surroundings", options))


def _lanes(view: View, say: Wording) -> str:
    two_way = view.scene.road != "highway"
    line = "a yellow line separates the oncoming traffic" if two_way else "white lines separate the lanes"
    return sentence(
        say.pick("lanes", (f"the carriageway is divided by markings, and {line}", f"on the asphalt, {line}"))
    )


def _advice(view: View, say: Wording) -> str:
    lights = [thing.colour for thing in view.of("signal")]
    crossing = [p for p in view.of("pedestrian") if p.pose == "crossing"]
    if crossing:
        options = (
            "the driver should let the crossing pedestrian pass",
            "the driver must give way to the pedestrian who is crossing",
        )
    elif "red" in lights:
        options = (
            "the driver has to wait until the light turns green",
            "the red light means that the driver must stop",
        )
    elif view.scene.weather in ("rain", "snow"):
        options = (
            "the surface is slippery, so the driver should brake gently",
            "because the road is slippery, a longer distance is needed",
        )
    elif view.scene.weather == "fog" or view.scene.light == "night":
        options = (
            "the driver should be careful because it is hard to see far ahead",
            "with so little to see, the driver should drive with care",
        )
    elif view.of("cyclist"):
        options = (
            "the driver should leave enough space for the cyclist",
            "the driver should pass the cyclist with a wide gap",
        )
    elif view.of("car", "truck"):
        options = (
            "the driver should keep a safe distance from the other vehicles",
            "enough distance to the other vehicles should be kept",
        )
    else:
        options = (
            "the way is free and the driver can continue without worry",
            "nothing stands in the way of the driver",
        )
    return sentence(say.pick("advice", options))


def _closing(view: View, say: Wording) -> str:
    count = len(view.of("car", "truck", "pedestrian", "cyclist"))
    if count == 0:
        options = (
            "overall, the road is empty and the situation is calm",
            "all in all, nobody else is on the road",
        )
    elif count < 3:
        options = (
            "overall, the traffic is light and the situation looks calm",
            "all in all, there is little traffic",
        )
    else:
        options = (
            "overall, the scene is busy and calls for attention",
            "all in all, it is a busy scene with several road users",
        )
    return sentence(say.pick("closing", options))


Aspect = Callable[[View, Wording], str]
ASPECTS: dict[str, Aspect] = {
    "place": _place,
    "lanes": _lanes,
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
FILLERS: tuple[Aspect, ...] = (_advice, _closing, _surroundings, _ego, _lanes, _place, _people, _cars)
# Per kind of question: orders in which the aspects may come.
PLANS: dict[str, tuple[tuple[Aspect, ...], ...]] = {
    "describe": (
        (_place, _ego, _cars, _trucks, _people, _cyclist, _signal),
        (_place, _cars, _trucks, _people, _ego, _cyclist, _signal),
    ),
    "elements": (
        (_cars, _trucks, _people, _cyclist, _signal, _sign, _surroundings),
        (_people, _cyclist, _cars, _trucks, _sign, _signal, _place),
    ),
    "layout": (
        (_place, _lanes, _signal, _sign, _surroundings, _cars),
        (_lanes, _place, _surroundings, _sign, _signal, _people),
    ),
    "vehicles": ((_cars, _trucks, _cyclist, _ego, _people), (_trucks, _cars, _cyclist, _closing, _ego)),
    "happening": (
        (_ego, _people, _cyclist, _cars, _trucks, _signal),
        (_ego, _cars, _trucks, _people, _signal, _cyclist),
    ),
    "attention": (
        (_advice, _people, _cyclist, _signal, _cars, _place),
        (_advice, _cars, _trucks, _people, _signal, _place),
    ),
}


def describe(kind: str, view: View, say: Wording) -> str:
    """The long answer to a question that asks for a description."""
    plan = say.pick("plan", PLANS[kind])
    wanted, fillers = ([aspect(view, say) for aspect in aspects] for aspects in (plan, FILLERS))
    return compose(wanted, fillers, LEAST, MOST)


def with_fact(fact: str, related: tuple[str, ...], view: View, say: Wording) -> str:
    """The long answer to a factual question: the fact, then what goes with it."""
    wanted = [fact, *(ASPECTS[name](view, say) for name in related)]
    return compose(wanted, [filler(view, say) for filler in FILLERS], LEAST_FACT, MOST_FACT)
