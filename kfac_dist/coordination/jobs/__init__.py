"""Rules for jobs: their states, the queue, attempts and restarts, the JobRunner, placement."""
