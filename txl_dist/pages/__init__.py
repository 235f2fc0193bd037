"""Pages of one file each, which need no network: what a run has done, and where its model looks."""
