"""What ships inside every archive: the picture's way from bytes to an answer, and its proof."""
