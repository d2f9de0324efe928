"""Kind align.selfplay: self-play of a language model under a preference oracle."""
