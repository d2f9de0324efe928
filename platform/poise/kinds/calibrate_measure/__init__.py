"""Kind calibrate.measure: calibration of a language model by semantic sampling."""
