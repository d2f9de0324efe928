"""One vLLM engine behind the sampler interface. Only this package imports vLLM."""
