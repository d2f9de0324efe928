"""The one training loop, its state, its schedules: plain torch."""
