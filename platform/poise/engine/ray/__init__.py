"""Worker groups, trials of Ray Tune, jobs and a pool of samplers on a Ray cluster. Only this package imports Ray."""
