"""The model families that a compiler meets: each from its configuration, with seeded random weights, at reduced size.

python -m optkit.benchmarks.families --only vision
"""
