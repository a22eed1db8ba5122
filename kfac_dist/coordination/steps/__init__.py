"""Rules for steps: what is due when, on which cases, with which inverses, and who makes them."""
