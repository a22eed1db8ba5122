"""How a run reaches the store: its driver reports from the run folder, the service takes it up."""
