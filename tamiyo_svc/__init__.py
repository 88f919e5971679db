"""Tamiyo: the strategic controller that answers every training step with one signed command."""

__version__ = "0.1.0"
