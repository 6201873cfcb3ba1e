"""Preference pairs, the models that are trained on them before and by preferences, and what such an experiment is told."""
