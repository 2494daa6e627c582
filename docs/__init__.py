"""What the tutorial's experiments and pictures are made with; no part of the package."""
