"""May a test run here? The machine as it is now, and the verdict: run, skip or error."""
