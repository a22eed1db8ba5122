"""Who is in the race of `time_to_objective.py`, and how each is run."""
