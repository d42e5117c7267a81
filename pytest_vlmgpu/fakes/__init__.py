"""Machines, models and images that stand in for real ones."""
