"""What travels over gRPC: records as messages, errors as status codes."""
