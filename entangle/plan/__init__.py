"""What a training step needs on machines that are not there: compiled by their own compiler, measured, and made to fit.

``python -m entangle.plan --help``. Nothing is imported here: the command says where JAX is to look before it loads it.
"""
