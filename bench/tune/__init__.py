"""Find batch size, workers, delay and threads for a latency budget or a rate, on the real server."""
