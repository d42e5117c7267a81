"""What a run says: reports of tests, summary, promises, files."""
