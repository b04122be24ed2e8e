"""Events of an event camera: files, streams, pictures and grids of them, and a simulated sensor."""

from specfuse.events.files import FORMATS, load, open_events, save
from specfuse.events.grids import counts, time_surface, voxel_grid
from specfuse.events.render import render_eventgpt
from specfuse.events.simulate import Sensor, simulate
from specfuse.events.source import EventFile
from specfuse.events.stream import EventStream
from specfuse.events.tensors import EventTensors

__all__ = [
    "EventFile",
    "EventStream",
    "EventTensors",
    "FORMATS",
    "Sensor",
    "counts",
    "load",
    "open_events",
    "render_eventgpt",
    "save",
    "simulate",
    "time_surface",
    "voxel_grid",
]
