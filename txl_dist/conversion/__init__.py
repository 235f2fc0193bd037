"""Checkpoints of other houses: `pickles` reads their files without executing them, `sources` finds out what they are,
`weights` knows how their tensors are named and shaped, `vocabularies` reads their words. `hub` holds the files of an
exported folder."""
