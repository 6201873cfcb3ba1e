"""The theorems' own model set-ups: what the paper predicts of each, and what is measured."""
