"""From a file to a uint8 image with its label."""
