"""What a language model's confidence is worth: self-consistency by meaning, calibration errors, their intervals."""
