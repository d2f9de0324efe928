"""What can be run: one short file per kind of job."""
