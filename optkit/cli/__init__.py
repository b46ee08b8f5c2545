"""The command line: one file a command. ``main`` is what ``optkit`` runs."""

from __future__ import annotations

from optkit.cli.app import main

__all__ = ["main"]
