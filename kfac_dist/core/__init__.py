"""The mathematics of K-FAC: torch only; no Ray, gRPC, threads, clock or environment."""
