"""The ladder: what a picture costs at each batch size, without a server."""
