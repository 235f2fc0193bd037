"""Third-party checkpoints, in and out.

`importing` turns one into a run: `pickles` reads its files without executing them, `sources` recognises it, `weights`
knows how its tensors are named and shaped, `vocabularies` reads its words. `exporting` turns a run into a folder for
transformers, with the code that lies in `hub`.
"""
