"""Ready-made tasks, one a cohort or example: what ``medfed-server study new --task NAME`` starts from. Data, no code."""
