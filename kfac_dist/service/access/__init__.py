"""Access: tokens and their roles, limits of a user, and TLS."""
