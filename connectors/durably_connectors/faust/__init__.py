"""Faust beside an installation: triggers, sinks, monitors, and typed channels for a user's own app."""

from durably_connectors.faust.app import App
from durably_connectors.faust.declared import IGNORE
from durably_connectors.faust.intake import Later
from durably_connectors.faust.message import Message
from durably_connectors.faust.monitors import monitor
from durably_connectors.faust.sinks import Destination, KafkaTopic, Outcome, Row, sink
from durably_connectors.faust.sql import SqlTable
from durably_connectors.faust.triggers import trigger

__all__ = [
    "IGNORE",
    "App",
    "Destination",
    "KafkaTopic",
    "Later",
    "Message",
    "Outcome",
    "Row",
    "SqlTable",
    "monitor",
    "sink",
    "trigger",
]
