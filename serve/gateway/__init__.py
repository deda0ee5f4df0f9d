"""What stands before the servers: nginx, and the prober behind its /ping."""
