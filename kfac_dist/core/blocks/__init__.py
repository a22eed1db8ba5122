"""Which parameters form which curvature block, and the rule for each type of layer."""
