"""Models in memory: found, loaded where the plan puts them, lent to tests, let go."""
