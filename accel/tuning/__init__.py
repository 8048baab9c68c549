"""Which kernel, in which configuration, runs each call: measured where it can be, remembered."""

from .measure import side_stream
from .select import Choice, Selector, selector_for, settled

__all__ = ["Choice", "Selector", "selector_for", "settled", "side_stream"]
