"""Exact rewrites that leave less to do: constants, dead nodes, duplicates, no-ops, layout, casts."""
