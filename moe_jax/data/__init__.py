"""From documents to batches: corpora, tokenizers, packing, prepared data sets, resumable loaders.

The road of a text, one module a step (nothing is imported here, so that a config costs no import
of the readers):

- `corpus`: named sources of documents; a new source is a class with `name`, `digest`, `documents`.
- `splits`: which documents are held out.
- `tokenizers`: text to ids and back.
- `packing`: documents to fixed-length records, without loss.
- `builders`: the records on disk (TFDS, array_record), and `prepare`, the one call users need.
- `loader`, `loader_state`: batches for training and evaluation; saving the place in the stream.
"""
