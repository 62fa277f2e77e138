"""Readers of patient records: the only code that sees a hospital's files."""
