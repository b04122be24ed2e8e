"""Events of an event camera: files, streams, pictures and grids of them, and a simulated sensor."""

from specfuse.events.grids import counts, time_surface, voxel_grid
from specfuse.events.render import render_eventgpt
from specfuse.events.simulate import Sensor, simulate
from specfuse.events.stream import EventStream
from specfuse.events.tensors import EventTensors

__all__ = [
    "EventStream",
    "EventTensors",
    "Sensor",
    "counts",
    "render_eventgpt",
    "simulate",
    "time_surface",
    "voxel_grid",
]
