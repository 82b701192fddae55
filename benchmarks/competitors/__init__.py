"""What else computes the same, a file a room; see `adapter`."""
