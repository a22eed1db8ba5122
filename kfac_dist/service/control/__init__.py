"""What the control plane does by itself: it starts attempts, follows them, restarts and ends them."""
