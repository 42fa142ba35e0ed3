"""The HTTP face of the server: metrics and health, and APIs beside gRPC, over the same runtime."""
