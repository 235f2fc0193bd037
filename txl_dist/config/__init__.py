"""The schema of the config, its composition from a command line, and the checks across its sections."""
