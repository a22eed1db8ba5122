"""The gRPC server: it turns calls into methods of `Jobs`. Everything below it is synchronous."""
