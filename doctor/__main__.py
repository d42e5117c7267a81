"""``python -m vlm_doctor``."""

from __future__ import annotations

from .cli import main

main()
