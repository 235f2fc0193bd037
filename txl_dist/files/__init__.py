"""Files on a disk that several processes share: atomic writes, locks, and parsers that survive any content."""
