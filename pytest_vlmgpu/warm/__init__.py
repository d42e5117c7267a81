"""Models that outlive a run (``--vlm-warm``): a process of their own keeps them, and the next run attaches."""
