"""The inverse workers of a crew: who owns which layers, who replaces whom, who lacks what."""
