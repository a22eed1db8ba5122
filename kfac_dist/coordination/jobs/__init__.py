"""Rules for jobs: states, queue, attempts and restarts, placement, and the JobRunner protocol."""
