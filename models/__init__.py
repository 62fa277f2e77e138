"""Models and tasks. Knows nothing of federation or privacy."""
