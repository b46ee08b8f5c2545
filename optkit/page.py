"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

from html import escape

from optkit.report import Report, dump


def page(report: Report) -> str:
    """A page."""
    return f"<!doctype html><meta charset=utf-8><title>optkit</title><pre>{escape(dump(report))}</pre>\n"
