"""The gRPC server: calls in, verbs of `Jobs` out. Everything below it is synchronous."""
