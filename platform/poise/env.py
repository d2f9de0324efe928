"""Every environment variable that Poise reads or sets, with its default and the reason for it."""

from __future__ import annotations

__all__ = ["COMMIT", "RAY_DEFAULTS", "RAY_LOGS"]

RAY_LOGS = "POISE_RAY_LOGS"
"""Set to 1 to see what Ray's processes and the workers print; by default it is kept in Ray's logs only."""

COMMIT = "POISE_COMMIT"
"""Set by `poise submit` for its job, as JSON: the commit of the code that was sent, which has no repository there."""

RAY_DEFAULTS = {
    # A report waits for the controller to poll; at Ray's default of 2 s every commit would cost up to 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Prints of workers would appear twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Relative paths of a spec mean the same in a worker as where the spec was read.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Nothing about a run leaves the cluster.
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Set for Ray unless the user has set them."""
