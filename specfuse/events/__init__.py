"""Events of an event camera: streams, pictures of them, and a simulated sensor."""

from specfuse.events.render import render_eventgpt
from specfuse.events.simulate import Sensor, simulate
from specfuse.events.stream import EventStream

__all__ = ["EventStream", "Sensor", "render_eventgpt", "simulate"]
