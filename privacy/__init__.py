"""The mathematics of privacy: pure functions without input/output, clock or ambient randomness."""
