"""The schema of the config, how it is composed from a command line, and the checks across its sections."""
