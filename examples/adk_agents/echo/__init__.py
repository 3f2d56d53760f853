"""An agent folder as the ADK command line wants it."""

from . import agent  # noqa: F401 - ADK looks for `agent` here
