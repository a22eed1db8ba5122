"""What the control plane does by itself: it starts, follows, restarts and ends attempts."""
