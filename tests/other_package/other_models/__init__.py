"""A package of somebody else, which brings an architecture of its own."""
