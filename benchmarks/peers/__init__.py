"""The contestants of `time_to_objective.py`, and how each is run."""
