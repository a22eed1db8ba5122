"""Formats of files, and checks of what is read from them."""
