"""File formats: how they are read, and checked."""
