"""The actors of a job as the driver holds them: who lives, who died, who comes next."""
