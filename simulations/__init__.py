"""Rehearsals on one machine: the production client and server code under a simulated network."""
