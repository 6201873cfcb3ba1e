"""The reference page of the objectives, made from their docstrings and signatures."""
