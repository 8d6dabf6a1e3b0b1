"""Fast forms of what criteria compute, for eager execution; the plain formulas beside them say what they equal."""
