"""LiteRT (TensorFlow Lite): flatbuffers for phones and boards, written from the graph and run here."""
