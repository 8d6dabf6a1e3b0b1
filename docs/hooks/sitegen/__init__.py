"""What the documentation site is generated from: the registries, their docstrings and the committed results."""
