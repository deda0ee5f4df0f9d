"""Load on a server: closed or open loop, measured from outside."""
