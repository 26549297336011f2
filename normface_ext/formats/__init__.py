"""Heads of other libraries, read and written: ``load_head`` and ``save_head``."""

from .layouts import FORMATS
from .load import load_head
from .report import HeadReport, LoadedHead
from .save import save_head

__all__ = ["FORMATS", "HeadReport", "LoadedHead", "load_head", "save_head"]
