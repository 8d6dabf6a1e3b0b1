"""Named objectives for noisy labels, hard instances and weak groups."""
