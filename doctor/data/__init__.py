"""Constants, each with its source: GPU catalogue, model catalogue, version rules."""
