"""What stands before the servers: nginx or a development proxy, and the prober."""
