"""The coordinator's side: enrolment, rounds, checkpoints, and the link to Flower's SuperLink."""
