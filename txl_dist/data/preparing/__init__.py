"""From text to shards, for `txl_dist.prepare` alone: nothing that reads a dataset imports from here.

1. `corpora` finds the files of the text (`paths`) and reads them once (`text_files`). Those of the Transformer-XL
   paper are known to `published`, which fetches them (`download`).
2. `splitting` decides which bytes belong to train, valid and test, and cuts them into pieces of bounded size.
3. `tokenizing` makes the tokenizer and turns pieces into tokens, in the processes of `workers`.
4. `shards` writes the tokens of each split into shards, and the index.

`pipeline` calls 1 to 4. For what is not text `sequences` stands beside 1 to 3, and for labelled texts `examples`.
"""
