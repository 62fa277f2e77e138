"""What accuracy is left under privacy, measured on every real cohort: ``docs/results.md`` and the figures behind it."""
