"""From documents to batches: sources, tokenizers, packing, prepared data sets, resumable loaders.

The road of a text, one module a step (nothing is imported here, so that a config costs no import
of the readers):

- `sources`: what a word of a config says about where documents come from.
- `corpus`, `files` and `formats`, `tfds_source`: who holds them, behind the interface of
  `documents`; a new corpus is a class with `name`, `digest`, `documents`.
- `splits`: which documents are held out.
- `tokenizers`, `tokenizer_files`, `tokenizer_training`: text to ids and back.
- `packing`: documents to fixed-length records, without loss.
- `ingest`, `shards`, `manifest`: the records on disk, written once, in memory that does not grow.
- `builders`: `prepare`, the one call users need, and `verify`.
- `loader`, `mixture`, `loader_state`: batches for training and evaluation; saving the place.
"""
