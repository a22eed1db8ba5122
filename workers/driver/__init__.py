"""The driver of a job: it starts the crew, orders each step, waits, records, checkpoints, evaluates."""
