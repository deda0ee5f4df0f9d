"""Compare servers: the same model and pictures, in turn and repeated."""
