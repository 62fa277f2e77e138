"""Sums of per-patient gradients, each clipped to the same norm."""
