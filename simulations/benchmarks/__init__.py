"""Measurements that print JSON."""
