"""Entry point of the pytest plugin."""

from __future__ import annotations
