"""Secure aggregation: the coordinator learns the sum of the hospitals' vectors and nothing narrower."""
