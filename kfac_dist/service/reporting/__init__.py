"""How a run reaches the control plane: the driver reports from the run folder, the store takes it up."""
