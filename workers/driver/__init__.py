"""The driver of a job: starts the crew, orders steps, waits, records, checkpoints, evaluates."""
