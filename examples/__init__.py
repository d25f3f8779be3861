"""Training examples: image data, networks, and a comparison with SGD-momentum."""
