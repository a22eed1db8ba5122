"""Between records and protobuf messages, errors and status codes, tokens, packages, channels."""
