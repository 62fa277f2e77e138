"""Models of a ward."""
