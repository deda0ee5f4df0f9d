"""The names by which bench/report still imports them; goes with its next edition."""
