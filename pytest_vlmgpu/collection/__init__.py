"""What collected tests ask for: markers, aliases and fixtures read, tests parametrised, grouped and ordered."""
