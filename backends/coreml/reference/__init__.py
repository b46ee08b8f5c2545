"""An evaluator of saved Core ML programs, in NumPy, that shares nothing with what writes them.

It reads the protobuf and the file of weights, and computes each operation from Apple's description of it. Floats are
computed in float32 and rounded to the type that the program declares for each value: what a program stores in float16 has
float16's precision here, with sums in float32. How a Neural Engine adds up is not modelled.
"""
