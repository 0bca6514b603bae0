"""Studies of settings and objectives, and what shows their runs."""
