"""What a test does to a shared model and to memory: compared, measured, limited, reported."""
