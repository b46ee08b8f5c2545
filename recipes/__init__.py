"""Recipes that ship with optkit: one YAML file each."""
