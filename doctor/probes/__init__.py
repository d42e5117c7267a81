"""Active tests: what really loads and computes on this machine, because the user asked for it. Each in a child process."""
