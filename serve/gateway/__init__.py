"""The gateway in front of the servers: nginx, and the prober behind its /ping."""
