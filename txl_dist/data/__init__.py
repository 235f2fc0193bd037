"""The data, from text to the tokens of a training step.

`preparing/` is what `txl_dist.prepare` runs once: it turns text into a dataset on disk. The modules here read it:

1. `format` describes the files of a dataset; `store` finds them, in a folder or behind a URL; `index` opens them.
2. `samples` reads any token of a split's stream without scanning.
3. `lanes` plans which span of the stream each lane reads at each step: a pure function of the index and the config.
4. `segments` reads the spans of a step, ahead of time, and returns them as arrays.

`tokenizers` turns text into tokens and back; `text_size` knows how much text some tokens were made of.
"""
