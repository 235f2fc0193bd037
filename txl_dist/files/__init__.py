"""Files that several processes share: atomic writes, locks, a cache folder, and parsing of damaged content."""
