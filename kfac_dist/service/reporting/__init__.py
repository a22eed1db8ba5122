"""How a run gets into the store: its driver reports from the run folder, the service stores it."""
