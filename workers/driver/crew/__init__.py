"""The actors of a job as the driver holds them: who is alive, who died, who replaces whom."""
