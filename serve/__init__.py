"""Start, watch, scale and stop a server on this machine."""
