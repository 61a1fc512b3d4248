"""The realtime engine of Waterspout; it knows no web framework.

``handlers/`` brings it the web, ``run.py`` wires it.  Imports inside point one
way: session -> node -> hub and the seams -> protocol, channels, auth -> stream
-> errors; ``settings`` and ``observe`` import nothing of ours.
"""

__version__ = "0.1.0"
