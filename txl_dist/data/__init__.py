"""The data's way, from text to the tokens of a step.

1. `corpora` finds the files (`paths`), opens them (`text_files`), tells the documents of train, valid and test apart,
   and cuts them into pieces of text.
   Those of the paper's corpora are known to `published`, which has them fetched by `download`.
2. `tokenizers` turns a piece into token numbers (bytes, words or SentencePiece), and token numbers back into text.
3. `shards` writes the tokens of a split, its documents in order, as one stream cut into samples of equal length, the
   samples into WebDataset shards, and an index beside them; `index` opens that, and `samples` reads any token of the
   stream back without scanning.
4. `lanes` plans which span of the stream each lane reads at each step: a pure function of the index and the config.
5. `segments` reads the spans of one step, ahead of time, and hands them over as arrays.

`txl_dist.prepare` runs 1 to 3, once; training runs 4 and 5 over what they left.
"""
