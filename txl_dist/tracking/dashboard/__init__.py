"""The dashboard of runs: what the files of a run hold, as the data of a page."""
