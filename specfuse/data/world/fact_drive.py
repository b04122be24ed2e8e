"""Questions about the drive as a whole: turn, speed, weather, time of day, road."""

from __future__ import annotations

from specfuse.data.world.fact import Fact
from specfuse.data.world.visible import View
from specfuse.data.world.wording import Wording

WEATHER = {
    "clear": (
        ("The weather is clear.", "The sky is clear and the road is dry.", "It is clear weather."),
        ("It is clear.", "Clear weather.", "The sky is clear."),
    ),
    "rain": (
        ("It is raining.", "The weather is rainy.", "Rain is falling on the road."),
        ("It rains.", "Rain.", "There is rain."),
    ),
    "fog": (
        ("It is foggy.", "The scene is covered in fog.", "There is thick fog."),
        ("It is foggy.", "Fog.", "There is fog."),
    ),
    "snow": (
        ("It is snowing.", "Snow is falling.", "The weather is snowy."),
        ("It snows.", "Snow.", "There is snow."),
    ),
}
LIGHT = {
    "day": (
        ("It is daytime.", "The video was recorded during the day.", "The scene is in daylight."),
        ("It is day.", "By day.", "Daylight."),
    ),
    "dusk": (
        ("It is dusk.", "The video was recorded in the evening.", "The scene is set at dusk."),
        ("It is dusk.", "At dusk.", "It is evening."),
    ),
    "night": (
        ("It is night.", "The video was recorded at night.", "The scene is set at night."),
        ("It is night.", "At night.", "It is night now."),
    ),
}
ROAD = {
    "country": (
        ("This is a straight country road.", "The car is on a rural road.", "The road is a country road."),
        ("A country road.", "It is a country road.", "We are on a country road."),
    ),
    "curve": (
        ("The road is a curve.", "The car is on a curved road.", "This is a road with a curve."),
        ("A curve.", "It is a curved road.", "We are in a curve."),
    ),
    "junction": (
        ("This is an intersection.", "The car is at an intersection.", "The road leads to an intersection."),
        ("A junction.", "It is a junction.", "We are at a junction."),
    ),
    "city": (
        ("This is a city street.", "The car is on a city street.", "The road is an urban street."),
        ("A city street.", "It is a city street.", "We are in a city."),
    ),
    "highway": (
        ("This is a highway.", "The car is on a highway.", "The road is a wide highway."),
        ("A highway.", "It is a highway.", "We are on a motorway."),
    ),
}


def turn(view: View, say: Wording) -> Fact | None:
    """Which way the ego car turns; not asked of a car that stands."""
    ego = view.scene.ego
    if ego.pace == "standing":
        return None
    if ego.turn == "straight":
        long = (
            "The car is going straight ahead.",
            "The vehicle drives straight on without turning.",
            "It moves straight along the road.",
        )
        short = ("We go straight.", "Straight on.", "The car goes straight.")
    else:
        long = (
            f"The car is turning to the {ego.turn}.",
            f"The vehicle makes a turn to the {ego.turn}.",
            f"It is turning {ego.turn}.",
        )
        short = (f"We go {ego.turn}.", f"To the {ego.turn}.", f"The car turns {ego.turn}.")
    ask = (
        "Which way is our car turning?",
        "Is the car turning left, turning right or going straight?",
        "In which direction does the ego vehicle go?",
    )
    return Fact("turn", ask, ego.turn, long, short, ("ego", "place", "lanes"))


def speed(view: View, say: Wording) -> Fact | None:
    """Whether the ego car stands, moves slowly or fast."""
    pace = view.scene.ego.pace
    words = {
        "standing": (
            "The car is standing still.",
            "Our vehicle has stopped.",
            "The camera does not move because the car is standing.",
        ),
        "slow": (
            "The car is moving slowly.",
            "Our vehicle drives at a low speed.",
            "It is moving at a slow pace.",
        ),
        "fast": (
            "The car is moving fast.",
            "Our vehicle drives at a high speed.",
            "It is moving at a fast pace.",
        ),
    }
    brief = {
        "standing": ("We stand still.", "The car has stopped.", "It stands."),
        "slow": ("We go slowly.", "At low speed.", "It is slow."),
        "fast": ("We go fast.", "At high speed.", "It is fast."),
    }
    ask = (
        "How fast is our car moving?",
        "Is the car standing, moving slowly or moving fast?",
        "What is the speed of the ego vehicle?",
    )
    return Fact("speed", ask, pace, words[pace], brief[pace], ("ego", "signal", "surroundings"))


def weather(view: View, say: Wording) -> Fact | None:
    """Clear, rain, fog or snow."""
    ask = ("What is the weather like?", "How is the weather in the video?", "Describe the weather.")
    answer = view.scene.weather
    return Fact("weather", ask, answer, *WEATHER[answer], ("place", "advice"))


def light(view: View, say: Wording) -> Fact | None:
    """Day, dusk or night."""
    ask = ("What time of day is it?", "Is it day, dusk or night?", "When was this video recorded?")
    answer = view.scene.light
    return Fact("time_of_day", ask, answer, *LIGHT[answer], ("place", "surroundings"))


def road(view: View, say: Wording) -> Fact | None:
    """The type of road."""
    ask = (
        "What kind of road is this?",
        "On which type of road is the car?",
        "What type of road does the video show?",
    )
    answer = view.scene.road
    return Fact("road_type", ask, answer, *ROAD[answer], ("lanes", "surroundings", "ego"))
