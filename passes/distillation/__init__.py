"""Passes that let a module learn from another one."""
