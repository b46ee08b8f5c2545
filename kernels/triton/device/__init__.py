"""The sources that Triton compiles; a program names a function in here."""
